"""Programs end with one line where an error is a user's, with a traceback where it is the program's."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from lib.errors import UserError, describe_error

ROOT = Path(__file__).parents[1]


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(("error", "message"), [
    (UserError("a.yaml: x: expected 1, found 2"), "a.yaml: x: expected 1, found 2"),
    (KeyboardInterrupt(), "interrupted"),
    (OSError(errno.ENOSPC, "No space left on device", "a/b"), "a/b: No space left on device; make room and rerun"),
    (OSError(errno.ENOSPC, "cannot be written (full); make room and rerun", "a/b"), "a/b: cannot be written (full); make room and rerun"),
    (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left on device; make room and rerun"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied; see to its permissions and rerun"),
    (OutOfMemoryError("CUDA out of memory. Tried to allocate"), "CUDA out of memory; take fewer sequences, documents or tokens at a time"),
    (ValueError("operands could not be broadcast"), None), (FileNotFoundError(errno.ENOENT, "no", "a"), None), (KeyError("a"), None),
])
def test_what_is_printed_in_place_of_a_traceback(error: BaseException, message: str | None) -> None:
    described = describe_error(error)
    assert described is None if message is None else described is not None and described.startswith(message)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, env=environment or None)


@pytest.mark.parametrize(("raised", "status", "last"), [
    ("from lib.errors import UserError; raise UserError('x: expected 1')", 1, ["x: expected 1"]),
    ("raise KeyboardInterrupt", -2, ["interrupted"]),
])
def test_packages_of_programs_report_errors_from_the_first_import_on(raised: str, status: int, last: list[str]) -> None:
    for package in ("stages", "tools", "bench"):
        result = run("-c", f"import {package}\n{raised}")
        assert (result.returncode, result.stderr.splitlines()) == (status, last)


@pytest.mark.parametrize(("rank", "said"), [("0", ["interrupted"]), ("1", [])])
def test_an_import_cannot_swallow_ctrl_c(tmp_path: Path, rank: str, said: list[str]) -> None:
    """What torch does when Ctrl-C comes while it imports NumPy. Outside of imports there may be something to clean up."""
    (tmp_path / "swallows.py").write_text("import os\ntry: os.kill(os.getpid(), 2)\nexcept BaseException: pass\n")
    interrupted = "import os\ntry: os.kill(os.getpid(), 2)\nexcept KeyboardInterrupt: print('cleaned up', flush=True)\n"
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where the tests run in the background
    result = run("-c", f"{heard}import stages\n{interrupted}import swallows", PYTHONPATH=f"{ROOT}:{tmp_path}", RANK=rank)
    assert (result.returncode, result.stdout, result.stderr.splitlines()) == (-2, "cleaned up\n", said)


def test_an_error_of_the_program_keeps_its_traceback() -> None:
    result = run("-c", "import stages\nraise ValueError('shapes differ')")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
    assert result.stderr.endswith("ValueError: shapes differ\n")


def test_no_code_for_users_raises_the_error_that_programs_raise() -> None:
    """Validators of parameters are called by pydantic, which takes ValueErrors alone."""
    raising = [path for path in (ROOT / "lib").rglob("*.py") if "raise ValueError(" in path.read_text()]
    assert {path.name for path in raising} <= {"config.py", "grid_config.py", "schema.py"}
