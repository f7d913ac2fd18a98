"""The seam between quantize and compress: integer codes and scales of the matrices, fp16 values of everything else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors

CODES, SCALES, VECTORS = "codes:", "scales:", "vectors:"
MIN_BITS, MAX_BITS = 2, 8  # of integer codes; -1, 0, 1 are the smallest symmetric grid, int8 the largest code


def clip_range(bits: int) -> int:
    """Largest code of a symmetric grid with `bits` bits: 15 for int5."""
    return int(2 ** (bits - 1) - 1)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Weights that codes stand for: (R, C) integers or integral floats, and (R,) fp16 -> (R, C) fp32."""
    return codes.to(torch.float32) * scales.to(torch.float32)[:, None]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix of R rows and C columns on a symmetric grid.

    Attributes:
        codes: (R, C) int8, within -clip_range(bits) .. clip_range(bits).
        scales: (R,) fp16, finite.
        bits: 2 to 8.
    """

    codes: Tensor
    scales: Tensor
    bits: int

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.ndim != 2:
            raise ArtifactError(f"codes: expected a matrix of int8, found {self.codes.dtype} of shape {tuple(self.codes.shape)}")
        if self.scales.dtype != torch.float16 or self.scales.shape != self.codes.shape[:1]:
            raise ArtifactError(f"scales: expected float16 of shape {tuple(self.codes.shape[:1])}, "
                                f"found {self.scales.dtype} of shape {tuple(self.scales.shape)}")
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ArtifactError(f"bits: expected {MIN_BITS} to {MAX_BITS}, found {self.bits}")
        limit = clip_range(self.bits)
        if self.codes.numel() and not -limit <= int(self.codes.min()) <= int(self.codes.max()) <= limit:
            raise ArtifactError(f"codes: expected -{limit} to {limit} with {self.bits} bits, "
                                f"found {int(self.codes.min())} to {int(self.codes.max())}")
        if not self.scales.isfinite().all():
            raise ArtifactError("scales: expected finite values")

    def weight(self) -> Tensor:
        """(R, C) fp32."""
        return dequantize(self.codes, self.scales)

    def entropy_bits(self) -> float:
        """Order-0 entropy of the codes in bits per weight, what an ideal coder with one table for the matrix needs; 0 if empty."""
        counts = torch.bincount(self.codes.flatten().int() + 128)
        probabilities = counts[counts > 0].double() / self.codes.numel()
        return float(-(probabilities * probabilities.log2()).sum())


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model as it is submitted.

    Attributes:
        model: the model configuration, as in the section ``model`` of params.yaml.
        training: as in `lib.artifacts.checkpoint.Checkpoint`.
        matrices: parameter name -> codes and scales.
        vectors: parameter name -> fp16 tensor of any shape: gains, scales and mixes, and matrices that stay at 16 bits.
    """

    model: dict[str, Any]
    training: dict[str, Any]
    matrices: dict[str, QuantizedTensor]
    vectors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> fp32 tensor, for all parameters."""
        matrices = {name: matrix.weight() for name, matrix in self.matrices.items()}
        return matrices | {name: vector.to(torch.float32) for name, vector in self.vectors.items()}


def save_quantized(path: Path, quantized: QuantizedModel) -> None:
    """Write a quantized model as safetensors; the same model gives the same bytes."""
    tensors = {VECTORS + name: vector for name, vector in quantized.vectors.items()}
    for name, matrix in quantized.matrices.items():
        tensors |= {CODES + name: matrix.codes, SCALES + name: matrix.scales}
    bits = {name: matrix.bits for name, matrix in quantized.matrices.items()}
    save_tensors(path, tensors, {"model": quantized.model, "training": quantized.training, "bits": bits})


def load_quantized(path: Path) -> QuantizedModel:
    """Read a quantized model, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, or not a quantized model.
    """
    tensors, metadata = load_tensors(path)
    try:
        matrices = {name: QuantizedTensor(tensors[CODES + name], tensors[SCALES + name], bits) for name, bits in metadata["bits"].items()}
        vectors = {name.removeprefix(VECTORS): tensor for name, tensor in tensors.items() if name.startswith(VECTORS)}
        return QuantizedModel(metadata["model"], metadata["training"], matrices, vectors)
    except KeyError as error:
        raise ArtifactError(f"{path}: not a quantized model (no {error}); `dvc repro -f` makes it anew") from None
