"""The seam between train and what follows: float weights together with the configuration of the model they belong to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors


@dataclass(frozen=True)
class Checkpoint:
    """A trained model.

    Attributes:
        weights: parameter name -> fp32 tensor of that parameter's shape.
        model: the model configuration, as in the section ``model`` of params.yaml.
        training: what later stages need of training: ``sequence_tokens``, ``num_steps``, ``selected``, ``qat`` (the grid of late
            quantization-aware training, or None) and ``calibration_seconds`` (what its budget left for calibrate, or None).
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
    """Read a checkpoint, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, or not a checkpoint.
    """
    weights, metadata = load_tensors(path)
    try:
        return Checkpoint(weights, metadata["model"], metadata["training"])
    except KeyError as error:
        raise ArtifactError(f"{path}: not a checkpoint (no {error}); `dvc repro -f` makes it anew") from None
