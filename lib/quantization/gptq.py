"""GPTQ (Frantar et al., arXiv:2210.17323): rounding a matrix column by column, each error compensated by the columns not yet rounded.

Shapes: B matrices of one shape, R rows, C columns, b columns of a block. Weights are kept transposed, (C, R), so that a column is
contiguous, and divided by their steps: with steps r_i c_j the factor U becomes U_jk c_j / (U_jj c_k), rows drop out, and every
grid is the integers.

That makes the error of each output small on its own. Where what the outputs do together matters as well, errors are also made up for across
rows (`round_two_sided`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.artifacts.quantized import clip_range
from lib.errors import UserError

DAMPING_FACTOR = 10.0
NUM_DAMPINGS = 6
SMALLEST_MAGNITUDE = 2.0**-20
TILE = 32  # rows and columns of a matrix that are rounded with feedback across outputs at a time; changes speed, not results


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

    def error_scales(self) -> Tensor:
        """U_jj, (C,) fp32 in the columns' own order: rounding column j adds ((w - q) / U_jj)^2 to the error tr(E H E^T)."""
        return self.upper.diagonal().float()[torch.argsort(self.order)]


def factorize(name: str, hessian: Tensor, damping: float, act_order: bool) -> Factor:
    """Damp a Hessian and factorize its inverse; the damping is raised tenfold until the Cholesky decomposition exists.

    With J the reversal of order and J H J = L L^T, R = J L J is upper triangular, H = R R^T and U = R^-1: one decomposition and one
    triangular inverse, and H^-1 itself, which is less accurate, is never formed.

    Args:
        name: name of the input, for errors.
        hessian: (C, C) fp32.
        damping: fraction of the mean diagonal, above 0.
        act_order: columns by descending diagonal instead of in their own order.

    Raises:
        ValueError: not finite, or no decomposition after `NUM_DAMPINGS` dampings.
    """
    if not hessian.isfinite().all():
        raise UserError(f"{name}: expected a finite Hessian, found NaN or infinity; the model overflows on the calibration sequences")
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
    raise UserError(f"{name}: the Hessian is not positive definite even with damping {tried[-1]:g}; "
                    "raise calibrate.num_sequences or quantize.damping")


@dataclass(frozen=True, eq=False)
class Problem:
    """Matrices that read the same input, one below the other.

    Attributes:
        weight: (R, C), fp32 or fp64; the arithmetic is in its type.
        factor: factor of the Hessian of the input.
        pruned: (R, C) bool, weights that have to be 0; None if there are none.
    """

    weight: Tensor
    factor: Factor
    pruned: Tensor | None = None


