"""GPTQ (Frantar et al., arXiv:2210.17323): rounding a matrix column by column, each error compensated by the columns not yet rounded.

Shapes: R rows, C columns, b columns of a block. The weights are kept transposed, (C, R), so that a column is contiguous.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.artifacts.quantized import dequantize
from lib.quantization.grid import multiply_scales, round_to_grid

DAMPING_FACTOR = 10.0
NUM_DAMPINGS = 6


@dataclass(frozen=True, eq=False)
class Factor:
    """What GPTQ needs to know of a Hessian; the weights that read the same input share it.

    Attributes:
        upper: (C, C) fp64, the upper Cholesky factor U of the inverse of the damped Hessian in column order: H^-1 = U^T U.
        order: (C,) int64, the columns in the order in which they are rounded.
        dead: (C,) bool, columns whose input was always 0, in their own order.
        damping: fraction of the mean diagonal of the live columns that was added to the diagonal.
    """

    upper: Tensor
    order: Tensor
    dead: Tensor
    damping: float


def factorize(name: str, hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """Damp a Hessian and factorize its inverse; the damping is raised tenfold until the Cholesky decomposition exists.

    With J the reversal of order and J H J = L L^T, R = J L J is upper triangular, H = R R^T and U = R^-1: one decomposition and one
    triangular inverse, and H^-1 itself, which is less accurate, is never formed.

    Args:
        name: of the input, for errors.
        hessian: (C, C) fp32.
        damping: fraction of the mean diagonal, above 0.
        act_order: columns by descending diagonal instead of in their own order.

    Raises:
        ValueError: not finite, or no decomposition after `NUM_DAMPINGS` dampings.
    """
    if not hessian.isfinite().all():
        raise ValueError(f"{name}: expected a finite Hessian, found NaN or infinity; the model overflows on the calibration sequences")
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(hessian), device=hessian.device)
    dead = diagonal == 0
    ordered = hessian.double()[order][:, order]
    mean = float(diagonal[~dead].double().mean()) if not dead.all() else 1.0  # dead columns have no weight, so damping is enough for them
    identity = torch.eye(len(ordered), dtype=ordered.dtype, device=ordered.device)
    tried = [damping * DAMPING_FACTOR**n for n in range(NUM_DAMPINGS)]
    for raised in tried:
        damped = ordered + raised * mean * identity
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return Factor(torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True), order, dead, raised)
    raise ValueError(f"{name}: the Hessian is not positive definite even with damping {tried[-1]:g}; "
                     "raise calibrate.num_sequences or quantize.damping")


def round_gptq(weight: Tensor, scales: Tensor, bits: int, factor: Factor, block_size: int) -> Tensor:
    """Codes that make the squared error of the outputs small, for given scales.

    The error of a column over U_jj, times row j of U, is taken from all columns after j: at once from those of the same block
    of `block_size` columns, with one matrix product from all later ones when the block is done.

    Args:
        weight: (R, C), fp32 or fp64; the arithmetic is in its type.
        scales: (R,) fp16.
        bits: 2 to 8.
        factor: of the Hessian of the weight's input.
        block_size: changes speed, not results.

    Returns:
        (R, C) int8; 0 in dead columns.
    """
    upper = factor.upper.to(weight.dtype)
    columns = weight.T[factor.order].clone()  # (C, R)
    columns[factor.dead[factor.order]] = 0
    codes = torch.empty(columns.shape, dtype=torch.int8, device=weight.device)
    for start in range(0, len(columns), block_size):
        stop = min(start + block_size, len(columns))
        errors = torch.empty_like(columns[start:stop])  # (b, R)
        for j in range(start, stop):
            rounded = round_to_grid(columns[j, :, None], scales, bits)  # (R, 1)
            codes[j] = rounded[:, 0]
            error = (columns[j] - dequantize(rounded, scales)[:, 0]) / upper[j, j]
            columns[j + 1:stop].addr_(upper[j, j + 1:stop], error, alpha=-1)
            errors[j - start] = error
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return codes[torch.argsort(factor.order)].T.contiguous()


def round_with_best_scales(weight: Tensor, scales: Tensor, scale_factors: Sequence[float], *, bits: int, factor: Factor,
                           hessian: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """`round_gptq` with several multiples of the scales; each row keeps the multiple with the least squared error of its outputs.

    A clip rule looks at a weight alone. GPTQ moves weights away from their values, and errors that its later columns make up for
    count less, so that the best grid for it is often another one.

    Args:
        weight: (R, C) fp32.
        scales: (R,) fp16.
        scale_factors: multiples to try; of equals the first is kept.
        bits: 2 to 8.
        factor: of `hessian`.
        hessian: (C, C) fp32, without damping.
        block_size: changes speed, not results.

    Returns:
        Codes (R, C) int8 and scales (R,) fp16.
    """
    best_codes, best_scales = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device), scales
    best_errors = torch.full(scales.shape, torch.inf, dtype=torch.float64, device=weight.device)
    for scale_factor in scale_factors:
        tried = multiply_scales(scales, scale_factor)
        codes = round_gptq(weight, tried, bits, factor, block_size)
        errors = row_errors(weight - dequantize(codes, tried), hessian)
        better = errors < best_errors
        best_codes = torch.where(better[:, None], codes, best_codes)
        best_scales, best_errors = torch.where(better, tried, best_scales), torch.where(better, errors, best_errors)
    return best_codes, best_scales


def row_errors(error: Tensor, hessian: Tensor | None) -> Tensor:
    """Diagonal of E H E^T in fp64, (R,), for an error or weight E (R, C) and a Hessian H (C, C); None is the identity."""
    error = error.double()
    return ((error if hessian is None else error @ hessian.double()) * error).sum(1)


def quadratic_error(error: Tensor, hessian: Tensor | None) -> float:
    """tr(E H E^T), summed in fp64; arguments as of `row_errors`."""
    return float(row_errors(error, hessian).sum())
