"""GPTQ against optimal brain surgeon on the explicit inverse, brute force and identities; weights in fp64 where codes must be equal."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from lib.artifacts.quantized import clip_range
from lib.quantization.clipping import row_scales
from lib.quantization.gptq import Problem, factorize, round_gptq, row_errors
from lib.quantization.grid import round_to_grid
from tests.quantization.power_law import (
    DAMPING,
    damped,
    entropy_bits,
    make_clip,
    make_hessian,
    make_problem,
    make_steps,
    make_weight,
    quadratic_error,
)

Array = npt.NDArray[Any]


def eliminate(weight: Array, hessian: Array, rows: Array, columns: Array, *, largest: int, order: Array) -> Array:
    """OBQ (arXiv:2208.11580) in a given order, on the explicit inverse: after each column, all others move to their best place given
    that it stays where it was rounded to (optimal brain surgeon), and the column leaves the inverse (Gaussian elimination)."""
    weight, codes = weight.copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian)
    left = np.ones(len(hessian), bool)
    for j in order:
        codes[:, j] = np.clip(np.round(weight[:, j] / (rows * columns[j])), -largest, largest)
        error = weight[:, j] - codes[:, j] * rows * columns[j]
        left[j] = False
        weight[:, left] -= np.outer(error / inverse[j, j], inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def run(problem: Problem, rows: Tensor, columns: Tensor | None = None, *, bits: int | None = None, block_size: int = 16,
        rate_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and losses (R,) of one problem."""
    columns = torch.ones_like(problem.weight[0]) if columns is None else columns
    codes, losses = round_gptq([problem], [rows], [columns], bits=bits, block_size=block_size, rate_weight=rate_weight)
    return codes[0], losses[0]


def error_of(problem: Problem, codes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return problem.weight - codes * rows.double()[:, None] * columns.double()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("shape", "bits", "block_size"),
                         [((24, 48), 5, 16), ((7, 33), 3, 1), ((1, 20), 2, 128), ((40, 64), 8, 24), ((24, 48), None, 16)])
def test_equals_column_by_column_elimination(shape: tuple[int, int], bits: int | None, block_size: int, act_order: bool) -> None:
    problem, (rows, columns) = make_problem(*shape, act_order=act_order), make_steps(*shape, mean=0.2 / clip_range(bits or 6))
    codes, _ = run(problem, rows, columns, bits=bits, block_size=block_size)
    hessian = make_hessian(shape[1])
    order = np.argsort(-hessian.diagonal().numpy(), kind="stable") if act_order else np.arange(shape[1])
    expected = eliminate(problem.weight.numpy(), damped(hessian).numpy(), rows.double().numpy(), columns.double().numpy(),
                         largest=clip_range(bits), order=order)
    assert codes.dtype == torch.int16
    np.testing.assert_array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("bits", [5, None])
def test_propagated_errors_add_up_to_the_quadratic_error(act_order: bool, bits: int | None) -> None:
    """sum ((w - q)/U_jj)^2 == tr(E H_damped E^T), where w, rounded to q, is what the errors of earlier columns left of the weight."""
    problem, (rows, columns), hessian = make_problem(20, 48, act_order=act_order), make_steps(20, 48), damped(make_hessian(48))
    codes, losses = run(problem, rows, columns, bits=bits)
    order = problem.factor.order
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    left, steps, total = problem.weight[:, order].clone(), (rows.double()[:, None] * columns.double())[:, order], 0.0
    for j in range(48):
        assert torch.equal(round_to_grid(left[:, j], steps[:, j], bits), codes[:, order[j]].double())
        error = (left[:, j] - codes[:, order[j]] * steps[:, j]) / upper[j, j]
        left[:, j:] -= torch.outer(error, upper[j, j:])
        total += float(error.square().sum())
    error = error_of(problem, codes, rows, columns)
    assert total == pytest.approx(quadratic_error(error, hessian), rel=1e-9)
    torch.testing.assert_close(losses, row_errors(error, hessian), rtol=1e-9, atol=0.0)


