"""The seam between quantize and compress: integer codes and log-scale exponents of the matrices, floats of everything else.

Shapes: R rows, C columns, k the rank of a correction. The weight that a code stands for is code * row scale * column scale; scales
are powers of 2 with exponents in units of 1/`OCTAVE`, so that the same file gives the same weights on every machine. Row scales that were
chosen elsewhere, in an imported model, are no such powers; they are kept as they are.

In files the factors of a correction are matrices ``name:left`` and ``name:right``, and such row scales a vector ``name:scale``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
        row_scales: (R,) fp16 or fp32, which an imported matrix has beside its exponents; None for 1.
        correction: factors (R, k) and (k, C), whose product is added to the matrix; None for none.
    """

    codes: Tensor
    row_exponents: Tensor
    column_exponents: Tensor
    bits: int | None
    row_scales: Tensor | None = None
    correction: "tuple[QuantizedTensor, QuantizedTensor] | None" = None

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
        if self.row_scales is not None and self.row_scales.shape != self.codes.shape[:1]:
            raise ArtifactError(f"row scales: expected one for each of {len(self.codes)} rows, found shape {tuple(self.row_scales.shape)}")
        if self.correction is not None:
            (rows, rank), (other, columns) = (factor.codes.shape for factor in self.correction)
            if (rows, columns) != self.codes.shape or rank != other or any(factor.correction or factor.row_scales is not None
                                                                           for factor in self.correction):
                raise ArtifactError(f"correction: expected plain factors whose product is {tuple(self.codes.shape)}, "
                                    f"found {(rows, rank)} and {(other, columns)}")

    @property
    def rank(self) -> int:
        """Rank of the correction; 0 for none."""
        return 0 if self.correction is None else self.correction[0].codes.shape[1]

    def weight(self) -> Tensor:
        """(R, C) fp32."""
        weight = self.codes.to(torch.float32) * scales_of(self.row_exponents)[:, None] * scales_of(self.column_exponents)
        if self.row_scales is not None:
            weight = weight * self.row_scales.to(torch.float32)[:, None]
        return weight if self.correction is None else weight + self.correction[0].weight() @ self.correction[1].weight()

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
        matrices: parameter name -> codes and scales.
        vectors: parameter name -> fp16 tensor of any shape: gains, scales and mixes, and matrices that stay at 16 bits; fp32 where an
            imported model has it.
    """

    model: dict[str, Any]
    training: Training
    matrices: dict[str, QuantizedTensor]
    vectors: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """Parameter name -> fp32 tensor, for all parameters."""
        return ({name: matrix.weight() for name, matrix in self.matrices.items()}
                | {name: vector.to(torch.float32) for name, vector in self.vectors.items()})


Tensors = tuple[dict[str, QuantizedTensor], dict[str, Tensor]]
"""Matrices and vectors by name."""


def to_tensors(quantized: QuantizedModel) -> Tensors:
    """Matrices and vectors as files have them: factors of corrections and row scales beside the matrix, by names with suffixes."""
    matrices, vectors = dict(quantized.matrices), dict(quantized.vectors)
    for name, matrix in quantized.matrices.items():
        if matrix.correction is not None:
            matrices |= zip((name + LEFT, name + RIGHT), matrix.correction, strict=True)
        if matrix.row_scales is not None:
            vectors[name + SCALE] = matrix.row_scales
    return matrices, vectors


def assemble(matrices: Mapping[str, QuantizedTensor], vectors: Mapping[str, Tensor]) -> Tensors:
    """What `to_tensors` has made into one, as it was.

    Raises:
        ArtifactError: row scales without their matrix, a correction without its matrix or its other factor, or of another shape.
    """
    found = {name: matrix for name, matrix in matrices.items() if not name.endswith((LEFT, RIGHT))}
    parts = {name.removesuffix(LEFT).removesuffix(RIGHT) for name in matrices.keys() - found.keys()}
    for name in sorted(parts | {name.removesuffix(SCALE) for name in vectors if name.endswith(SCALE)}):
        try:
            correction = (matrices[name + LEFT], matrices[name + RIGHT]) if name in parts else None
            found[name] = replace(found[name], row_scales=vectors.get(name + SCALE), correction=correction)
        except (KeyError, ArtifactError) as error:
            raise ArtifactError(f"{name}: the matrix does not fit together with its row scales or correction ({error})") from None
    return found, {name: vector for name, vector in vectors.items() if not name.endswith(SCALE)}


def save_quantized(path: Path, quantized: QuantizedModel, sources: Sequence[Path] = ()) -> None:
    """Write a quantized model, made from the files `sources`, as safetensors; the same model gives the same bytes."""
    matrices, vectors = to_tensors(quantized)
    tensors = {VECTORS + name: vector for name, vector in vectors.items()}
    for name, matrix in matrices.items():
        tensors |= {CODES + name: matrix.codes, ROWS + name: matrix.row_exponents, COLUMNS + name: matrix.column_exponents}
    bits = {name: matrix.bits for name, matrix in matrices.items()}
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
        return QuantizedModel(metadata["model"], Training.parse(metadata["training"], str(path)), *assemble(matrices, vectors))
    except KeyError as error:
        raise ArtifactError(f"{path}: not a quantized model (no {error}); `dvc repro -f` makes it anew") from None
