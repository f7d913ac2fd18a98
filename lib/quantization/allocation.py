"""Steps that meet a byte budget: which rows, columns and matrices get fine steps, and how fine all of them are.

Shapes: R rows, C columns. With entropy coding the step, not the number of levels, decides the size of a matrix. Rounding weight w_ij
with the step s r_i c_j raises the loss by about 1/2 g_i ((w_ij - q_ij) / U_jj)^2 (`lib.quantization.gptq`), of mean
1/24 g_i (s r_i c_j / U_jj)^2 where the step is small. Equal for all weights, that loss buys the most bits: r_i = 1 / sqrt(g_i) and
c_j = U_jj. How much larger each matrix's own factor s should be where steps are not small against the weights is found by Lagrange:
for a price of a bit, each matrix takes the step with the least loss + price * bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.artifacts.quantized import MAX_CODE, OCTAVE, exponents_of, scales_of
from lib.errors import UserError
from lib.quantization.gptq import Problem

RESOLUTION = OCTAVE // 8  # of the exponents of rows and columns: finer ones cost more bytes than they save
MATRIX_RESOLUTION = OCTAVE // 16
COLUMN_LIMIT, ROW_LIMIT = 16.0, 6.0  # largest ratio to the geometric mean, either way
SMALLEST_GRADIENT = 1e-4  # relative to the largest of the matrix
SAMPLE_ROWS = 64
OCTAVES_UP, OCTAVES_DOWN = 4, 5  # of candidate steps around a matrix's root mean square; smaller steps follow the high-rate law
LARGEST_CODE = MAX_CODE // 2  # with the finest steps; GPTQ moves weights, so that some room is needed
TOLERANCE = 0.001
MAX_PROBES = 12
LARGEST_MISJUDGEMENT = 8.0


class TargetError(UserError):
    """A byte budget that cannot be met; the message says what can."""


@dataclass(frozen=True, eq=False)
class StepCurve:
    """What a matrix costs and how much loss it causes at different steps.

    Attributes:
        exponents: (K,) int64, ascending: of the matrix's own factor, to be added to all row exponents.
        num_bits: (K,) fp64, of all codes.
        losses: (K,) fp64, nats per token.
    """

    exponents: Tensor
    num_bits: Tensor
    losses: Tensor


def column_exponents(problem: Problem) -> Tensor:
    """Relative steps of columns, proportional to U_jj: (C,) int16, of geometric mean 1 over the live columns."""
    scales, live = problem.factor.error_scales(), ~problem.factor.dead
    return _limited(scales / scales[live].log().mean().exp(), COLUMN_LIMIT).where(live, 0) if live.any() else live.to(torch.int16)


def row_exponents(gradients: Tensor) -> Tensor:
    """Relative steps of rows, proportional to 1 / sqrt(g_i): (R,) fp32 -> (R,) int16, of geometric mean 1."""
    scales = floor_gradients(gradients).rsqrt()
    return _limited(scales / scales.log().mean().exp(), ROW_LIMIT)


def floor_gradients(gradients: Tensor) -> Tensor:
    """Mean squared gradients (R,) of which none is so small against the largest that its row would be given up."""
    return gradients.clamp(min=max(SMALLEST_GRADIENT * float(gradients.max()), torch.finfo(torch.float32).tiny))


def _limited(scales: Tensor, limit: float) -> Tensor:
    return exponents_of(scales.clamp(1 / limit, limit), RESOLUTION)


def measure_curve(problem: Problem, gradients: Tensor, rows: Tensor, columns: Tensor) -> StepCurve:
    """Rounding to nearest at many steps of the matrix, on a sample of its rows.

    Args:
        problem: one matrix (R, C).
        gradients: (R,).
        rows: (R,) int16, relative exponents of the rows.
        columns: (C,) int16, relative exponents of the columns.
    """
    num_rows = len(problem.weight)
    sample = torch.arange(min(SAMPLE_ROWS, num_rows), device=rows.device) * num_rows // min(SAMPLE_ROWS, num_rows)
    scaled = problem.weight.masked_fill(problem.factor.dead, 0) / scales_of(rows)[:, None] / scales_of(columns)
    x, live = scaled[sample], ~problem.factor.dead
    weights = (gradients * scales_of(rows).square())[sample, None] * (scales_of(columns) / problem.factor.error_scales() * live).square()
    center = int(exponents_of(x.square().mean().sqrt().clamp(min=2.0**-24), MATRIX_RESOLUTION))
    exponents = torch.arange(center - OCTAVES_DOWN * OCTAVE, center + OCTAVES_UP * OCTAVE + 1, MATRIX_RESOLUTION)
    scales, largest = scales_of(exponents).tolist(), float(x.abs().amax())
    limits = [round(largest / scale) + 1 for scale in scales]  # of the codes, so that nothing in the loop waits for the device
    counts = [torch.zeros(2 * limit + 1, dtype=torch.int64, device=x.device) for limit in limits]
    losses = torch.empty(len(scales), dtype=torch.float64, device=x.device)
    for scale, limit, step_counts, loss in zip(scales, limits, counts, losses, strict=True):
        codes = (x / scale).round_()
        loss.copy_((weights * (x - codes * scale).square()).sum(dtype=torch.float64) / 2)
        codes = codes.flatten().to(torch.int64).add_(limit)
        step_counts.scatter_add_(0, codes, torch.ones_like(codes))
    bits = [_entropy(step_counts) for step_counts in torch.cat(counts).cpu().split([len(part) for part in counts])]
    num_bits, all_losses = torch.tensor(bits).double() * scaled.numel(), losses.cpu().float().double() * (num_rows / len(sample))
    finest = int(exponents_of(scaled.abs().amax().clamp(min=2.0**-24) / LARGEST_CODE)) + 1
    finer = torch.arange(min(0, (finest - int(exponents[0])) // MATRIX_RESOLUTION + 1) * MATRIX_RESOLUTION, 0, MATRIX_RESOLUTION)
    num_live = num_rows * int(live.sum())  # half the step takes a bit more for each of them and leaves a quarter of the loss
    return StepCurve(torch.cat((finer + exponents[0], exponents)), torch.cat((num_bits[0] - num_live * finer / OCTAVE, num_bits)),
                 torch.cat((all_losses[0] * torch.exp2(2 * finer / OCTAVE), all_losses)))


def _entropy(counts: Tensor) -> float:
    """Order-0 entropy in bits per element, from how often each value occurs, int64."""
    probabilities = counts[counts > 0].double() / counts.sum()
    return float(-(probabilities * probabilities.log2()).sum())


def allocate(curves: Sequence[StepCurve], num_bits: float) -> list[int]:
    """The step of each matrix that together make the loss smallest within a number of bits, by bisection of the price of a bit.

    Args:
        curves: one curve for each matrix.
        num_bits: bits of all codes together.

    Returns:
        Index into each curve. Where even the coarsest steps take more bits, those; where the finest take fewer, those.
    """
    low, high = -200.0, 200.0  # of the price's log2; a higher price buys fewer bits
    for _ in range(60):
        middle = (low + high) / 2
        chosen = [_cheapest(curve, 2.0**middle) for curve in curves]
        if sum(float(curve.num_bits[index]) for curve, index in zip(curves, chosen, strict=True)) > num_bits:
            low = middle
        else:
            high = middle
    return [_cheapest(curve, 2.0**high) for curve in curves]


def bits_per_octave(curve: StepCurve, index: int) -> float:
    """How many bits fewer a matrix takes when its steps are doubled."""
    doubled = min(index + OCTAVE // MATRIX_RESOLUTION, len(curve.num_bits) - 1)
    return float(curve.num_bits[index] - curve.num_bits[doubled])


def _cheapest(curve: StepCurve, price: float) -> int:
    return int((curve.losses + price * curve.num_bits).argmin())


class SizeSearch:
    """How many units to coarsen the steps by, so that the size comes just below a target: asks for sizes at some units, one by one.

    Secant steps until the target lies between two sizes, then false position.

    Args:
        target_bytes: never exceeded by the result; missed by less than `TOLERANCE` of it where `MAX_PROBES` sizes are enough to find that.
        bytes_per_unit: estimate of how much a unit saves, within a factor of `LARGEST_MISJUDGEMENT`.

    Attributes:
        next_units: units whose size, with the real coder, `tell` wants to know; it falls with the units, though not strictly. None when
            it knows enough.
        best_units: units of the largest size so far that fits, None if none does.
    """

    def __init__(self, target_bytes: int, bytes_per_unit: float) -> None:
        self._target, self._estimate = target_bytes, bytes_per_unit
        self._found: dict[int, int] = {}
        self.next_units: int | None = 0
        self.best_units: int | None = None

    def tell(self, size: int) -> None:
        """Take in the size at `next_units`, and choose the next ones.

        Raises:
            TargetError: no size at or below the target was found.
        """
        units, target = self.next_units, self._target
        assert units is not None
        self._found[units] = size
        if size <= target and (self.best_units is None or size > self._found[self.best_units]):
            self.best_units = units
        self.next_units = self._choose(units)
        if self.next_units is None and self.best_units is None:
            raise TargetError(f"quantize.target_bytes: expected to reach {target:,}, the smallest size found is "
                              f"{min(self._found.values()):,}")

    def _choose(self, units: int) -> int | None:
        found, target, size = self._found, self._target, self._found[units]
        if target * (1 - TOLERANCE) <= size <= target or len(found) == MAX_PROBES:
            return None
        if list(found.values())[-2:] == [size] * 2 and size < target:
            return None  # no finer steps are left
        above, below = (max((s for s in found if found[s] > target), default=None),
                        min((s for s in found if found[s] <= target), default=None))
        aim = target * (1 - TOLERANCE / 2)
        if above is None or below is None:
            return units + (round((size - aim) / self._slope()) or (1 if size > aim else -1))
        if below - above <= 1:
            return None
        middle = above + (found[above] - aim) / (found[above] - found[below]) * (below - above)
        return min(max(round(middle), above + 1), below - 1)

    def _slope(self) -> float:
        """Bytes per unit from the last two sizes, no further from the estimate than it may be."""
        if len(self._found) < 2:
            return self._estimate
        before, last = list(self._found)[-2:]
        slope = (self._found[before] - self._found[last]) / (last - before)
        return min(max(slope, self._estimate / LARGEST_MISJUDGEMENT), self._estimate * LARGEST_MISJUDGEMENT)
