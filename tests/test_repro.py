"""The pipeline as a user runs it: `dvc repro` in a clone, tiny parameters, real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import read_csv
from tests.clone import CODE_BYTES, SEED, TINY, Clone

pytestmark = pytest.mark.xdist_group("repro")  # one clone for all tests of this file

METRIC_KEYS = {
    "train": {"heldout_bpb", "num_parameters", "num_steps"},
    "quantize": {"heldout_bpb", "heldout_bpb_float", "heldout_kl", "heldout_loss_increase", "heldout_tokens", "entropy_bits", "coded_bits",
                 "relative_error", "relative_error_rtn", "predicted_loss"},
    "compress": {"artifact_bytes", "code_bytes", "blob_bytes", "limit_bytes"},
    "evaluate": {"val_loss", "val_bpb", "strategy", "plain_bpb", "sliding_bpb", "score_first_bpb", "lora_bpb", "num_tokens", "num_bytes",
                 "num_documents"},
}


def metrics_of(clone: Clone) -> dict[str, dict[str, Any]]:
    """Figures by stage."""
    return {stage: json.loads((clone.folder / f"artifacts/{stage}/seed{SEED}/metrics.json").read_text()) for stage in METRIC_KEYS}


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """A clone whose environment was moved: console scripts name a Python that is gone."""
    made = Clone(tmp_path_factory.mktemp("clone"))
    scripts = made.folder / ".venv/bin"
    scripts.mkdir(parents=True)
    for name in ("dvc", "torchrun", "ruff", "mypy", "pytest"):
        (scripts / name).write_text("#!/gone/python\n")
        (scripts / name).chmod(0o755)
    (scripts.parent / "installed").touch()  # so that make uses this environment, and python from where it is
    made.environment["PATH"] = f"{scripts}:{made.environment['PATH']}"
    assert made.repro() == {"tokenize", "train", "calibrate", "quantize", "compress", "evaluate", "report"}
    return made


def test_every_stage_writes_its_figures(clone: Clone) -> None:
    metrics = metrics_of(clone)
    for stage, keys in METRIC_KEYS.items():
        assert keys <= metrics[stage].keys(), stage
        assert json.loads((clone.folder / f"artifacts/{stage}/seed{SEED}/timing.json").read_text())["seconds"] > 0
    assert metrics["compress"]["artifact_bytes"] == metrics["compress"]["code_bytes"] + metrics["compress"]["blob_bytes"]
    target = clone.params["quantize"]["target_bytes"]
    assert 0.99 * target <= metrics["compress"]["blob_bytes"] + CODE_BYTES <= target
    assert metrics["compress"]["blob_bytes"] == (clone.folder / f"artifacts/compress/seed{SEED}/model.ptz").stat().st_size
    assert (clone.folder / "artifacts/report/report.html").stat().st_size > 1000
    shown = clone.run("python", "-m", "dvc", "metrics", "show", "--md")
    assert "tokens_per_second" in shown
    assert "environment" not in shown  # a list, which DVC passes over


def test_the_submission_repeats_the_score_in_another_place(clone: Clone, tmp_path: Path) -> None:
    metrics = metrics_of(clone)
    submission = shutil.copytree(clone.folder / "artifacts/report/submission", tmp_path / "submission")
    assert (submission / "train_gpt.py").stat().st_size == metrics["compress"]["code_bytes"]
    assert json.loads((submission / "submission.json").read_text())["val_bpb"] == metrics["evaluate"]["val_bpb"]
    command, environment = [sys.executable, "-I", "train_gpt.py", "--score"], {"DATA_PATH": str(clone.folder / "artifacts/tokenize")}
    output = subprocess.run(command, cwd=submission, env=clone.environment | environment, capture_output=True, text=True, check=True).stdout
    assert output.endswith(f"\nval_bpb: {metrics['evaluate']['val_bpb']:.8f}\n")
    assert output.splitlines()[-1] in (submission / "README.md").read_text().splitlines()


def test_make_repro_ends_with_the_results_and_where_the_report_is_or_with_the_error(clone: Clone) -> None:
    printed = clone.run("make", "repro")
    assert printed.splitlines()[-1] == "report: artifacts/report/report.html"
    assert f"{metrics_of(clone)['evaluate']['val_bpb']:.4f}" in printed
    assert (clone.folder / printed.split()[-1]).is_file()
    assert "report:" not in clone.run("make", "repro", "ARGS=tokenize")  # the report may be older
    clone.change({"quantize": {"target_bytes": 1000}})
    result = subprocess.run(["make", "repro"], cwd=clone.folder, env=clone.environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "report:" not in result.stdout
    assert "quantize.target_bytes" in result.stderr
    clone.change({"quantize": {"target_bytes": TINY["quantize"]["target_bytes"]}})
    assert clone.repro() == set()


def test_an_output_that_is_edited_in_place_is_made_good_from_the_cache(clone: Clone) -> None:
    """The cache has copies, or reflinks; through a hard link the edit would be in both, and handed out as good from then on."""
    outputs = [next((clone.folder / "artifacts/tokenize/train").glob("*.bin")), clone.folder / f"artifacts/compress/seed{SEED}/model.ptz"]
    before = [path.read_bytes() for path in outputs]
    for path in outputs:
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.write(b"damage")
    assert [path.read_bytes() for path in outputs] != before
    clone.run("python", "-m", "dvc", "checkout", "--force")
    assert [path.read_bytes() for path in outputs] == before


def test_only_what_depends_on_a_change_runs_again_and_going_back_restores(clone: Clone) -> None:
    original, lock = metrics_of(clone), clone.lock()
    assert clone.repro() == set()
    clone.change({"evaluate": {"stride_tokens": 8}})
    assert clone.repro() == {"evaluate", "report"}
    clone.change({"evaluate": {"stride_tokens": 16}, "quantize": {"bits": {"mlp": 4}}})
    assert clone.repro() == {"quantize", "compress", "evaluate", "report"}
    assert metrics_of(clone)["quantize"]["heldout_bpb"] != original["quantize"]["heldout_bpb"]
    assert metrics_of(clone)["train"] == original["train"]
    clone.change({"quantize": {"bits": {"mlp": "free"}}})
    assert clone.repro() == set()
    assert (metrics_of(clone), clone.lock()) == (original, lock)


def test_a_report_alone_refuses_results_of_other_settings(clone: Clone) -> None:
    clone.change({"evaluate": {"stride_tokens": 8}})
    command = ("python", "-m", "dvc", "repro", "--single-item", "report")
    result = subprocess.run(command, cwd=clone.folder, env=clone.environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"evaluate@{SEED}: evaluate.stride_tokens: expected 8 as in params.yaml, found 16 in dvc.lock" in result.stderr
    clone.change({"evaluate": {"stride_tokens": 16}})
    assert clone.repro() == set()


def test_a_sweep_is_one_experiment_per_size_and_leaves_the_workspace_alone(clone: Clone) -> None:
    before, params = metrics_of(clone), (clone.folder / "params.yaml").read_text()
    targets = [clone.params["quantize"]["target_bytes"] - 4000]
    clone.run(sys.executable, "-m", "tools.sweep", *map(str, targets))
    rows = read_csv(clone.folder / "artifacts/sweep/sweep.csv", ["target_bytes", "artifact_bytes", "heldout_kl", "val_bpb"])
    assert [int(row["target_bytes"]) for row in rows] == targets
    for row, target in zip(rows, targets, strict=True):
        spare = CODE_BYTES - before["compress"]["code_bytes"]  # of what is reserved for the code
        assert 0.99 * target <= float(row["artifact_bytes"]) + spare <= target
    assert float(rows[0]["heldout_kl"]) > before["quantize"]["heldout_kl"]
    assert (metrics_of(clone), (clone.folder / "params.yaml").read_text()) == (before, params)
    assert set(clone.run("python", "-m", "dvc", "exp", "list", "--name-only").split()) >= {f"target-{target}" for target in targets}


def test_a_killed_training_continues_and_a_forced_run_gives_the_same_lock(clone: Clone) -> None:
    clone.change({"train": {"budget_steps": 400}})
    folder = clone.folder / f"artifacts/train/seed{SEED}"
    run = subprocess.Popen(["python", "-m", "dvc", "repro", "train"], cwd=clone.folder, env=clone.environment, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (states := list(folder.glob("resume-*.pt"))) and time.monotonic() < deadline:
        assert run.poll() is None, "training ended before it was killed"
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    assert states and states[0].exists()
    assert not (folder / "checkpoint.safetensors").exists()
    assert clone.repro("train") == {"train"}
    assert not list(folder.glob("resume-*"))
    lock = clone.lock()
    assert clone.repro("--force", "train") == {"tokenize", "train"}
    assert clone.lock() == lock
