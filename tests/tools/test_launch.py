"""Stages below the launcher: one process without torchrun, several with it, and nothing but what the stage has to say."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
import stages
import lib.errors
lib.errors.PATIENCE_SECONDS = 0.5 if sys.argv[1:] == ["early", "1"] else 1e6
from lib.distributed import start_process
from lib.errors import UserError
rank = os.environ.get("LOCAL_RANK", "0")
if "early" in sys.argv and rank in sys.argv:
    if rank == "0" and "slowly" in sys.argv:
        time.sleep(1)  # as long as torchrun may need to see that another process has ended
    raise UserError("b: expected 1, found 2; set it to 1")
with start_process() as process:
    total = sum(process.gather(1))
    if process.is_main:
        print(total, "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "alone", *sys.argv[1:], flush=True)
    if "fail" in sys.argv and (sys.argv[-1] == "fail" or rank in sys.argv):
        raise UserError("a: expected 1, found 2; set it to 1")
    if "die" in sys.argv and process.rank == process.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if "bug" in sys.argv:
        [][process.rank]
"""


def launch(folder: Path, num_processes: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "program.py").write_text(PROGRAM)
    environment = {**os.environ, "NPROC": num_processes, "PYTHONPATH": f"{ROOT}:{folder}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "tools.launch", "-m", "program", *arguments], cwd=folder, env=environment,
                          capture_output=True, text=True, check=False, timeout=100)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "expected"), [("", "1 alone a b"), ("1", "1 alone a b"), ("2", "2 torchrun a b")])
def test_as_many_processes_as_were_asked_for(tmp_path: Path, num_processes: str, expected: str) -> None:
    result = launch(tmp_path, num_processes, "a", "b")
    assert (result.returncode, result.stdout.strip()) == (0, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "arguments"), [("1", []), ("2", []), ("2", ["1"])])
def test_an_expected_error_is_one_line(tmp_path: Path, num_processes: str, arguments: list[str]) -> None:
    """Of the one process, of both, of the second alone, which does not wait."""
    result = launch(tmp_path, num_processes, "fail", *arguments)
    assert result.returncode == 1
    assert result.stderr == "a: expected 1, found 2; set it to 1\n"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["0", "1"], ["0", "1", "slowly"], ["1"]])
def test_an_expected_error_before_the_processes_join_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    """Found by both, by both and first by the one that is silent, or by one alone."""
    result = launch(tmp_path, "2", "early", *arguments)
    assert result.returncode == 1
    assert result.stderr == "b: expected 1, found 2; set it to 1\n"


@pytest.mark.slow
def test_an_error_of_the_program_keeps_its_traceback(tmp_path: Path) -> None:
    result = launch(tmp_path, "2", "bug")
    assert result.returncode == 1
    assert "IndexError: list index out of range" in result.stderr
    assert "ChildFailedError" not in result.stderr


@pytest.mark.slow
def test_a_process_that_was_killed_is_named(tmp_path: Path) -> None:
    result = launch(tmp_path, "2", "die")
    assert result.returncode == 128 + signal.SIGKILL
    assert "process 1 of this run was ended by SIGKILL, for lack of memory perhaps; rerun to continue" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("num_processes", ["0", "two", "-1", "1.5"])
def test_other_numbers_of_processes_are_named(tmp_path: Path, num_processes: str) -> None:
    result = launch(tmp_path, num_processes)
    assert result.returncode == 1
    assert result.stderr == f"NPROC: expected a number of processes from 1, or auto or cpu or gpu, found {num_processes!r}\n"
