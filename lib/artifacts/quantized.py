"""The seam between quantize and compress: integer codes and log-scale exponents of the matrices, floats of everything else.

Shapes: R rows, C columns, k the rank of a correction. The weight that a code stands for is code * row scale * column scale; scales
are powers of 2 with exponents in units of 1/`OCTAVE`, so that the same file gives the same weights on every machine. Row scales that were
chosen elsewhere, in an imported model, are no such powers; they are kept as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Training
from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors

CODES, ROWS, COLUMNS, VECTORS = "codes:", "rows:", "columns:", "vectors:"
LEFT, RIGHT = ":left", ":right"  # suffixes of the factors of a low-rank correction
SCALE = ":scale"  # suffix of the row scales of an imported matrix
MIN_BITS, MAX_BITS = 2, 8  # of grids that clip; -1, 0, 1 are the smallest symmetric grid
MAX_CODE = 2**15 - 1
OCTAVE = 1024  # units of an exponent in a factor of 2
FRACTIONS = torch.tensor([float(Decimal(2) ** (Decimal(n) / OCTAVE)) for n in range(OCTAVE)], dtype=torch.float32)  # 2^(n/OCTAVE)
FLOAT_BIAS, MANTISSA_BITS = 127, 23  # of fp32


def clip_range(bits: int | None) -> int:
    """Largest code of a symmetric grid with `bits` bits: 15 for int5; without bits, what int16 holds."""
    return MAX_CODE if bits is None else int(2 ** (bits - 1) - 1)


def exponents_of(scales: Tensor, resolution: int = 1) -> Tensor:
    """Exponents nearest to positive scales: fp32 of any shape -> int16, multiples of `resolution`."""
    limit = MAX_CODE // resolution
    return (scales.float().log2() * (OCTAVE / resolution)).round().clamp(-limit, limit).mul(resolution).to(torch.int16)


def scales_of(exponents: Tensor) -> Tensor:
    """2^(exponent / OCTAVE), fp32 of the same shape, on the same device; no function of the platform's mathematics library is used."""
    exponents = exponents.to(torch.int32)
    powers = ((exponents >> OCTAVE.bit_length() - 1) + FLOAT_BIAS << MANTISSA_BITS).view(torch.float32)
    return FRACTIONS.to(exponents.device)[exponents & OCTAVE - 1] * powers


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A matrix of R rows and C columns.

    Attributes:
        codes: (R, C) int16, within -clip_range(bits) .. clip_range(bits).
        row_exponents: (R,) int16.
        column_exponents: (C,) int16; 0 where columns have no scales of their own.
        bits: 2 to 8 for a grid that clips; None for steps that were chosen so that nothing needs clipping.
    """

    codes: Tensor
    row_exponents: Tensor
    column_exponents: Tensor
    bits: int | None

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int16 or self.codes.ndim != 2:
            raise ArtifactError(f"codes: expected a matrix of int16, found {self.codes.dtype} of shape {tuple(self.codes.shape)}")
        for kind, exponents, size in zip(("row", "column"), (self.row_exponents, self.column_exponents), self.codes.shape, strict=True):
            if exponents.dtype != torch.int16 or exponents.shape != (size,):
                raise ArtifactError(f"{kind} exponents: expected int16 of shape {(size,)}, "
                                    f"found {exponents.dtype} of shape {tuple(exponents.shape)}")
        if self.bits is not None and not MIN_BITS <= self.bits <= MAX_BITS:
            raise ArtifactError(f"bits: expected {MIN_BITS} to {MAX_BITS}, found {self.bits}")
        limit = clip_range(self.bits)
        if self.codes.numel() and not -limit <= int(self.codes.min()) <= int(self.codes.max()) <= limit:
            raise ArtifactError(f"codes: expected -{limit} to {limit}, found {int(self.codes.min())} to {int(self.codes.max())}")

    def weight(self) -> Tensor:
        """(R, C) fp32."""
        return self.codes.to(torch.float32) * scales_of(self.row_exponents)[:, None] * scales_of(self.column_exponents)

    def entropy_bits(self) -> float:
        """Order-0 entropy of the codes in bits per weight, what an ideal coder with one table for the matrix needs; 0 if empty."""
        counts = torch.bincount(self.codes.flatten().int() + MAX_CODE + 1)
        probabilities = counts[counts > 0].double() / self.codes.numel()
        return float((probabilities * -probabilities.log2()).sum()) + 0.0  # never -0.0


@dataclass(frozen=True, eq=False)
class QuantizedModel:
    """A model as it is submitted.

    Attributes:
        model: the model configuration, as in the section ``model`` of params.yaml.
        training: as in `lib.artifacts.checkpoint.Checkpoint`.
        matrices: parameter name -> codes and scales. Two matrices ``name:left`` (R, k) and ``name:right`` (k, C), if there are any,
            are the factors of a correction that is added to the matrix ``name``.
        vectors: parameter name -> fp16 tensor of any shape: gains, scales and mixes, and matrices that stay at 16 bits; fp32 where an
            imported model has it. A vector ``name:scale`` (R,), if there is one, multiplies the rows of the matrix ``name``.
    """

    model: dict[str, Any]
    training: Training
    matrices: dict[str, QuantizedTensor]
    vectors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> fp32 tensor, for all parameters.

        Raises:
            ArtifactError: row scales without their matrix, a correction without its matrix or its other factor, or of another shape.
        """
        weights = {name: matrix.weight() for name, matrix in self.matrices.items() if not name.endswith((LEFT, RIGHT))}
        for name in [name for name in self.vectors if name.endswith(SCALE)]:
            matrix, scales = weights.get(name.removesuffix(SCALE)), self.vectors[name].to(torch.float32)
            if matrix is None or scales.shape != matrix.shape[:1]:
                raise ArtifactError(f"{name}: expected a matrix with one row for each of these scales")
            weights[name.removesuffix(SCALE)] = matrix * scales[:, None]
        factors = {name for name in self.matrices if name.endswith((LEFT, RIGHT))}
        for name in {factor.removesuffix(LEFT).removesuffix(RIGHT) for factor in factors}:
            try:
                weights[name] = weights[name] + self.matrices[name + LEFT].weight() @ self.matrices[name + RIGHT].weight()
            except (KeyError, RuntimeError) as error:
                raise ArtifactError(f"{name}: the matrix and the factors of its correction do not fit together ({error})") from None
        return weights | {name: vector.to(torch.float32) for name, vector in self.vectors.items() if not name.endswith(SCALE)}


