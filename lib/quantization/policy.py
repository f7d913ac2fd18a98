"""What happens to each parameter of a checkpoint: GPTQ, rounding to nearest, or fp16; and the table of the errors this makes.

Weights of linear layers have a Hessian and are quantized by `QuantizeParams.method`; embedding tables, whose inputs are tokens, by
rounding to nearest; vectors stay fp16. The role decides the bits, never the size: nothing stays unquantized because it is small.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, dequantize
from lib.model.roles import VECTOR_ROLE, role_of
from lib.progress import Progress
from lib.quantization.config import QuantizeParams
from lib.quantization.gptq import Factor, factorize, quadratic_error, round_with_best_scales
from lib.quantization.grid import round_to_grid, row_scales
from lib.quantization.grid_config import FLOAT_BITS, ClipParams

SCALE_BITS = 16
FP16_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class TensorRow:
    """How one matrix was quantized; the fields are the columns of ``tensors.csv``, None is an empty cell.

    Attributes:
        name: of the parameter.
        role: of the parameter, as in `lib.model.roles`.
        method: gptq, rtn (round to nearest) or fp16.
        rows: R.
        columns: C.
        bits: per weight, without the scale of the row.
        clip: clip rule; None for fp16.
        relative_error: squared error of the outputs over the squared outputs, tr(E H E^T) / tr(W H W^T), with the verification
            Hessian; for tables, without Hessian, the squared error of the weights over the squared weights; 0 where both are 0.
        relative_error_rtn: the same after rounding to nearest with the same bits and the scales of the clip rule.
        entropy_bits: order-0 entropy of the codes, bits per weight; None for fp16.
        damping: that GPTQ needed; None for other methods.
        dead_columns: inputs that were always 0 in calibration; None without Hessian.
    """

    name: str
    role: str
    method: str
    rows: int
    columns: int
    bits: int
    clip: str | None
    relative_error: float
    relative_error_rtn: float
    entropy_bits: float | None
    damping: float | None
    dead_columns: int | None


def quantize_model(checkpoint: Checkpoint, hessians: Hessians, params: QuantizeParams,
                   device: torch.device) -> tuple[QuantizedModel, list[TensorRow]]:
    """Quantize a checkpoint.

    Args:
        checkpoint: not changed.
        hessians: of the same model.
        params: section ``quantize``.
        device: what computes.

    Returns:
        The quantized model on the CPU, and one row for each matrix, sorted by name.

    Raises:
        ValueError: a parameter that fp16 cannot hold, a Hessian that has no Cholesky decomposition, or Hessians of another
            model; the message names the tensor.
    """
    read = {name for names in hessians.inputs.values() for name in names}
    if missing := sorted(read - checkpoint.weights.keys()):
        raise ValueError(f"{missing[0]}: has a Hessian but is not in the checkpoint; calibrate this checkpoint first (`dvc repro`)")
    groups = [*hessians.inputs.items(), (None, sorted(checkpoint.weights.keys() - read))]
    quantized = QuantizedModel(checkpoint.model, checkpoint.training, {}, {})
    rows: list[TensorRow] = []
    with Progress("quantize", sum(weight.numel() for weight in checkpoint.weights.values()), " weights") as progress:
        for source, names in groups:
            factor: Factor | None = None  # the weights that read the same input share it
            for name in names:
                weight = checkpoint.weights[name].to(device)
                role = role_of(name, weight.ndim)
                bits = FLOAT_BITS if role == VECTOR_ROLE else getattr(params.bits, role)
                if not weight.abs().amax() <= FP16_MAX:
                    raise ValueError(f"{name}: expected magnitudes up to {FP16_MAX:g} (fp16), found {weight.abs().amax().item():g}; "
                                     "the training diverged")
                if bits == FLOAT_BITS:
                    quantized.vectors[name] = weight.to(torch.float16).cpu()
                else:
                    if factor is None and source is not None and params.method == "gptq":
                        factor = factorize(source, hessians.calibration[source].to(device), params.damping, params.act_order)
                    hessian = None if factor is None or source is None else hessians.calibration[source].to(device)
                    quantized.matrices[name] = _quantize_matrix(weight, bits, factor, hessian, params)
                if role != VECTOR_ROLE:
                    rows.append(_make_row(name, role, weight, quantized.matrices.get(name), clip=params.clip, factor=factor,
                                          source=source, hessians=hessians))
                progress.update(weight.numel())
    return quantized, sorted(rows, key=lambda row: row.name)


def _quantize_matrix(weight: Tensor, bits: int, factor: Factor | None, hessian: Tensor | None, params: QuantizeParams) -> QuantizedTensor:
    """By GPTQ with the factor and the Hessian of the weight's input, by rounding to nearest without."""
    scales = row_scales(weight, bits, params.clip)
    if factor is None or hessian is None:
        codes = round_to_grid(weight, scales, bits)
    else:
        codes, scales = round_with_best_scales(weight, scales, params.scale_factors, bits=bits, factor=factor, hessian=hessian,
                                               block_size=params.block_size)
    return QuantizedTensor(codes.cpu(), scales.cpu(), bits)


