"""The seam between train and what follows: float weights together with the configuration of the model they belong to."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors
from lib.problems import describe_problem, show


class _Stored(BaseModel):
    """What is stored with weights. Keys that came later have the value that files from before, which lack them, are taken to hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TrainedGrid(_Stored):
    """The grid of late quantization-aware training, section ``train.qat``."""

    below_lr: float
    bits: dict[str, int]
    full_range: bool = False
    clip_quantile: float = 1.0
    floor: float = 0.0


class Training(_Stored):
    """What later stages need of training; None is what does not apply."""

    sequence_tokens: int
    """Length of the sequences, in tokens."""
    num_steps: int | None = None
    selected: str | None = None
    """Which average of the weights was taken."""
    qat: TrainedGrid | None = None
    calibration_seconds: float | None = None
    """What the budget of training left for calibrate; None if it has no limit."""
    distillation_seconds: float | None = None
    """The same for distillation."""
    imported: str | None = None
    """Name of the file that the model was imported from, with its size and checksum:"""
    imported_bytes: int | None = None
    imported_sha256: str | None = None

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    @classmethod
    def parse(cls, values: Any, where: str) -> "Training":
        """What `model_dump` gave.

        Raises:
            ArtifactError: other keys or values; the message begins with `where`.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            what = describe_problem(problem)
            found = f", found {show(problem['input'])}" if what.startswith("expected") else ""
            raise ArtifactError(f"{where}: {'.'.join(map(str, ('training', *problem['loc'])))}: {what}{found}; use the program that wrote "
                                "the file, or make it anew") from None


@dataclass(frozen=True)
class Checkpoint:
    """A trained model.

    Attributes:
        weights: parameter name -> fp32 tensor of that parameter's shape.
        model: the model configuration, as in the section ``model`` of params.yaml.
        training: how it was trained, or where it was imported from.
    """

    weights: dict[str, torch.Tensor]
    model: dict[str, Any]
    training: Training


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint as safetensors; the same checkpoint gives the same bytes."""
    save_tensors(path, checkpoint.weights, {"model": checkpoint.model, "training": checkpoint.training.model_dump()})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, not a checkpoint, or one with keys that are not known here.
    """
    weights, metadata = load_tensors(path)
    try:
        return Checkpoint(weights, metadata["model"], Training.parse(metadata["training"], str(path)))
    except KeyError as error:
        raise ArtifactError(f"{path}: not a checkpoint (no {error}); `dvc repro -f` makes it anew") from None