def round_gptq(problems: Sequence[Problem], row_scales: Sequence[Tensor], column_scales: Sequence[Tensor], *, bits: int | None,
               block_size: int, rate_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes that make the squared error of the outputs small, for given scales.

    The error of a column is made up for by all columns after it: at once by those of the same block of `block_size` columns, with
    one matrix product by all later ones when the block is done.

    With `rate_weight` a code is not the nearest integer but that with the least (x - q)^2 + rate_weight * length(q) / k_j, k_j the
    relative weight of the column's error. Lengths are those of a two-sided geometric distribution with the row's mean magnitude:
    b bits for every step away from 0, so that the best code is the nearest of |x| - rate_weight * b / (2 k_j).

    Args:
        problems: B of the same shape.
        row_scales: scales of the rows of each, (R,).
        column_scales: scales of the columns of each, (C,).
        bits: 2 to 8, or None for codes of 16 bits.
        block_size: changes speed, not results.
        rate_weight: squared steps per bit; 0 rounds to nearest.

    Returns:
        Codes (B, R, C) int16, 0 in dead columns and where pruned; and tr(e H e^T) of each row's error with the damped Hessian, (B, R).
    """
    limit = clip_range(bits)
    columns, rows_of, upper, error_scales, shrinkage, pruned, order = _prepare(problems, row_scales, column_scales, rate_weight)
    losses = torch.zeros_like(rows_of)
    for start in range(0, columns.shape[1], block_size):
        stop = min(start + block_size, columns.shape[1])
        errors = torch.empty_like(columns[:, start:stop])  # (B, b, R)
        for j in range(start, stop):
            x = columns[:, j]  # (B, R)
            if shrinkage is None:
                codes = x.round()
            else:
                codes = x.sign() * (x.abs() - shrinkage[0] * shrinkage[1][:, j, None]).clamp_(min=0).round_()
            codes.clamp_(-limit, limit)
            if pruned is not None:
                codes.masked_fill_(pruned[:, j], 0)
            error = torch.sub(x, codes, out=errors[:, j - start])
            x.copy_(codes)
            columns[:, j + 1:stop].baddbmm_(upper[:, j, j + 1:stop, None], error[:, None], alpha=-1)
        columns[:, stop:].baddbmm_(upper[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1)
        losses += (errors * error_scales[:, start:stop, None]).square_().sum(1)
    codes = _reorder(columns.to(torch.int16), torch.argsort(order, dim=1)).transpose(1, 2).contiguous()
    return codes, losses * rows_of.square()


class _Prepared(NamedTuple):
    """Problems in steps, columns in the order of rounding; see `_prepare`."""

    columns: Tensor
    rows_of: Tensor
    upper: Tensor
    error_scales: Tensor
    shrinkage: tuple[Tensor, Tensor] | None
    pruned: Tensor | None
    order: Tensor


def _prepare(problems: Sequence[Problem], row_scales: Sequence[Tensor], column_scales: Sequence[Tensor], rate_weight: float) -> _Prepared:
    """Weights in steps (B, C, R), row scales (B, R), the factor that passes errors of one step on (B, C, C), the square root of what such
    an error costs (B, C), how far rounding moves towards 0, what is pruned (B, C, R), order (B, C)."""
    dtype = problems[0].weight.dtype
    order = torch.stack([problem.factor.order for problem in problems])
    columns_of = torch.stack(list(column_scales)).to(dtype)  # (B, C)
    rows_of = torch.stack(list(row_scales)).to(dtype)
    weight = torch.stack([problem.weight.masked_fill(problem.factor.dead, 0) for problem in problems])
    columns = _reorder((weight / columns_of[:, None] / rows_of[:, :, None]).transpose(1, 2), order)
    upper = torch.stack([problem.factor.upper for problem in problems]).to(dtype)
    error_scales = columns_of.gather(1, order) / upper.diagonal(dim1=1, dim2=2)
    upper = upper * error_scales[:, :, None] / columns_of.gather(1, order)[:, None]
    pruned = None
    if any(problem.pruned is not None for problem in problems):
        masks = [torch.zeros_like(problem.weight, dtype=torch.bool) if problem.pruned is None else problem.pruned for problem in problems]
        pruned = _reorder(torch.stack(masks).transpose(1, 2), order)
    return _Prepared(columns, rows_of, upper, error_scales, _shrinkage(columns, error_scales, rate_weight) if rate_weight else None,
                     pruned, order)


def _reorder(columns: Tensor, order: Tensor) -> Tensor:
    """Column ``order[n]`` at place n: (B, C, R) and (B, C) -> (B, C, R), contiguous."""
    return torch.stack([matrix[indices] for matrix, indices in zip(columns, order, strict=True)])


def _shrinkage(columns: Tensor, error_scales: Tensor, rate_weight: float) -> tuple[Tensor, Tensor]:
    """How far rounding moves towards 0, as a factor for each row (B, R) and one for each column (B, C)."""
    mean = columns.abs().mean(1).clamp(min=SMALLEST_MAGNITUDE)  # (B, R), of a two-sided geometric distribution 2 theta / (1 - theta^2)
    bits = torch.log2(mean / ((1 + mean * mean).sqrt() - 1))  # 1 / theta
    relative = error_scales.square()
    return rate_weight / 2 * bits, relative.mean(1, keepdim=True) / relative


def round_two_sided(problems: Sequence[Problem], outputs: Sequence[Factor], row_scales: Sequence[Tensor],
                    column_scales: Sequence[Tensor], *, rate_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes of 16 bits with a small loss tr(G E H E^T), G the second moment of the output gradients (as YAQA, arXiv:2505.22988, has it).

    With G = A A^T and H = D D^T, A and D upper triangular in the order of rounding, the loss is the sum over all weights of
    (a_i d_j (x_ij - q_ij))^2, a_i = A_ii, d_j = D_jj = 1 / U_jj, if GPTQ rounds the rows w_i + sum_{k<i} A_ki / a_i (w_k - q_k) in place of
    the weights w_i. A weight waits for those above it and those to its left, so that whole antidiagonals are rounded at once: of tiles,
    and within these of weights.

    Args:
        problems: B of the same shape.
        outputs: factor of G (R, R) of each.
        row_scales: scales of the rows of each, (R,).
        column_scales: scales of the columns of each, (C,).
        rate_weight: as `round_gptq` has it.

    Returns:
        Codes (B, R, C) int16, 0 in dead columns and where pruned; and tr(G E H E^T) of each with the damped G and H, (B,).
    """
    columns, rows_of, upper, error_scales, shrinkage, pruned, order = _prepare(problems, row_scales, column_scales, rate_weight)
    (num_problems, num_columns, num_rows), dtype = columns.shape, columns.dtype
    row_order = torch.stack([factor.order for factor in outputs])  # (B, R)
    factors = torch.stack([factor.upper.double() for factor in outputs])
    identity = torch.eye(num_rows, dtype=factors.dtype, device=factors.device)
    factors = torch.linalg.solve_triangular(factors, identity, upper=True)  # (B, R, R), A
    rows_of = rows_of.gather(1, row_order)
    row_costs = factors.diagonal(dim1=1, dim2=2).to(dtype) * rows_of  # (B, R): what an error of one step costs, square root
    lower = (factors.to(dtype) * rows_of[:, :, None] / row_costs[:, None]).triu(1)  # (B, R, R): [k, i] passes errors from row k to row i
    shift = torch.zeros_like(columns) if shrinkage is None else shrinkage[0][:, None] * shrinkage[1][:, :, None]
    keep = torch.ones_like(columns) if pruned is None else (~pruned).to(dtype)
    margins = -num_columns % TILE, -num_rows % TILE
    weights, shift, keep = (pad(each.gather(2, row_order[:, None].expand_as(each)), (0, margins[1], 0, margins[0]))
                            for each in (columns, shift, keep))  # (B, C', R'), whole tiles
    upper, lower = (pad(each.triu(1), (0, margin, 0, margin)) for each, margin in ((upper, margins[0]), (lower, margins[1])))
    x, codes = weights.clone(), torch.empty_like(weights)
    sides = x.shape[1] // TILE, x.shape[2] // TILE
    x_tiles, code_tiles, *others, upper_tiles, lower_tiles = (
        each.view(num_problems, each.shape[1] // TILE, TILE, each.shape[2] // TILE, TILE)
        for each in (x, codes, weights, shift, keep, upper, lower))
    for number in range(sum(sides) - 1):
        across = torch.arange(max(0, number - sides[1] + 1), min(number, sides[0] - 1) + 1, device=x.device)  # (K,), tiles of columns
        down = number - across  # tiles of rows
        x_tiles[:, across, :, down], code_tiles[:, across, :, down] = _round_tiles(
            [each[:, across, :, down] for each in (x_tiles, *others)], upper_tiles[:, across, :, across], lower_tiles[:, down, :, down])
        for first, top in zip((across * TILE).tolist(), (down * TILE).tolist(), strict=True):
            last, bottom = first + TILE, top + TILE
            passed = x[:, first:last, top:bottom] - codes[:, first:last, top:bottom]
            x[:, last:, top:bottom].baddbmm_(upper[:, first:last, last:].transpose(1, 2), passed, alpha=-1)
            error = weights[:, first:last, top:bottom] - codes[:, first:last, top:bottom]
            x[:, first:last, bottom:].baddbmm_(error, lower[:, top:bottom, bottom:])
    costs = ((x - codes)[:, :num_columns, :num_rows] * error_scales[:, :, None] * row_costs[:, None]).square_().sum((1, 2))
    codes = codes[:, :num_columns, :num_rows].gather(2, torch.argsort(row_order, dim=1)[:, None].expand_as(columns))
    return _reorder(codes.to(torch.int16), torch.argsort(order, dim=1)).transpose(1, 2).contiguous(), costs


def _round_tiles(tiles: Sequence[Tensor], upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
    """What is rounded, and its codes, all (K, B, b, b), columns first: from what there is before it, the weights, how far rounding moves
    towards 0, and 0 where pruned. `upper` passes what rounding left to later columns, `lower` the errors of the weights to later rows."""
    x, weights, shift, keep = (each.flip(2) for each in tiles)  # so that antidiagonals are diagonals
    upper, codes, limit = upper.flip(2, 3), torch.empty_like(x), clip_range(None)
    for offset in range(1 - TILE, TILE):
        values, weight, its_shift, kept = (each.diagonal(offset, 2, 3) for each in (x, weights, shift, keep))  # (K, B, length)
        rounded = values.sign() * (values.abs() - its_shift).clamp_(min=0).round_().clamp_(max=limit) * kept
        codes.diagonal(offset, 2, 3).copy_(rounded)
        rows = slice(max(0, offset), TILE + min(0, offset))
        columns = slice(rows.start - offset, rows.stop - offset)
        passed, error = values - rounded, weight - rounded
        x[..., rows].addcmul_(upper[:, :, columns].transpose(2, 3), passed[:, :, None], value=-1)
        x[:, :, columns].addcmul_(lower[:, :, rows], error[..., None])
    return x.flip(2), codes.flip(2)


def row_errors(error: Tensor, hessian: Tensor) -> Tensor:
    """Diagonal of E H E^T in fp64, (R,), for an error or weight E (R, C) and a Hessian H (C, C)."""
    error = error.double()
    return ((error @ hessian.double()) * error).sum(1)
