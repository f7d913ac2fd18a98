"""Checkpoints give back what was saved, and neutral values for what files from before do not have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError

GRID = {"below_lr": 0.5, "bits": {"mlp": 5}, "full_range": True, "clip_quantile": 0.9995, "floor": 1.0}
OLD_GRID = {"below_lr": 0.5, "bits": {"mlp": 5}}


def reload(path: Path, training: dict[str, Any]) -> Checkpoint:
    save_checkpoint(path, Checkpoint({"weight": torch.arange(3.0)}, {"num_layers": 1}, training))
    return load_checkpoint(path)


@pytest.mark.parametrize(("saved", "loaded"), [
    ({"sequence_tokens": 8, "qat": GRID, "calibration_seconds": 2.5}, {"sequence_tokens": 8, "qat": GRID, "calibration_seconds": 2.5}),
    ({"sequence_tokens": 8, "qat": None}, {"sequence_tokens": 8, "qat": None, "calibration_seconds": None}),
    ({"qat": OLD_GRID, "num_steps": 5, "selected": "ema"},
     {"qat": OLD_GRID | {"full_range": False, "clip_quantile": 1.0, "floor": 0.0}, "num_steps": 5, "selected": "ema",
      "calibration_seconds": None})])
def test_what_came_later_has_its_neutral_value(tmp_path: Path, saved: dict[str, Any], loaded: dict[str, Any]) -> None:
    checkpoint = reload(tmp_path / "checkpoint.safetensors", saved)
    assert (checkpoint.training, checkpoint.model) == (loaded, {"num_layers": 1})
    assert torch.equal(checkpoint.weights["weight"], torch.arange(3.0))


def test_unknown_keys_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors: training\.colour: unknown key; use the program that wrote the file"):
        reload(tmp_path / "checkpoint.safetensors", {"qat": None, "colour": "red"})
