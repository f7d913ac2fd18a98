"""Published files enter the pipeline as a user lets them: the commands that the import itself prints, in a clone."""

import json
import re
import shlex
import sys
from typing import Any

import pytest
import torch

from lib.artifacts.tokens import load_split
from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.distributed import SINGLE_CPU
from lib.evaluation.bpb import make_score
from lib.evaluation.heldout import window_losses
from lib.model.gpt import build_model
from tests.clone import Clone
from tests.published.published_files import State, dequantize, make_state, quantize_state, to_artifact, to_bytes, to_project, write

pytestmark = pytest.mark.xdist_group("imports")

CHECKPOINT, ARTIFACT = 585, 410  # seeds


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    """With tokens, and without any model."""
    made = Clone(tmp_path_factory.mktemp("clone"))
    made.change({"evaluate": {"strategies": ["plain"], "strategy": "plain", "audit": True, "tilt": None}})
    assert made.repro("tokenize") == {"tokenize"}
    return made


def make_weights(clone: Clone) -> State:
    return {name: 0.1 * tensor for name, tensor in make_state(clone.params["model"]).items()}


def read_metrics(clone: Clone, stage: str, seed: int) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((clone.folder / f"artifacts/{stage}/seed{seed}/metrics.json").read_text())
    return metrics


def import_file(clone: Clone, name: str, content: bytes, seed: int) -> list[str]:
    """Import a file for the only seed; returns the commands that are to follow."""
    clone.change({"seeds": [seed]})
    write(clone.folder / name, content)
    text = clone.run(sys.executable, "-m", "tools.import_published", name, "--seed", str(seed))
    return re.findall(r"(?m)^  (.+)$", text)


def test_a_checkpoint_goes_on_to_the_report_without_training(clone: Clone) -> None:
    state = make_weights(clone)
    commit, repro = import_file(clone, "final_model.pt", to_bytes(state), CHECKPOINT)
    assert repro == "make repro"
    clone.run(*shlex.split(commit))
    assert clone.repro() == {"calibrate", "quantize", "compress", "evaluate", "report"}
    assert clone.repro() == set()
    assert read_metrics(clone, "train", CHECKPOINT)["imported"] == "final_model.pt"
    assert "was not trained here, but imported: `final_model.pt`" in (clone.folder / "artifacts/report/submission/README.md").read_text()
    assert "final_model.pt" in (clone.folder / "artifacts/report/report.html").read_text()
    figures = read_metrics(clone, "quantize", CHECKPOINT)
    assert figures["heldout_bpb"] == pytest.approx(figures["heldout_bpb_float"], abs=0.01)
    assert load_artifact(clone.folder / f"artifacts/compress/seed{CHECKPOINT}/model.ptz").training.imported == "final_model.pt"


def test_an_artifact_is_scored_and_audited_as_published(clone: Clone) -> None:
    tensors, kinds = quantize_state(make_weights(clone))
    repro, summary, audit = import_file(clone, "final_model.int6.ptz", to_artifact(tensors, kinds), ARTIFACT)
    assert repro.startswith("dvc repro ") and audit == "make audit"
    assert clone.repro(*shlex.split(repro)[2:]) == {"compress", "evaluate"}
    shown = clone.run(*shlex.split(summary))
    score = f"{read_metrics(clone, 'evaluate', ARTIFACT)['val_bpb']:.4f}"
    assert re.search(rf"validation bpb \(val_bpb\) +{score} ", shown) and "audit: legal" in shown and "final_model.int6.ptz" in shown
    assert clone.run(sys.executable, "-m", "tools.audit").rstrip().endswith("\nlegal")

    blob = clone.folder / f"artifacts/compress/seed{ARTIFACT}/model.ptz"
    artifact, weights = load_artifact(blob), to_project(dequantize(tensors, kinds), clone.params["model"])
    assert all(torch.equal(weight, weights[name]) for name, weight in artifact.weights().items())
    text = clone.run(sys.executable, "-m", "tools.inspect", str(blob))
    assert 'imported "final_model.int6.ptz"' in text and "float32" in text
    tokens = load_split(clone.folder / "artifacts/tokenize/val", 512).tokens()
    nats = window_losses(build_model(artifact.model, weights), tokens, window_tokens=32, batch_windows=256, precision="fp32",
                       process=SINGLE_CPU)
    tokenizer = load_tokenizer(clone.folder / "artifacts/tokenize/tokenizer.model")
    expected = make_score(nats, tokenizer.target_bytes(tokens)).bpb
    assert read_metrics(clone, "evaluate", ARTIFACT)["plain_bpb"] == round(expected, 8)