def save_quantized(path: Path, quantized: QuantizedModel, sources: Sequence[Path] = ()) -> None:
    """Write a quantized model, made from the files `sources`, as safetensors; the same model gives the same bytes."""
    tensors = {VECTORS + name: vector for name, vector in quantized.vectors.items()}
    for name, matrix in quantized.matrices.items():
        tensors |= {CODES + name: matrix.codes, ROWS + name: matrix.row_exponents, COLUMNS + name: matrix.column_exponents}
    bits = {name: matrix.bits for name, matrix in quantized.matrices.items()}
    save_tensors(path, tensors, {"model": quantized.model, "training": quantized.training.model_dump(), "bits": bits}, sources)


def load_quantized(path: Path) -> QuantizedModel:
    """Read a quantized model, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, or not a quantized model.
    """
    tensors, metadata = load_tensors(path)
    try:
        matrices = {name: QuantizedTensor(tensors[CODES + name], tensors[ROWS + name], tensors[COLUMNS + name], bits)
                    for name, bits in metadata["bits"].items()}
        vectors = {name.removeprefix(VECTORS): tensor for name, tensor in tensors.items() if name.startswith(VECTORS)}
        return QuantizedModel(metadata["model"], Training.parse(metadata["training"], str(path)), matrices, vectors)
    except KeyError as error:
        raise ArtifactError(f"{path}: not a quantized model (no {error}); `dvc repro -f` makes it anew") from None
