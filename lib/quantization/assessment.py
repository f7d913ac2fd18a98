"""What quantization did to each matrix: the rows of ``tensors.csv``, and figures of the whole model.

Shapes: R rows, C columns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import OCTAVE, QuantizedModel, QuantizedTensor, scales_of
from lib.model.parts import Part
from lib.quantization.clipping import row_scales
from lib.quantization.config import FREE, ClipParams, QuantizeParams
from lib.quantization.gptq import row_errors
from lib.quantization.grid import round_to_grid
from lib.quantization.grid_config import FLOAT_BITS


@dataclass(frozen=True)
class TensorRow:
    """How one matrix was quantized; the fields are the columns of ``tensors.csv``, None is an empty cell.

    Errors are measured with the verification moments, which nothing was minimised with.

    Attributes:
        name: name of the parameter.
        role: role of the parameter, as in `lib.model.parts`.
        method: gptq, rtn (round to nearest) or fp16.
        rows: R.
        columns: C.
        bits: bits of the grid, ``free``, or 16.
        step: geometric mean of the steps; None for fp16.
        entropy_bits: order-0 entropy of the codes, bits per weight; None for fp16.
        coded_bytes: bytes of codes and, if there is one, of the low-rank correction; None for fp16.
        relative_error: squared error over squared weight in the Hessian's metric, tr(E H E^T) / tr(W H W^T); 0 where both are 0.
        relative_error_rtn: the same after rounding to nearest: at the same steps, or with the scales of the clip rule.
        sensitivity: nats per token for an error tr(E H E^T) of 1 that all rows share: half the mean of the rows' squared gradients.
        predicted_loss: 1/2 sum_i g_i e_i H e_i^T, nats per token.
        zeros: fraction of the codes that are 0; None for fp16.
        rank: rank of the correction, 0 without.
        damping: damping of the Hessian; None for fp16.
        dead_columns: inputs that were always 0 in calibration.
    """

    name: str
    role: str
    method: str
    rows: int
    columns: int
    bits: int | str
    step: float | None
    entropy_bits: float | None
    coded_bytes: int | None
    relative_error: float
    relative_error_rtn: float
    sensitivity: float
    predicted_loss: float
    zeros: float | None
    rank: int
    damping: float | None
    dead_columns: int


def list_tensors(weights: Mapping[str, Tensor], parts: Mapping[str, Part], hessians: Hessians, quantized: QuantizedModel,
                 params: QuantizeParams, *, dampings: Mapping[str, float], coded_bytes: Mapping[str, int],
                 device: torch.device) -> list[TensorRow]:
    """One row for each matrix, sorted by name.

    Args:
        weights: weights of the checkpoint, matrices (R, C).
        parts: table of the same model, from `lib.model.parts.parts_of`.
        hessians: second moments of the same model.
        quantized: the result.
        params: section ``quantize``.
        dampings: name of the matrix -> damping.
        coded_bytes: name of the matrix -> bytes of its codes, those of its correction included.
        device: what computes.
    """
    results = quantized.weights()
    rows = []
    for source, names in hessians.inputs.items():
        hessian = hessians.verification.hessians[source].to(device)
        dead_columns = int((hessians.calibration.hessians[source].diagonal() == 0).sum())
        for name in names:
            weight, matrix = weights[name].to(device), quantized.matrices.get(name)
            gradients = hessians.verification.gradients[name].to(device).double()
            reference = float(row_errors(weight, hessian).sum())
            errors = row_errors(weight - results[name].to(device), hessian)
            relative = nearest = float(errors.sum()) / reference if reference else 0.0
            if matrix is not None and reference:
                rounded = _round_to_nearest(weight, matrix, params.clip.of_role(parts[name].role))
                nearest = float(row_errors(weight - rounded, hessian).sum()) / reference
            rows.append(TensorRow(
                name=name, role=parts[name].role, method="fp16" if matrix is None else params.method,
                rows=weight.shape[0], columns=weight.shape[1], bits=FLOAT_BITS if matrix is None else matrix.bits or FREE,
                step=None if matrix is None else _mean_step(matrix), entropy_bits=None if matrix is None else matrix.entropy_bits(),
                coded_bytes=None if matrix is None else coded_bytes.get(name, 0),
                relative_error=relative, relative_error_rtn=nearest, sensitivity=float(gradients.mean()) / 2,
                predicted_loss=float((gradients * errors).sum()) / 2,
                zeros=None if matrix is None else float((matrix.codes == 0).float().mean()),
                rank=0 if matrix is None else matrix.rank,
                damping=dampings.get(name), dead_columns=dead_columns))
    return sorted(rows, key=lambda row: row.name)


def _round_to_nearest(weight: Tensor, matrix: QuantizedTensor, clip: ClipParams) -> Tensor:
    """The weights rounded to nearest, with the steps of `matrix` if they are free, with those of the clip rule otherwise."""
    if matrix.bits is None:
        scales = (scales_of(matrix.row_exponents)[:, None] * scales_of(matrix.column_exponents)).to(weight.device)
    else:
        scales = row_scales(weight, matrix.bits, clip)[:, None]
    return round_to_grid(weight, scales, matrix.bits) * scales


def _mean_step(matrix: QuantizedTensor) -> float:
    exponent = sum(float(exponents.double().mean()) for exponents in (matrix.row_exponents, matrix.column_exponents) if len(exponents))
    return float(2 ** (exponent / OCTAVE))


def summarize(rows: Sequence[TensorRow]) -> dict[str, float]:
    """Figures of a whole quantized model.

    Returns:
        ``entropy_bits``: order-0 entropy of the codes of a matrix, averaged over the weights that have codes. ``coded_bits``: bits of
        their codes after entropy coding, per weight. ``relative_error`` and ``relative_error_rtn``: those of the table, averaged over
        all weights of matrices. ``predicted_loss``: the sum, nats per token.
    """
    coded = [row for row in rows if row.coded_bytes is not None]
    num_coded = max(1, sum(row.rows * row.columns for row in coded))  # none if all matrices stay at fp16
    return {
        "entropy_bits": sum(row.rows * row.columns * (row.entropy_bits or 0) for row in coded) / num_coded,
        "coded_bits": 8 * sum(row.coded_bytes or 0 for row in coded) / num_coded,
        "relative_error": _mean(rows, "relative_error"),
        "relative_error_rtn": _mean(rows, "relative_error_rtn"),
        "predicted_loss": sum(row.predicted_loss for row in rows),
    }


def _mean(rows: Sequence[TensorRow], field: str) -> float:
    return sum(row.rows * row.columns * getattr(row, field) for row in rows) / sum(row.rows * row.columns for row in rows)