def _make_row(name: str, role: str, weight: Tensor, matrix: QuantizedTensor | None, *, clip: ClipParams, factor: Factor | None,
              source: str | None, hessians: Hessians) -> TensorRow:
    """The row of a matrix (R, C) that was quantized to `matrix`, or left at fp16 if that is None."""
    hessian, dead_columns = None, None
    if source is not None:
        hessian = hessians.verification[source].to(weight.device)
        dead_columns = int((hessians.calibration[source].diagonal() == 0).sum())
    num_rows, num_columns = weight.shape
    if matrix is None:
        error = _relative_error(weight, weight.to(torch.float16), hessian)
        return TensorRow(name, role, "fp16", num_rows, num_columns, FLOAT_BITS, None, error, error, None, None, dead_columns)
    scales = row_scales(weight, matrix.bits, clip)
    nearest = dequantize(round_to_grid(weight, scales, matrix.bits), scales)
    return TensorRow(name, role, "rtn" if factor is None else "gptq", num_rows, num_columns, matrix.bits, clip.rule,
                     _relative_error(weight, matrix.weight().to(weight.device), hessian), _relative_error(weight, nearest, hessian),
                     matrix.entropy_bits(), None if factor is None else factor.damping, dead_columns)


def _relative_error(weight: Tensor, result: Tensor, hessian: Tensor | None) -> float:
    reference = quadratic_error(weight, hessian)
    return quadratic_error(weight - result, hessian) / reference if reference else 0.0


def summarize(rows: Sequence[TensorRow]) -> dict[str, float]:
    """Figures of a whole quantized model.

    Returns:
        ``bits_per_weight``: bits of all codes, row scales and fp16 matrices over the number of weights of all matrices, before
        any compression. ``entropy_bits``: order-0 entropy of the codes of a matrix, averaged over the quantized weights.
        ``relative_error`` and ``relative_error_rtn``: those of the table, averaged over the weights that have a Hessian.
    """
    stored = sum(row.rows * (row.columns * row.bits + (0 if row.bits == FLOAT_BITS else SCALE_BITS)) for row in rows)
    with_hessian = [row for row in rows if row.dead_columns is not None]
    return {
        "bits_per_weight": stored / sum(row.rows * row.columns for row in rows),
        "entropy_bits": _mean([(row, row.entropy_bits) for row in rows if row.entropy_bits is not None]),
        "relative_error": _mean([(row, row.relative_error) for row in with_hessian]),
        "relative_error_rtn": _mean([(row, row.relative_error_rtn) for row in with_hessian]),
    }


def _mean(values: Sequence[tuple[TensorRow, float]]) -> float:
    """Average over weights; 0 of none (no matrix is quantized when all bits are 16)."""
    return sum(row.rows * row.columns * value for row, value in values) / max(1, sum(row.rows * row.columns for row, _ in values))


def list_grid_differences(trained: Mapping[str, Any], params: QuantizeParams) -> list[str]:
    """Where the grid that the checkpoint was trained for, ``checkpoint.training["qat"]``, differs from that of the export.

    Args:
        trained: the fields ``bits`` and ``clip`` of section ``train.qat``.
        params: section ``quantize``.

    Returns:
        One phrase for each differing key; empty if training and export share the grid.
    """
    export = params.model_dump(mode="json", include={"bits", "clip"})
    return [f"{section}.{key} {trained[section][key]} in training, {value} here"
            for section, values in export.items() for key, value in values.items() if trained[section][key] != value]
