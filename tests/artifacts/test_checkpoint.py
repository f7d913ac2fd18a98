"""Checkpoints give back what was saved, and neutral values for what files from before do not have."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, TrainedGrid, Training, load_checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import save_tensors

GRID: dict[str, Any] = {"below_lr": 0.5, "bits": {"mlp": 5}, "full_range": True, "clip_quantile": 0.9995, "floor": 1.0}
OLD_GRID: dict[str, Any] = {"below_lr": 0.5, "bits": {"mlp": 5}}


def load(path: Path, training: dict[str, Any]) -> Checkpoint:
    """A file that holds these keys of training."""
    save_tensors(path, {"weight": torch.arange(3.0)}, {"model": {"num_layers": 1}, "training": training})
    return load_checkpoint(path)


@pytest.mark.parametrize(("saved", "loaded"), [
    ({"sequence_tokens": 8, "qat": GRID, "calibration_seconds": 2.5},
     Training(sequence_tokens=8, qat=TrainedGrid(**GRID), calibration_seconds=2.5)),
    ({"sequence_tokens": 8, "qat": None}, Training(sequence_tokens=8)),
    ({"sequence_tokens": 8, "qat": OLD_GRID, "num_steps": 5, "selected": "ema"}, Training(
        sequence_tokens=8, qat=TrainedGrid(**OLD_GRID, full_range=False, clip_quantile=1.0, floor=0.0), num_steps=5, selected="ema"))])
def test_what_came_later_has_its_neutral_value(tmp_path: Path, saved: dict[str, Any], loaded: Training) -> None:
    path = tmp_path / "checkpoint.safetensors"
    checkpoint = load(path, saved)
    assert (checkpoint.training, checkpoint.model) == (loaded, {"num_layers": 1})
    save_checkpoint(path, checkpoint)
    assert load_checkpoint(path).training == loaded
    assert torch.equal(checkpoint.weights["weight"], torch.arange(3.0))


def test_unknown_keys_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"checkpoint\.safetensors: training\.colour: unknown key; use the program that wrote the file"):
        load(tmp_path / "checkpoint.safetensors", {"sequence_tokens": 8, "colour": "red"})


@pytest.mark.parametrize(("training", "message"), [
    ({"sequence_tokens": "8"}, r'training\.sequence_tokens: expected a whole number, found "8"'),
    ({"sequence_tokens": 8, "selected": 3}, r"training\.selected: expected text, found 3"),
    ({"sequence_tokens": 8, "qat": GRID | {"bits": {"mlp": 5.5}}}, r"training\.qat\.bits\.mlp: expected a whole number, found 5\.5"),
    ({"sequence_tokens": 8, "qat": "x" * 99}, rf'training\.qat: expected keys with values, found "{"x" * 59}\.\.\.'),
    ({"num_steps": 5}, r"training\.sequence_tokens: missing"), ([], r"training: expected keys with values, found \[\]"),
])
def test_values_of_another_type_are_refused_in_one_plain_line(tmp_path: Path, training: Any, message: str) -> None:
    with pytest.raises(ArtifactError, match=rf"^[^\n]*checkpoint\.safetensors: {message}; use the program that wrote the file, or make it"):
        load(tmp_path / "checkpoint.safetensors", training)
