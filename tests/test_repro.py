"""The pipeline as a user runs it: `dvc repro` in a clone, tiny parameters, real processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.artifacts.files import read_csv
from lib.compression.code_size import code_bytes
from tests.evaluation.tiny import STRATEGIES

pytestmark = pytest.mark.xdist_group("repro")  # one clone for all tests of this file

ROOT = Path(__file__).parents[1]
SEED = 3
TINY: dict[str, Any] = {
    "seeds": [SEED],
    "model": {"vocab_size": 512, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 64,
              "rope_dims": 8, "num_xsa_layers": 1, "bigram_rows": 64, "bigram_dim": 8, "value_embedding_dim": 8,
              "value_embedding_layers": [1]},
    "tokenize": {"source": "jsonl", "path": "documents.jsonl", "vocab_size": 512, "heldout_fraction": 0.1, "val_fraction": 0.1,
                 "tokenizer_training_bytes": 100000, "shard_tokens": 20000, "min_document_bytes": 0},
    "train": {"budget_steps": 40, "sequence_tokens": 32, "batch_sequences": 4, "averaging": {"swa_every_steps": 5}},
    "calibrate": {"num_sequences": 8, "num_gradient_sequences": 4},
    "quantize": {"target_bytes": code_bytes(Path("stages/evaluate.py"), ROOT) + 20_000},
    "evaluate": {"strategies": list(STRATEGIES), "window_tokens": 32, "stride_tokens": 16, "segment_tokens": 128,
                 "score_first": {"chunk_tokens": 512, "epochs": 1, "trainable": ["last_1_blocks"]},
                 "lora": {"window_tokens": 32, "chunk_tokens": 16}, "phased": {"documents": 8},
                 "two_phase": {"recalibration": {"epochs": 1}, "selective": {"epochs": 1}}},
}
METRIC_KEYS = {
    "train": {"heldout_bpb", "num_parameters", "num_steps"},
    "quantize": {"heldout_bpb", "heldout_bpb_float", "heldout_kl", "heldout_loss_increase", "heldout_tokens", "entropy_bits", "coded_bits",
                 "relative_error", "relative_error_rtn", "predicted_loss"},
    "compress": {"artifact_bytes", "code_bytes", "blob_bytes", "limit_bytes"},
    "evaluate": {"val_loss", "val_bpb", "strategy", "plain_bpb", "sliding_bpb", "one_pass_bpb", "score_first_bpb", "lora_bpb", "phased_bpb",
                 "two_phase_transductive_bpb", "two_phase_legal", "num_tokens", "num_bytes", "num_documents"},
}


class Clone:
    """A copy of this project, as a git repository of its own, with tiny parameters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        listing = self.run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", ".", ":!artifacts")
        for name in listing.split():
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        words = (ROOT / "lib/training/loop.py").read_text().split()
        documents = ({"text": " ".join(words[n:n + 40] + words[:n % 7])} for n in range(0, len(words) - 40, 3))
        (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        self.params: dict[str, Any] = YAML(typ="safe", pure=True).load(folder / "params.yaml")
        self.change(TINY)
        self.run("git", "init", "--quiet")
        self.run("git", "add", "--all")
        self.run("git", "-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", "tiny")

    def change(self, changes: dict[str, Any]) -> None:
        """Merge `changes` into params.yaml."""
        def merge(old: Any, new: Any) -> Any:
            return {**old, **{key: merge(old[key], value) for key, value in new.items()}} if isinstance(new, dict) else new

        self.params = merge(self.params, changes)
        YAML(typ="safe", pure=True).dump(self.params, self.folder / "params.yaml")

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro` and return the stages that really ran (not those restored from the cache)."""
        output = self.run("dvc", "repro", *arguments)
        return {name.split("@")[0] for name in re.findall(r"Running stage '(.+?)'", output)}

    def metrics(self) -> dict[str, dict[str, Any]]:
        """Figures by stage."""
        return {stage: json.loads((self.folder / f"artifacts/{stage}/seed{SEED}/metrics.json").read_text()) for stage in METRIC_KEYS}

    def lock(self) -> Any:
        """What dvc.lock says."""
        return YAML(typ="safe", pure=True).load(self.folder / "dvc.lock")

    def run(self, *command: str) -> str:
        """What a command prints; it must succeed."""
        result = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    made = Clone(tmp_path_factory.mktemp("clone"))
    assert made.repro() == {"tokenize", "train", "calibrate", "quantize", "compress", "evaluate", "report"}
    return made


def test_every_stage_writes_its_figures(clone: Clone) -> None:
    metrics = clone.metrics()
    for stage, keys in METRIC_KEYS.items():
        assert keys <= metrics[stage].keys(), stage
        assert json.loads((clone.folder / f"artifacts/{stage}/seed{SEED}/timing.json").read_text())["seconds"] > 0
    assert metrics["compress"]["artifact_bytes"] == metrics["compress"]["code_bytes"] + metrics["compress"]["blob_bytes"]
    target = clone.params["quantize"]["target_bytes"]
    assert 0.99 * target <= metrics["compress"]["artifact_bytes"] <= target
    assert metrics["compress"]["blob_bytes"] == (clone.folder / f"artifacts/compress/seed{SEED}/model.ptz").stat().st_size
    assert (clone.folder / "artifacts/report/report.html").stat().st_size > 1000


def test_outputs_are_stored_once(clone: Clone) -> None:
    """In the workspace and in DVC's cache by one hard link each, so that 16 GB of shards take 16 GB."""
    outputs = [*(clone.folder / "artifacts/tokenize/train").iterdir(), clone.folder / f"artifacts/compress/seed{SEED}/model.ptz"]
    assert {path.stat().st_nlink for path in outputs} == {2}


def test_only_what_depends_on_a_change_runs_again_and_going_back_restores(clone: Clone) -> None:
    original, lock = clone.metrics(), clone.lock()
    assert clone.repro() == set()
    clone.change({"evaluate": {"stride_tokens": 8}})
    assert clone.repro() == {"evaluate", "report"}
    clone.change({"evaluate": {"stride_tokens": 16}, "quantize": {"bits": {"mlp": 4}}})
    assert clone.repro() == {"quantize", "compress", "evaluate", "report"}
    assert clone.metrics()["quantize"]["heldout_bpb"] != original["quantize"]["heldout_bpb"]
    assert clone.metrics()["train"] == original["train"]
    clone.change({"quantize": {"bits": {"mlp": "free"}}})
    assert clone.repro() == set()
    assert (clone.metrics(), clone.lock()) == (original, lock)


def test_a_sweep_is_one_experiment_per_size_and_leaves_the_workspace_alone(clone: Clone) -> None:
    before, params = clone.metrics(), (clone.folder / "params.yaml").read_text()
    targets = [clone.params["quantize"]["target_bytes"] + more for more in (-4000, 2000)]
    clone.run(sys.executable, "-m", "lib.reporting.sweep", *map(str, targets))
    rows = read_csv(clone.folder / "artifacts/sweep/sweep.csv", ["target_bytes", "artifact_bytes", "heldout_kl", "val_bpb"])
    assert [int(row["target_bytes"]) for row in rows] == targets
    for row, target in zip(rows, targets, strict=True):
        assert 0.99 * target <= float(row["artifact_bytes"]) <= target
    assert float(rows[0]["heldout_kl"]) > before["quantize"]["heldout_kl"] > float(rows[1]["heldout_kl"])
    assert (clone.metrics(), (clone.folder / "params.yaml").read_text()) == (before, params)
    assert set(clone.run("dvc", "exp", "list", "--name-only").split()) >= {f"target-{target}" for target in targets}


def test_a_killed_training_continues_and_a_forced_run_gives_the_same_lock(clone: Clone) -> None:
    clone.change({"train": {"budget_steps": 400}})
    folder = clone.folder / f"artifacts/train/seed{SEED}"
    run = subprocess.Popen(["dvc", "repro", "train"], cwd=clone.folder, env=clone.environment, stdout=subprocess.DEVNULL,
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
