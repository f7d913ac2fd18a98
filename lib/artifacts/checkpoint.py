"""The seam between train and what follows: float weights together with the configuration of the model they belong to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors

TRAINING = ("sequence_tokens", "num_steps", "selected", "qat", "calibration_seconds", "distillation_seconds", "imported", "imported_bytes",
            "imported_sha256")
NEUTRAL: dict[str, Any] = {"calibration_seconds": None, "qat.full_range": False, "qat.clip_quantile": 1.0, "qat.floor": 0.0}
"""Dotted keys of `Checkpoint.training` that came later -> what files from before, which do not have them, are taken to hold."""


@dataclass(frozen=True)
class Checkpoint:
    """A trained model.

    Attributes:
        weights: parameter name -> fp32 tensor of that parameter's shape.
        model: the model configuration, as in the section ``model`` of params.yaml.
        training: what later stages need of training: ``sequence_tokens``, ``num_steps``, ``selected``, ``qat`` (the grid of late
            quantization-aware training, or None), ``calibration_seconds`` (what its budget left for calibrate, or None) and
            ``distillation_seconds`` (what it left for ``quantize.distill``; not there if it has no limit).
            A model that was imported has, in place of the second and third, ``imported``, ``imported_bytes`` and ``imported_sha256``:
            name, size and checksum of the file.
    """

    weights: dict[str, torch.Tensor]
    model: dict[str, Any]
    training: dict[str, Any]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors; the same checkpoint gives the same bytes."""
    save_tensors(path, checkpoint.weights, {"model": checkpoint.model, "training": checkpoint.training})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors on the CPU, with `NEUTRAL` values for what it lacks of training.

    Raises:
        ArtifactError: missing, damaged, not a checkpoint, or one with keys that are not known here.
    """
    weights, metadata = load_tensors(path)
    try:
        checkpoint = Checkpoint(weights, metadata["model"], metadata["training"])
    except KeyError as error:
        raise ArtifactError(f"{path}: not a checkpoint (no {error}); `dvc repro -f` makes it anew") from None
    if unknown := sorted(checkpoint.training.keys() - set(TRAINING)):
        raise ArtifactError(f"{path}: training.{unknown[0]}: unknown key; use the program that wrote the file, or make it anew")
    for key, value in NEUTRAL.items():
        _set_missing(checkpoint.training, key.split("."), value)
    return checkpoint


def _set_missing(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a key of nested mappings that is not there; a mapping around it that is None or missing stays so."""
    if len(path) == 1:
        values.setdefault(path[0], value)
    elif isinstance(inner := values.get(path[0]), dict):
        _set_missing(inner, path[1:], value)
