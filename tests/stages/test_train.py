"""The train stage as users run it: killed, interrupted, on a full disk, with several processes and nodes, with bad parameters and data."""

import errno
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lib.artifacts.resume
import lib.training.loop
from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.resume import load_resume
from lib.training.loop import Run, TrainingError
from stages import train
from tests.stages.project import check_confined, landlock
from tests.stages.train_project import (
    NUM_STEPS,
    RESULT,
    RESULT_FILES,
    SAVING_OFTEN,
    SEED,
    Command,
    find_state,
    free_port,
    read_losses,
    read_results,
    read_timing,
    run,
    saved_steps,
    torchrun,
    write_params,
    write_project,
)

pytestmark = pytest.mark.xdist_group("train")  # what the runs are compared with is trained once

TWO_PROCESSES = ["--standalone", "--nproc_per_node=2"]
FEW_STEPS = 12
SHARD, TOKENIZER = TOKENIZE_FOLDER / "train/train_000001.bin", TOKENIZE_FOLDER / "tokenizer.model"


def list_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    write_project(folder)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path) -> Path:
    """A folder that is ready to train."""
    return shutil.copytree(prepared, tmp_path / "project")


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same as the working directory, for the stage called in this process; few steps, the state saved as often as can be."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(lib.artifacts.resume, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lib.artifacts.resume, "SHARE", float("inf"))
    write_params(folder, "train", budget_steps=FEW_STEPS)
    return folder


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After a run in one process that nothing disturbed."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("reference") / "project")
    run(folder)
    assert read_results(folder).keys() == RESULT_FILES
    return folder


@contextmanager
def start_two_nodes(folders: list[Path], module: str = "stages.train") -> Iterator[tuple[Command, Command]]:
    """The stage on two nodes of one process each."""
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    with (Command(folders[0], torchrun(*where, "--node_rank=0"), module) as first,
          Command(folders[1], torchrun(*where, "--node_rank=1"), module) as second):
        yield first, second


@pytest.fixture
def nodes(prepared: Path, tmp_path: Path) -> list[Path]:
    """The folders of two nodes that are ready to train."""
    return [shutil.copytree(prepared, tmp_path / f"node{n}") for n in range(2)]


