import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.artifacts.quantized import OCTAVE, scales_of
from lib.quantization.allocation import (
    COLUMN_LIMIT,
    MATRIX_RESOLUTION,
    MAX_PROBES,
    OCTAVES_DOWN,
    OCTAVES_UP,
    RESOLUTION,
    ROW_LIMIT,
    SAMPLE_ROWS,
    TOLERANCE,
    SizeSearch,
    StepCurve,
    TargetError,
    allocate,
    bits_per_octave,
    column_exponents,
    measure_curve,
    row_exponents,
)
from lib.quantization.gptq import Problem, factorize, round_gptq
from tests.quantization.power_law import DAMPING, entropy_bits, make_hessian, make_problem, make_weight


def meet_target(measure: Callable[[int], int], target_bytes: int, bytes_per_unit: float) -> int:
    search = SizeSearch(target_bytes, bytes_per_unit)
    while search.next_units is not None:
        search.tell(measure(search.next_units))
    assert search.best_units is not None
    return search.best_units


def octaves(exponents: torch.Tensor) -> torch.Tensor:
    return exponents.double() / OCTAVE


def test_columns_have_steps_proportional_to_the_cholesky_diagonal() -> None:
    problem = make_problem(8, 40)
    upper = problem.factor.upper.diagonal()[torch.argsort(problem.factor.order)].log2()
    found = octaves(column_exponents(problem))
    assert float((found - (upper - upper.mean())).abs().max()) <= RESOLUTION / OCTAVE / 2 + 1e-6
    assert abs(float(found.mean())) < RESOLUTION / OCTAVE / 4  # the geometric mean of the steps is 1
    assert len(found.unique()) > 5 and not (column_exponents(problem) % RESOLUTION).any()


def test_dead_columns_count_for_nothing() -> None:
    live = torch.ones(30, dtype=torch.bool)
    live[[3, 17]] = False
    hessian = make_hessian(30)
    found = column_exponents(Problem(make_weight(8, 30), factorize("test", hessian * live * live[:, None], DAMPING, True)))
    expected = column_exponents(Problem(make_weight(8, 28), factorize("test", hessian[live][:, live], DAMPING, True)))
    assert torch.equal(found[live], expected) and not found[~live].any()
    nothing = column_exponents(Problem(make_weight(8, 30), factorize("test", torch.zeros(30, 30), DAMPING, True)))
    assert nothing.dtype == torch.int16 and not nothing.any()


def test_rows_have_steps_proportional_to_one_over_the_root_of_the_gradients() -> None:
    gradients = 1e-9 * (2 * torch.randn(200, generator=torch.Generator().manual_seed(0)).clamp(-0.7, 0.7)).exp()
    expected = -gradients.double().log2() / 2
    found = octaves(row_exponents(gradients))
    assert float((found - (expected - expected.mean())).abs().max()) <= RESOLUTION / OCTAVE / 2 + 1e-6
    assert not (row_exponents(gradients) % RESOLUTION).any()


def test_no_step_is_further_from_the_mean_than_the_limit() -> None:
    rows = octaves(row_exponents(torch.tensor([1.0] * 50 + [1e4, 0.0, 1e-30])))
    limit = math.log2(ROW_LIMIT)
    assert float(rows.abs().max()) == pytest.approx(limit, abs=RESOLUTION / OCTAVE)
    assert float(rows[50]) < -2 and torch.equal(rows[51], rows[52])
    columns = octaves(column_exponents(Problem(torch.ones(1, 9), factorize("test", torch.tensor([1.0] * 8 + [1e8]).diag(), 1e-12, True))))
    assert float(columns.abs().max()) == pytest.approx(math.log2(COLUMN_LIMIT), abs=RESOLUTION / OCTAVE)
    assert not row_exponents(torch.zeros(4)).any()  # no gradient at all: all rows alike


def make_curves(num_rows: int = 40) -> tuple[Problem, torch.Tensor, torch.Tensor, torch.Tensor, StepCurve]:
    problem = make_problem(num_rows, 48)
    problem = Problem(problem.weight.float(), problem.factor)
    gradients = torch.rand(num_rows, generator=torch.Generator().manual_seed(1)) + 0.1
    rows, columns = row_exponents(gradients), column_exponents(problem)
    return problem, gradients, rows, columns, measure_curve(problem, gradients, rows, columns)