def test_errors_are_the_diagonal_of_the_quadratic_form() -> None:
    error, hessian = make_weight(6, 9), make_hessian(9)
    full = error.double() @ hessian.double() @ error.double().T
    torch.testing.assert_close(row_errors(error, hessian), full.diagonal())
    assert quadratic_error(error, hessian) == pytest.approx(float(full.trace()))


def test_upper_is_the_cholesky_factor_of_the_inverse() -> None:
    hessian = make_hessian(40)
    factor = factorize("test", hessian, DAMPING, act_order=True)
    inverse = torch.linalg.inv(damped(hessian)[factor.order][:, factor.order])
    expected = torch.linalg.cholesky(inverse, upper=True)
    torch.testing.assert_close(factor.upper, expected, rtol=1e-9, atol=1e-9)
    assert (hessian.diagonal()[factor.order].diff() <= 0).all()
    torch.testing.assert_close(factor.error_scales()[factor.order], expected.diagonal().float())


def test_codes_do_not_depend_on_the_block_size() -> None:
    problem, steps = make_problem(16, 50), make_steps(16, 50)
    for rate_weight in (0.0, 0.1):
        expected, losses = run(problem, *steps, block_size=50, rate_weight=rate_weight)
        for block_size in (1, 7, 49, 1000):
            codes, other = run(problem, *steps, block_size=block_size, rate_weight=rate_weight)
            assert torch.equal(codes, expected)
            torch.testing.assert_close(other, losses)


@pytest.mark.parametrize("rate_weight", [0.0, 0.1])
def test_problems_in_a_batch_are_apart(rate_weight: float) -> None:
    """Different weights, Hessians, orders and steps; one with pruned weights, one with dead columns."""
    pruned = make_weight(12, 30, 7) > 0.05
    dead = torch.ones(30)
    dead[[2, 9]] = 0
    problems = [make_problem(12, 30, 0), make_problem(12, 30, 1, pruned=pruned), make_problem(12, 30, 2, act_order=False),
                Problem(make_weight(12, 30, 3).double(), factorize("test", make_hessian(30, 3) * dead * dead[:, None], DAMPING, True))]
    steps = [make_steps(12, 30, seed) for seed in range(4)]
    codes, losses = round_gptq(problems, [rows for rows, _ in steps], [columns for _, columns in steps], bits=None, block_size=8,
                               rate_weight=rate_weight)
    for problem, step, its_codes, its_losses in zip(problems, steps, codes, losses, strict=True):
        alone, losses_alone = run(problem, *step, block_size=8, rate_weight=rate_weight)
        assert torch.equal(its_codes, alone)
        torch.testing.assert_close(its_losses, losses_alone)
    assert len({tuple(problem.factor.order.tolist()) for problem in problems}) == 4


def test_fp32_is_as_good_as_fp64() -> None:
    problem, steps = make_problem(64, 128), make_steps(64, 128)
    single = Problem(problem.weight.float(), problem.factor)
    errors = [quadratic_error(error_of(problem, run(one, *steps)[0], *steps), make_hessian(128)) for one in (problem, single)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    hessian = torch.rand(40, generator=torch.Generator().manual_seed(0)).diag()
    problem = Problem(make_weight(16, 40), factorize("test", hessian, DAMPING, act_order=True))
    rows, columns = make_steps(16, 40)
    for bits in (3, None):
        codes, _ = run(problem, rows, columns, bits=bits)
        assert torch.equal(codes, round_to_grid(problem.weight, rows[:, None] * columns, bits).to(torch.int16))


def test_is_near_the_best_codes_of_all() -> None:
    """Two bits and four columns: 81 choices for each row. Greedy is not optimal, but no worse than rounding to nearest on average."""
    weight, hessian = make_weight(200, 4), make_hessian(4, exponent=2.0)
    scales = row_scales(weight, 2, make_clip("mse"))
    codes, _ = run(Problem(weight, factorize("test", hessian, DAMPING, act_order=True)), scales, bits=2)
    choices = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * 4)  # (81, C)
    errors = weight[:, None] - choices * scales[:, None, None]  # (R, 81, C)
    best_total = float(torch.einsum("rkc,cd,rkd->rk", errors, hessian, errors).amin(1).double().sum())
    nearest_codes = round_to_grid(weight, scales[:, None], 2)
    found, nearest = (quadratic_error(weight - each * scales[:, None], hessian) for each in (codes, nearest_codes))
    assert best_total * (1 - 1e-5) < found < best_total + 0.5 * (nearest - best_total)