@pytest.fixture(scope="module")
def two_nodes(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folders of two nodes after a run that nothing disturbed."""
    folders = [shutil.copytree(prepared, tmp_path_factory.mktemp("nodes") / f"node{n}") for n in range(2)]
    with start_two_nodes(folders) as commands:
        for command in commands:
            assert command.wait() == 0, command.printed
    return folders


def test_a_run_that_is_stopped_again_and_again_ends_in_the_same_files(folder: Path, reference: Path) -> None:
    moments = random.Random(1)
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    at_steps = sorted(moments.sample(range(1, NUM_STEPS - 40), len(signals)))
    step = 0
    for number, at_step in zip(signals, at_steps, strict=True):
        with Command(folder, module=SAVING_OFTEN) as command:
            command.wait_for_step(max(at_step, step + 1))
            command.kill(number)
            assert command.wait() == (-number if number == signal.SIGKILL else 130)
            assert not step or f"train: continuing after step {step}\n" in command.printed
            step = saved_steps(folder)
            told = re.findall("^train: interrupted after step (.*); rerun to continue$", command.printed, re.MULTILINE)
            assert told == ([] if number == signal.SIGKILL else [str(step)])
            assert "Traceback" not in command.printed
        assert {name for name in read_results(folder) if not name.endswith(".tmp")} == {find_state(folder).name}
    find_state(folder).with_name(f".{find_state(folder).name}.tmp").write_bytes(b"killed while it was wri")
    assert f"train: continuing after step {step}\n" in run(folder)
    assert read_results(folder) == read_results(reference)


def test_when_one_process_is_killed_or_asked_to_stop_all_end_and_the_run_continues(folder: Path, two_nodes: list[Path]) -> None:
    with Command(folder, torchrun(*TWO_PROCESSES), SAVING_OFTEN) as command:
        command.wait_for_step(20)
        command.kill(signal.SIGKILL, rank=1)
        assert command.wait() != 0
        assert command.printed.count("another process of this run is gone: ") == 1
        assert "stages/train.py" not in command.printed  # no traceback but torchrun's
    step = saved_steps(folder)
    with Command(folder, torchrun(*TWO_PROCESSES), SAVING_OFTEN) as command:
        command.wait_for_step(step + 10)
        command.kill(signal.SIGTERM, rank=1)
        assert command.wait() != 0
        assert command.printed.count(f"train: continuing after step {step}\n") == 1
        step = saved_steps(folder)
        assert re.findall("train: interrupted after step (.*); rerun to continue", command.printed) == [str(step)]
        assert "is gone" not in command.printed
    assert {name for name in read_results(folder) if not name.endswith(".tmp")} == {find_state(folder).name}
    assert run(folder, torchrun(*TWO_PROCESSES)).count(f"train: continuing after step {step}\n") == 1
    assert read_results(folder) == read_results(two_nodes[0])


def test_two_nodes_train_as_one_process_does_and_the_first_writes(two_nodes: list[Path], reference: Path) -> None:
    assert read_losses(two_nodes[0]) == pytest.approx(read_losses(reference), abs=1e-4)
    assert read_results(two_nodes[0]).keys() == RESULT_FILES
    assert not list_files(two_nodes[1] / "artifacts/train")


def test_when_the_first_node_is_gone_the_other_says_so_and_ends(nodes: list[Path]) -> None:
    with start_two_nodes(nodes, SAVING_OFTEN) as (first, second):
        first.wait_for_step(10)
        first.kill_launcher()
        first.kill(signal.SIGKILL)
        assert second.wait() != 0
        assert second.printed.count("another process of this run is gone: ") == 1
        assert "stages/train.py" not in second.printed
    assert saved_steps(nodes[0]) >= 10


def test_nodes_with_different_parameters_end_with_one_message(nodes: list[Path]) -> None:
    write_params(nodes[1], "train", optimizer={"matrix_lr": 0.03})
    with start_two_nodes(nodes) as commands:
        assert all(command.wait() != 0 for command in commands)
    printed = "".join(command.printed for command in commands)
    assert printed.count("train: expected the same params.yaml, seed and training text in every process, found ") == 1
    assert "need copies of params.yaml and artifacts/tokenize\n" in printed
    assert "is gone" not in printed
    assert not any(read_results(folder) for folder in nodes)


def fill_disk_for(name: str) -> None:
    RESULT.mkdir(parents=True, exist_ok=True)
    (RESULT / f".{name}.tmp").symlink_to("/dev/full")


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "loss.csv", "metrics.json"])
def test_when_there_is_room_again_what_was_trained_is_written(here: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                              capsys: pytest.CaptureFixture[str]) -> None:
    train.main(SEED)
    expected = read_results(here)
    shutil.rmtree(RESULT)
    fill_disk_for(name)
    with pytest.raises(OSError, match=re.escape(f"cannot be written (No space left on device); make room and rerun: '{RESULT / name}'")):
        train.main(SEED)
    written = read_results(here)
    state = find_state(here).name
    assert written.items() - {(state, written[state])} < expected.items()
    assert name not in written
    with monkeypatch.context() as patch:
        patch.delattr(Run, "step")  # none is needed
        capsys.readouterr()
        train.main(SEED)
    assert f"train: continuing after step {FEW_STEPS}\n" in capsys.readouterr().err
    assert read_results(here) == expected


def test_a_disk_without_any_room_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"make room and rerun: '.*/checkpoint\.safetensors'"):
        train.main(SEED)
    assert re.search(rf"after step {FEW_STEPS} was not saved, an earlier one is kept: .*make room and rerun: '.*/resume-.*\.pt'",
                     capsys.readouterr().err)
    assert not read_results(here)


@pytest.mark.parametrize(("learning_rate", "num_steps", "step", "kept"), [
    (1e35, FEW_STEPS, 2, {1}), (1e38, FEW_STEPS, 1, set()), (1e38, 1, 1, set())])
def test_a_run_that_diverges_names_the_step_and_keeps_finite_weights(here: Path, learning_rate: float, num_steps: int, step: int,
                                                                     kept: set[int]) -> None:
    names = ("matrix_lr", "embedding_lr", "vector_lr", "head_lr")
    write_params(here, "train", budget_steps=num_steps, optimizer=dict.fromkeys(names, learning_rate), averaging={"select": "raw"})
    with pytest.raises(TrainingError, match=rf"^train: step {step}: expected .*, found .*; lower the learning rates .* and rerun"):
        train.main(SEED)
    states = [load_resume(RESULT / name) for name in read_results(here)]
    assert {state["num_steps"] for state in states if state} == kept
    assert all(state["weights"].isfinite().all() for state in states if state)


def test_an_average_that_was_not_made_costs_no_training(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = [[0, FEW_STEPS]]  # that of a run by seconds, of which nobody knows beforehand whether snapshots will be taken
    write_params(here, "train", budget_steps=plan, averaging={"select": "raw", "swa_every_steps": 1000})
    train.main(SEED)
    expected = read_results(here)
    shutil.rmtree(RESULT)
    write_params(here, "train", budget_steps=plan, averaging={"select": "swa", "swa_every_steps": 1000})
    with pytest.raises(ValueError, match=r"^train\.averaging\.select: expected one of raw, ema, found swa; no snapshot was taken"):
        train.main(SEED)
    assert read_results(here).keys() == {find_state(here).name}
    monkeypatch.delattr(Run, "step")
    write_params(here, "train", budget_steps=plan, averaging={"select": "raw", "swa_every_steps": 1000})
    train.main(SEED)
    assert read_results(here) == expected


def test_a_run_by_seconds_keeps_to_them_and_is_repeated_by_its_metrics(here: Path) -> None:
    write_params(here, "train", budget_steps=None, budget_seconds=1.5)
    train.main(SEED)
    assert read_timing(here)["seconds"] <= 1.5 + 1.0  # a step, on a machine that has much else to do
    expected, metrics = read_results(here), load_metrics(here / RESULT)
    assert metrics["num_steps"] > 10
    shutil.rmtree(RESULT)
    write_params(here, "train", budget_steps=metrics["budget_steps"])
    train.main(SEED)
    assert read_results(here) == expected


def test_the_held_out_curve_ends_with_the_score_of_the_raw_weights(here: Path) -> None:
    write_params(here, "train", budget_steps=FEW_STEPS, heldout_curve={"every_steps": 5, "tokens": 10**6})
    train.main(SEED)
    rows = [line.split(",") for line in (RESULT / "heldout.csv").read_text().splitlines()]
    assert rows[0] == ["tokens", "loss", "bpb"] and [row[0] for row in rows[1:]] == [str(64 * step) for step in (5, 10, 12)]
    assert float(rows[-1][2]) == pytest.approx(load_metrics(here / RESULT)["heldout_bpb_raw"], abs=1e-6)


def alter(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


ANEW = ".*; `dvc repro -f tokenize` makes it anew"
DATA_PROBLEMS: dict[str, tuple[Callable[[], object], str]] = {
    "altered": (lambda: alter(SHARD, 2000), r"train_000001\.bin: expected SHA-256 .*, found .*; the file was altered" + ANEW),
    "header": (lambda: alter(SHARD, 0), r"train_000001\.bin: expected a header of magic .*, found" + ANEW),
    "truncated": (lambda: truncate(SHARD), r"train_000001\.bin: expected 4024 bytes .*, found 2012" + ANEW),
    "shard": (SHARD.unlink, r"train_000001\.bin: no such file, but split\.json lists it" + ANEW),
    "split": ((TOKENIZE_FOLDER / "heldout/split.json").unlink, r"heldout/split\.json: no such file; `dvc repro` makes it"),
    "tokenizer": (TOKENIZER.unlink, r"tokenizer\.model: no such file; expected a SentencePiece model"),
    "tokenizer truncated": (lambda: truncate(TOKENIZER), r"tokenizer\.model: not a SentencePiece model"),
}


@pytest.mark.parametrize("problem", DATA_PROBLEMS)
def test_data_that_is_damaged_is_named_before_anything_is_trained(here: Path, problem: str) -> None:
    damage, message = DATA_PROBLEMS[problem]
    damage()
    with pytest.raises(ArtifactError, match="^artifacts/tokenize/.*" + message):
        train.main(SEED)
    assert not (here / "artifacts/train").exists()


PARAMETER_PROBLEMS = {
    "model.vocab_size=301": r"train/split\.json: expected .* vocabulary of 301, found 300; set model\.vocab_size to tokenize\.vocab_size",
    "model.bos_id=2": r"tokenizer\.model: expected BOS token 2 .* model\.bos_id, found 1; set model\.bos_id to it",
    "model.num_heads=3": r"params\.yaml: model\.num_heads: expected a divisor of model_dim 16, found 3",
    "model.rope_dims=2": r"params\.yaml: model\.rope_dims: expected an even number from 4 to the head dimension 8, found 2",
    "model.rope_dims=10": r"params\.yaml: model\.rope_dims: expected an even number from 4 to the head dimension 8, found 10",
    "model.attention=flash3": r"model\.attention: expected .*, found flash3, which needs .*; .*set model\.attention to auto or sdpa",
    "train.batch_sequences=1000": r"train\.batch_sequences: 1000 sequences of train\.sequence_tokens 16 tokens .*, found \d+\. Enlarge",
    "train.row_tokens=5000": r"train\.batch_sequences: 4 sequences of train\.row_tokens 5000 tokens in train, found 0\. Enlarge",
    "train.sequence_tokens=5000": r"train\.sequence_tokens 5000 tokens in train, found 0; .*; quantize: 5001 tokens in heldout",
    "train.sequence_tokens=9223372036854775808": r"params\.yaml: train\.sequence_tokens: expected a number below 9\d+, found",
    "calibrate.num_sequences=1000": r"expected splits .*: calibrate\.num_sequences 1000, twice: 2000 sequences .*, found \d+\. Enlarge",
}


@pytest.mark.parametrize("problem", PARAMETER_PROBLEMS)
def test_parameters_that_do_not_fit_are_named_before_anything_is_trained(here: Path, problem: str) -> None:
    section, key, value = re.split(r"[.=]", problem)
    write_params(here, section, **{key: int(value) if value.isdigit() else value})
    with pytest.raises(ValueError, match=PARAMETER_PROBLEMS[problem]) as stopped:
        train.main(SEED)
    assert "\n" not in str(stopped.value)
    assert not (here / "artifacts/train").exists()


@pytest.mark.parametrize("damage", [truncate, lambda path: path.write_bytes(b""), lambda path: path.write_bytes(b"PK\3\4 no state"),
                                    lambda path: alter(path, path.stat().st_size // 2)],
                         ids=["truncated", "empty", "of another format", "altered"])
def test_a_state_that_is_damaged_is_named_and_kept(here: Path, damage: Callable[[Path], object]) -> None:
    fill_disk_for("checkpoint.safetensors")
    with pytest.raises(OSError):
        train.main(SEED)
    damage(find_state(here))
    before = read_results(here)
    with pytest.raises(ArtifactError, match=r"^artifacts/train/seed7/resume-.*: expected the state .*, found .*; delete it to start from"):
        train.main(SEED)
    assert read_results(here) == before
    find_state(here).unlink()
    train.main(SEED)
    assert read_results(here).keys() == RESULT_FILES


def test_parameters_that_no_process_can_use_are_named_once(folder: Path) -> None:
    write_params(folder, "model", rope_dims=10)
    with Command(folder, torchrun(*TWO_PROCESSES)) as command:
        assert command.wait() != 0
        assert command.printed.count("params.yaml: model.rope_dims: expected an even number") == 1
    assert not list_files(folder / "artifacts/train")


def test_one_process_ends_with_the_error_as_its_last_line(folder: Path) -> None:
    (folder / RESULT).mkdir(parents=True)
    (folder / RESULT / ".checkpoint.safetensors.tmp").symlink_to("/dev/full")
    with Command(folder) as command:
        assert command.wait() == 1
        assert command.printed.splitlines()[-1] == (
            f"{RESULT / 'checkpoint.safetensors'}: cannot be written (No space left on device); make room and rerun")
        assert "Traceback" not in command.printed
    assert read_results(folder).keys() == {find_state(folder).name}
    assert saved_steps(folder) == NUM_STEPS


@pytest.mark.skipif(not landlock(), reason="Landlock cannot be used here")
def test_the_confined_stage_works_and_cannot_read_the_validation_text(folder: Path) -> None:
    write_params(folder, "train", budget_steps=FEW_STEPS)
    check_confined(folder, "train", SEED, "train")
    assert read_results(folder).keys() == RESULT_FILES
