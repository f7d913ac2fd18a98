"""The submitted program, as others run it: an empty folder, no repository, the scores that evaluate found."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import write_bytes, write_json
from lib.artifacts.metrics import load_metrics
from lib.params import SECTIONS
from lib.reporting.strategy_table import format_strategies
from lib.submission.bundle import make_bundle
from stages import evaluate
from tests.evaluation.tiny import EVALUATE
from tests.stages.scored import write_scored

ROOT = Path(__file__).resolve().parents[2]
TOKENIZE, ARTIFACT = Path("artifacts/tokenize"), Path("artifacts/compress/seed3/model.ptz")
SETTINGS: dict[str, Any] = EVALUATE | {"audit": False, "strategies": ["plain", "score_first", "lora"], "strategy": "lora"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a finished evaluation, and its figures."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | {"evaluate": SETTINGS})  # JSON is YAML
        write_scored(ARTIFACT)
        evaluate.main(3)
        return folder, load_metrics(Path("artifacts/evaluate/seed3"))


@pytest.fixture
def folder(tmp_path: Path, project: tuple[Path, dict[str, Any]]) -> Path:
    """The files of a submission, and below ``data`` the validation shards as the challenge names them."""
    folder = tmp_path / "submission"
    folder.mkdir()
    write_bytes(folder / "train_gpt.py", make_bundle(SETTINGS, ROOT))
    shutil.copy(project[0] / ARTIFACT, folder)
    shutil.copy(project[0] / TOKENIZE / "tokenizer.model", folder)
    for path in (project[0] / TOKENIZE / "val").glob("*.bin"):
        write_bytes(tmp_path / "data" / f"fineweb_{path.name}", path.read_bytes())
    return folder


def run(folder: Path, *command: str, status: int = 0) -> str:
    """What a command prints, of a successful one stdout, and nothing but notes and progress on stderr; nothing of the environment leads
    to the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-I", *command], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == status, result.stderr
    if status:
        return result.stderr
    assert [line for line in result.stderr.splitlines() if not re.match(r"(score_first|lora) trains |evaluate: |$", line)] == []
    return result.stdout


def figures(output: str) -> dict[str, str]:
    return dict(line.split(": ") for line in output.splitlines() if line.startswith("val_"))


def test_it_prints_the_digits_of_evaluate(project: tuple[Path, dict[str, Any]], folder: Path) -> None:
    metrics = project[1]
    output = run(folder, "train_gpt.py", "--data", str(project[0] / TOKENIZE / "val"))
    assert figures(output) == {key: f"{metrics[key]:.8f}" for key in ("val_loss", "val_bpb")}
    lines = output.splitlines()
    assert all(found.startswith(expected) for found, expected in zip(lines, format_strategies([metrics]).splitlines(), strict=False))
    assert f"{metrics['num_bytes']:,} bytes in {metrics['num_tokens']:,} tokens and {metrics['num_documents']:,} documents" in output
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "model.ptz", "tokenizer.model"}


def test_it_takes_plain_shards_and_other_files_by_name(project: tuple[Path, dict[str, Any]], folder: Path) -> None:
    (folder / "model.ptz").rename(folder.parent / "other.ptz")
    output = run(folder.parent, "submission/train_gpt.py", "--data", "data", "--artifact", "other.ptz")
    assert figures(output)["val_bpb"] == f"{project[1]['val_bpb']:.8f}"


def test_two_processes_print_one_result(project: tuple[Path, dict[str, Any]], folder: Path) -> None:
    output = run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py", "--data", "../data")
    assert output.count("val_bpb") == 1
    assert float(figures(output)["val_bpb"]) == pytest.approx(project[1]["val_bpb"], abs=1e-5)


def test_it_keeps_to_its_time_limit_and_says_so_in_a_line(folder: Path) -> None:
    write_bytes(folder / "train_gpt.py", make_bundle(SETTINGS | {"limit_seconds": 1e-3}, ROOT))
    error = run(folder, "train_gpt.py", "--data", "../data", status=1)
    assert error.splitlines()[-1].startswith("evaluate.limit_seconds: expected at most 0.001 s")
    assert "Traceback" not in error