def raw_inverse(weight: Tensor, hessian: Tensor, scales: Tensor, bits: int, order: Tensor) -> Tensor:
    """pr585's procedure: the inverse itself instead of its Cholesky factor."""
    inverse = torch.linalg.inv(damped(hessian)[order][:, order])
    columns, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int16)
    for j in range(len(order)):
        codes[:, j] = round_to_grid(columns[:, j], scales.double(), bits).to(torch.int16)
        error = (columns[:, j] - codes[:, j] * scales.double()) / inverse[j, j]
        columns[:, j + 1:] -= error[:, None] * inverse[j, j + 1:]
    return codes[:, torch.argsort(order)]


def test_is_better_than_the_published_mistakes() -> None:
    problem, hessian = make_problem(128, 256), make_hessian(256)
    scales = row_scales(problem.weight.float(), 5, make_clip("mse"))
    errors = {name: quadratic_error(problem.weight - codes * scales.double()[:, None], hessian) for name, codes in {
        "gptq": run(problem, scales, bits=5, block_size=64)[0],
        "natural order": run(make_problem(128, 256, act_order=False), scales, bits=5)[0],
        "nearest": round_to_grid(problem.weight, scales[:, None], 5),
        "raw inverse": raw_inverse(problem.weight, hessian, scales, 5, torch.argsort(hessian.diagonal()))}.items()}
    assert errors["gptq"] < errors["natural order"]
    assert errors["gptq"] < 0.6 * errors["raw inverse"]
    assert errors["raw inverse"] < errors["nearest"]


def test_dead_columns_become_zero_and_leave_the_others_alone() -> None:
    weight, hessian = make_weight(8, 30).double(), make_hessian(30)
    rows, columns = make_steps(8, 30)
    live = torch.ones(30, dtype=torch.bool)
    live[[3, 17]] = False
    factor = factorize("test", hessian * live * live[:, None], DAMPING, act_order=True)
    codes, losses = run(Problem(weight, factor), rows, columns)
    assert torch.equal(factor.dead, ~live)
    assert codes[:, ~live].abs().sum() == 0
    without = factorize("test", hessian[live][:, live], DAMPING, act_order=True)
    torch.testing.assert_close(factor.upper[:28, :28], without.upper)  # dead columns come last, and do not count for the damping
    expected, its_losses = run(Problem(weight[:, live], without), rows, columns[live])
    assert torch.equal(codes[:, live], expected)
    torch.testing.assert_close(losses, its_losses)


def test_input_that_was_always_zero() -> None:
    codes, losses = run(Problem(make_weight(8, 5), factorize("test", torch.zeros(5, 5), DAMPING, act_order=True)), torch.full((8,), 0.01))
    assert codes.abs().sum() == 0 and losses.abs().sum() == 0


def test_pruned_weights_are_zero_and_others_make_up_for_them() -> None:
    problem, (rows, columns), hessian = make_problem(32, 64), make_steps(32, 64, mean=0.004), damped(make_hessian(64))
    pruned = problem.weight.abs() < problem.weight.abs().quantile(0.3)
    codes, losses = run(Problem(problem.weight, problem.factor, pruned), rows, columns)
    assert codes[pruned].abs().sum() == 0
    error = error_of(problem, codes, rows, columns)
    torch.testing.assert_close(losses, row_errors(error, hessian), rtol=1e-9, atol=0.0)
    afterwards = run(problem, rows, columns)[0].masked_fill(pruned, 0)
    assert quadratic_error(error, hessian) < 0.7 * quadratic_error(error_of(problem, afterwards, rows, columns), hessian)