def test_a_curve_is_what_rounding_to_nearest_costs() -> None:
    problem, gradients, rows, columns, curve = make_curves()
    steps = torch.exp2(octaves(rows))[:, None] * torch.exp2(octaves(columns))
    upper = problem.factor.upper.diagonal()[torch.argsort(problem.factor.order)]
    octave = int(OCTAVE // (curve.exponents[1] - curve.exponents[0]))
    for index in range(len(curve.exponents) - 1, len(curve.exponents) - 9 * octave, -20):
        scales = steps * 2.0 ** (int(curve.exponents[index]) / OCTAVE)
        codes = (problem.weight.double() / scales).round()
        loss = (gradients.double()[:, None] * ((problem.weight - codes * scales) / upper).square()).sum() / 2
        assert float(curve.losses[index]) == pytest.approx(float(loss), rel=1e-3)
        assert float(curve.num_bits[index]) == pytest.approx(entropy_bits(codes) * codes.numel(), rel=1e-3, abs=0.1)


@pytest.mark.parametrize("outlier", [1.0, 1e4])
def test_a_curve_is_bit_for_bit_that_of_one_step_after_the_other(outlier: float) -> None:
    """Order-0 entropies by bincount, and losses as numbers of the host, as they were before the loop stopped waiting for the device."""
    problem, gradients, rows, columns, _ = make_curves()
    problem.weight[3, 5] *= outlier
    curve = measure_curve(problem, gradients, rows, columns)
    x = problem.weight / scales_of(rows)[:, None] / scales_of(columns)
    weights = (gradients * scales_of(rows).square())[:, None] * (scales_of(columns) / problem.factor.error_scales()).square()
    exponents = curve.exponents[-((OCTAVES_UP + OCTAVES_DOWN) * OCTAVE // MATRIX_RESOLUTION + 1):]
    bits, losses = [], []
    for scale in scales_of(exponents).tolist():
        codes = (x / scale).round()
        losses.append(float((weights * (x - codes * scale).square()).sum(dtype=torch.float64)) / 2)
        counts = torch.bincount((codes - codes.min()).flatten().to(torch.int64))
        probabilities = counts[counts > 0].double() / codes.numel()
        bits.append(float(-(probabilities * probabilities.log2()).sum()))
    assert torch.equal(curve.num_bits[-len(bits):], torch.tensor(bits).double() * x.numel())
    assert torch.equal(curve.losses[-len(bits):], torch.tensor(losses).double())


def test_a_curve_falls_in_bits_and_rises_in_loss_and_follows_the_high_rate_law() -> None:
    problem, gradients, rows, columns, curve = make_curves()
    numel = problem.weight.numel()
    assert (curve.exponents.diff() > 0).all()
    assert (curve.num_bits.diff() <= 0.02 * numel).all() and (curve.losses.diff() >= -0.05 * curve.losses[1:]).all()
    assert float(curve.num_bits[-1]) < 0.2 * numel
    upper = problem.factor.upper.diagonal()[torch.argsort(problem.factor.order)]
    weights = gradients[:, None] * (torch.exp2(octaves(rows))[:, None] * torch.exp2(octaves(columns)) / upper).square()
    for index in (0, 40, len(curve.exponents) // 3):
        step = 2.0 ** (int(curve.exponents[index]) / OCTAVE)
        assert float(curve.losses[index]) == pytest.approx(float(weights.sum()) * step**2 / 24, rel=0.05)
    octave = int(OCTAVE // (curve.exponents[1] - curve.exponents[0]))
    assert float(curve.num_bits[0] - curve.num_bits[octave]) == pytest.approx(numel)  # 1 bit per octave


def test_a_curve_of_many_rows_is_that_of_a_sample() -> None:
    problem, gradients, rows, columns, curve = make_curves(5 * SAMPLE_ROWS)
    sample = torch.arange(SAMPLE_ROWS) * 5
    part = measure_curve(Problem(problem.weight[sample], problem.factor), gradients[sample], rows[sample], columns)
    for whole, sampled, factor in zip(vars(curve).values(), vars(part).values(), (1, 5, 5), strict=True):
        torch.testing.assert_close(whole[-100:], sampled[-100:] * factor)


def test_dead_columns_cost_no_bits_and_no_loss_at_high_rate() -> None:
    live = torch.arange(40) % 4 > 0
    hessian = make_hessian(40) * live * live[:, None]
    problem = Problem(make_weight(16, 40), factorize("test", hessian, DAMPING, True))
    rows = torch.zeros(16, dtype=torch.int16)
    curve = measure_curve(problem, torch.ones(16), rows, column_exponents(problem))
    assert float(curve.num_bits[0] - curve.num_bits[16]) == pytest.approx(16 * 30)
    other = Problem(problem.weight + 100 * ~live, problem.factor)
    torch.testing.assert_close(measure_curve(other, torch.ones(16), rows, column_exponents(problem)).losses, curve.losses)


def test_the_curve_predicts_the_loss_of_gptq() -> None:
    """1/2 sum g ((w - q)/U_jj)^2 with the weights as they are, instead of what earlier errors left of them: as good at these steps."""
    problem, gradients, rows, columns, curve = make_curves()
    index = int((curve.num_bits - 3.5 * problem.weight.numel()).abs().argmin())
    scales = torch.exp2(octaves(rows) + int(curve.exponents[index]) / OCTAVE).float()
    codes, losses = round_gptq([problem], [scales], [torch.exp2(octaves(columns)).float()], bits=None, block_size=16)
    assert float((gradients * losses[0]).sum()) / 2 == pytest.approx(float(curve.losses[index]), rel=0.1)
    assert entropy_bits(codes[0]) == pytest.approx(3.5, abs=0.1)


def make_curve(seed: int, num_points: int = 6) -> StepCurve:
    """Convex, and not: some points lie above the line between their neighbours."""
    generator = torch.Generator().manual_seed(seed)
    bits, losses = torch.rand(2, num_points, generator=generator, dtype=torch.float64).add(0.05)
    losses = losses**3 * 10
    return StepCurve(torch.arange(num_points) * 64 - 100, bits.cumsum(0).flip(0) * 100, losses.cumsum(0))


def totals(curves: list[StepCurve], indices: Sequence[int]) -> tuple[float, float]:
    """Bits and loss of all matrices together."""
    chosen = list(zip(curves, indices, strict=True))
    return sum(float(curve.num_bits[index]) for curve, index in chosen), sum(float(curve.losses[index]) for curve, index in chosen)


def cheapest(curve: StepCurve, price: float) -> int:
    costs = [float(loss + price * bits) for bits, loss in zip(curve.num_bits, curve.losses, strict=True)]
    return costs.index(min(costs))


def hull(curves: list[StepCurve]) -> list[tuple[float, float]]:
    """Bits and loss of what is cheapest at some price of a bit, tried at a price between any two at which a choice can change."""
    slopes = sorted(float((curve.losses[m] - curve.losses[n]) / (curve.num_bits[n] - curve.num_bits[m]))
                    for curve in curves for m, n in itertools.combinations(range(len(curve.exponents)), 2))
    prices = [slopes[0] / 2, *(math.sqrt(one * other) for one, other in itertools.pairwise(slopes)), slopes[-1] * 2]
    return [totals(curves, [cheapest(curve, price) for curve in curves]) for price in prices]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.floats(0, 1.1))
def test_allocation_is_the_best_of_all_at_its_bits(seed: int, share: float) -> None:
    curves = [make_curve(seed + n) for n in range(3)]
    budget = share * sum(float(curve.num_bits[0]) for curve in curves)
    num_bits, loss = totals(curves, allocate(curves, budget))
    combinations = [totals(curves, indices) for indices in itertools.product(range(6), repeat=3)]
    assert loss <= min(other for bits, other in combinations if bits <= num_bits) * (1 + 1e-12)
    points = hull(curves)
    fitting = [point for point in points if point[0] <= budget] or [min(points)]
    assert num_bits == pytest.approx(max(fitting)[0])


def test_extremes_and_more_bits_for_less_loss() -> None:
    curves = [make_curve(seed, 20) for seed in range(4)]
    assert allocate(curves, 0.0) == [19] * 4
    assert allocate(curves, 1e9) == [0] * 4
    total = sum(float(curve.num_bits[0]) for curve in curves)
    bits, losses = zip(*(totals(curves, allocate(curves, share * total)) for share in torch.linspace(0, 1, 30).tolist()), strict=True)
    assert list(losses) == sorted(losses, reverse=True) and list(bits) == sorted(bits) and len(set(bits)) > 10


def test_bits_per_octave() -> None:
    curve = make_curves()[-1]
    numel = 40 * 48
    assert bits_per_octave(curve, 0) == pytest.approx(numel)
    middle = int((curve.num_bits - 2 * numel).abs().argmin())
    other = int((curve.exponents - curve.exponents[middle] - OCTAVE).abs().argmin())
    assert bits_per_octave(curve, middle) == pytest.approx(float(curve.num_bits[middle] - curve.num_bits[other]))
    assert bits_per_octave(curve, len(curve.exponents) - 1) == 0


@dataclass
class Sizes:
    """A size function like that of a coder: so many bits per weight fewer for every octave of the steps, less where most codes are 0."""

    num_weights: int
    units_per_octave: int
    start_bits: float
    fixed_bytes: int = 0
    jitter: float = 0.0
    calls: list[int] = field(default_factory=list)

    def measure(self, units: int) -> int:
        self.calls.append(units)
        return self.size(units)

    def size(self, units: int) -> int:
        bits = 0.5 * math.log2(1 + 4 ** (self.start_bits - units / self.units_per_octave))
        noise = (units * 2654435761 % 1000 / 1000 - 0.5) * self.jitter
        return self.fixed_bytes + round(self.num_weights / 8 * bits * (1 + noise))

    def slope(self) -> float:
        """Bytes per unit at the start."""
        return max(1e-6, self.size(0) - self.size(self.units_per_octave)) / self.units_per_octave


@settings(max_examples=150)
@given(st.builds(Sizes, st.integers(10**5, 10**8), st.integers(1, 60).map(OCTAVE.__mul__), st.floats(1.0, 8.0), st.integers(0, 10**5),
                 st.sampled_from([0.0, 2e-4])), st.floats(0.7, 1.4), st.floats(0.5, 2.0))
def test_the_target_is_met_from_below(sizes: Sizes, ratio: float, misjudged: float) -> None:
    """From half a bit per weight on, wherever the search starts within 40 % of the target and knows the slope within a factor of 2."""
    target = round(sizes.size(0) * ratio)
    if target < sizes.fixed_bytes + sizes.num_weights // 16:
        return
    units = meet_target(sizes.measure, target, sizes.slope() * misjudged)
    assert target * (1 - TOLERANCE) <= sizes.size(units) <= target
    assert units in sizes.calls and len(sizes.calls) <= MAX_PROBES


@settings(max_examples=100)
@given(st.lists(st.integers(-1000, 5000), min_size=40, max_size=40), st.integers(1, 60_000))
def test_steep_and_uneven_sizes_are_never_above_the_target(steps: list[int], target: int) -> None:
    """Of a function that falls on the whole; the closest size that was found below is taken."""
    sizes = [max(0, sum(steps[n:])) for n in range(len(steps) + 1)]
    calls: dict[int, int] = {}

    def measure(units: int) -> int:
        calls[units] = sizes[min(max(units + 20, 0), len(steps))]
        return calls[units]

    try:
        units = meet_target(measure, target, 2000)
    except TargetError:
        assert all(size > target for size in calls.values()) and len(calls) == MAX_PROBES
    else:
        assert calls[units] == max(size for size in calls.values() if size <= target)
    assert len(calls) <= MAX_PROBES


def test_a_target_below_every_size_is_an_error_that_names_the_smallest() -> None:
    with pytest.raises(TargetError, match=r"quantize\.target_bytes: expected to reach 999, the smallest size found is 1,000"):
        meet_target(lambda units: 1000 + (units < 50), 999, 1.0)