@pytest.mark.parametrize("rate_weight", [0.0, 0.06, 0.5, 3.0])
def test_codes_cost_the_least_error_and_bits(rate_weight: float) -> None:
    """Uncorrelated inputs, so that columns are apart: k_j (x - q)^2 + rate_weight * length(q) is least among all integers q."""
    num_rows, num_columns = 6, 40
    diagonal = 0.1 + torch.rand(num_columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Problem(make_weight(num_rows, num_columns).double() * torch.tensor([1, 1, 3, 3, 9, 9])[:, None],
                      factorize("test", diagonal.diag(), DAMPING, act_order=True))
    rows, columns = make_steps(num_rows, num_columns, mean=0.03)
    codes, _ = run(problem, rows, columns, rate_weight=rate_weight)
    x = (problem.weight / rows.double()[:, None] / columns.double()).numpy()
    cost = (columns.double().square() * (diagonal + DAMPING * diagonal.mean())).numpy()  # of one step in each column
    cost /= cost.mean()
    candidates = np.arange(-200, 201)
    for row in range(num_rows):
        mean = np.abs(x[row]).mean()
        theta = brentq(  # type: ignore[no-untyped-call]
            lambda theta, mean=mean: 2 * theta / (1 - theta**2) - mean, 1e-9, 1 - 1e-9)
        lengths = -np.log2((1 - theta) / (1 + theta) * theta ** np.abs(candidates))  # of the two-sided geometric distribution
        totals = cost[:, None] * (x[row][:, None] - candidates) ** 2 + rate_weight * lengths
        np.testing.assert_array_equal(codes[row].numpy(), candidates[totals.argmin(1)])


def test_more_weight_on_the_rate_gives_fewer_bits_and_more_error() -> None:
    problem, steps = make_problem(64, 64), make_steps(64, 64, mean=0.03)
    results = [run(problem, *steps, rate_weight=rate_weight) for rate_weight in (0.0, 0.05, 0.2, 1.0)]
    entropies, losses = [entropy_bits(codes) for codes, _ in results], [float(losses.sum()) for _, losses in results]
    assert entropies == sorted(entropies, reverse=True) and losses == sorted(losses)
    assert entropies[2] < entropies[0] - 0.1 and len(set(entropies)) == 4


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (5, 15), (8, 127), (None, 32767)])
def test_codes_reach_the_end_of_the_grid_and_not_beyond(bits: int | None, largest: int) -> None:
    """Errors of clipped weights are propagated like all others: the returned losses are those of the codes."""
    problem, columns = make_problem(8, 24), torch.ones(24)
    rows = torch.full((8,), float(problem.weight.abs().amax()) / largest / 4)
    codes, losses = run(problem, rows, bits=bits)
    assert (int(codes.min()), int(codes.max())) == (-largest, largest)
    expected = row_errors(error_of(problem, codes, rows, columns), damped(make_hessian(24)))
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0.0)
    fine = torch.full((8,), float(problem.weight.abs().amax()) / 20000)
    assert 15000 < int(run(problem, fine)[0].abs().max()) < 32767


def test_damping_is_raised_until_the_decomposition_exists() -> None:
    hessian = make_hessian(20).double()
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * float(hessian.diagonal().mean())  # smaller damping than 5 % leaves it indefinite
    factor = factorize("test", ((vectors * values) @ vectors.T).float(), 1e-4, act_order=True)
    assert factor.damping == pytest.approx(0.1)
    assert factor.upper.isfinite().all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_hopeless_hessians_are_errors_that_name_the_input(value: float) -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up: .*not positive definite even with damping 1000"):
        factorize("blocks.0.mlp.up", torch.tensor([[1.0, 1e7], [1e7, 1.0]]), 0.01, act_order=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up: expected a finite Hessian"):
        factorize("blocks.0.mlp.up", torch.tensor([[1.0, value], [value, 1.0]]), 0.01, act_order=True)
