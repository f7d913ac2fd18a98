"""GPTQ with feedback across outputs: the identity of its losses, sequential rounding by loops, and GPTQ where outputs are apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lib.quantization.gptq import TILE, Problem, factorize, round_gptq, round_two_sided
from tests.quantization.power_law import DAMPING, damped, entropy_bits, make_hessian, make_problem, make_steps, quadratic_error


def run(problem: Problem, outputs: Tensor, rows: Tensor, columns: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Codes (R, C) and the loss of one problem."""
    codes, losses = round_two_sided([problem], [factorize("outputs", outputs, DAMPING, act_order=True)], [rows], [columns], **options)
    return codes[0], losses[0]


def loss_of(problem: Problem, codes: Tensor, outputs: Tensor, rows: Tensor, columns: Tensor) -> float:
    """tr(G E H E^T), both damped."""
    error = problem.weight - codes * rows.double()[:, None] * columns.double()
    return float(((damped(outputs) @ error) * (error @ damped(make_hessian(error.shape[1])))).sum())


@pytest.mark.parametrize("shape", [(5, 7), (TILE, TILE), (2 * TILE + 5, TILE + 1), (TILE - 1, 2 * TILE)])
@pytest.mark.parametrize("rate_weight", [0.0, 0.1])
def test_what_rounding_leaves_adds_up_to_the_loss(shape: tuple[int, int], rate_weight: float) -> None:
    problem, outputs, steps = make_problem(*shape), make_hessian(shape[0], seed=1), make_steps(*shape)
    codes, loss = run(problem, outputs, *steps, rate_weight=rate_weight)
    assert float(loss) == pytest.approx(loss_of(problem, codes, outputs, *steps), rel=1e-9)


def test_equals_rounding_one_weight_after_the_other() -> None:
    shape = TILE + 6, TILE + 3
    problem, outputs, (rows, columns) = make_problem(*shape), make_hessian(shape[0], seed=1), make_steps(*shape)
    codes, _ = run(problem, outputs, rows, columns)
    of_rows, of_columns = (factorize("", hessian, DAMPING, act_order=True) for hessian in (outputs, make_hessian(shape[1])))
    a, d = (torch.linalg.inv(factor.upper) for factor in (of_rows, of_columns))
    weight = problem.weight[of_rows.order][:, of_columns.order]
    steps = (rows.double()[:, None] * columns.double())[of_rows.order][:, of_columns.order]
    error = torch.zeros_like(weight)
    for i in range(shape[0]):
        for j in range(shape[1]):  # what (a^T E d)_ij would be for q = 0, over a_ii d_jj
            error[i, j] = weight[i, j]
            x = a[:i + 1, i] @ error[:i + 1, :j + 1] @ d[:j + 1, j] / (a[i, i] * d[j, j])
            code = float((x / steps[i, j]).round())
            assert code == codes[of_rows.order[i], of_columns.order[j]]
            error[i, j] -= code * steps[i, j]


@pytest.mark.parametrize("rate_weight", [0.0, 0.06])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_are_apart_give_the_codes_of_gptq(rate_weight: float, dtype: torch.dtype) -> None:
    shape = 70, 90
    problem, steps = make_problem(*shape), make_steps(*shape)
    problem = Problem(problem.weight.to(dtype), problem.factor, torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.1)
    diagonal = 0.1 + torch.rand(shape[0], generator=torch.Generator().manual_seed(1))
    codes, loss = run(problem, diagonal.diag(), *steps, rate_weight=rate_weight)
    expected, losses = round_gptq([problem], [steps[0]], [steps[1]], bits=None, block_size=TILE, rate_weight=rate_weight)
    assert torch.equal(codes, expected[0])
    assert not codes[problem.pruned].any()
    assert float(loss) == pytest.approx(float((losses[0] * damped(diagonal.diag()).diagonal()).sum()), rel=1e-4)


def test_the_loss_is_lower_than_without_feedback_at_the_same_steps() -> None:
    shape = 64, 48
    problem, outputs, steps = make_problem(*shape), make_hessian(shape[0], seed=1), make_steps(*shape)
    codes, loss = run(problem, outputs, *steps)
    alone, _ = round_gptq([problem], [steps[0]], [steps[1]], bits=None, block_size=TILE)
    assert float(loss) < 0.8 * loss_of(problem, alone[0], outputs, *steps)
    assert abs(entropy_bits(codes) - entropy_bits(alone[0])) < 0.05
    assert quadratic_error(problem.weight - codes * steps[0].double()[:, None] * steps[1].double(), make_hessian(48)) > 0


def test_problems_in_a_batch_are_apart() -> None:
    shape = TILE + 2, 2 * TILE
    problems, steps = [make_problem(*shape, seed) for seed in (0, 1)], [make_steps(*shape, seed) for seed in (0, 1)]
    outputs = [factorize("", make_hessian(shape[0], seed), DAMPING, act_order=True) for seed in (2, 3)]
    codes, losses = round_two_sided(problems, outputs, [rows for rows, _ in steps], [columns for _, columns in steps])
    for number in range(2):
        alone, loss = round_two_sided([problems[number]], [outputs[number]], *([each] for each in steps[number]))
        assert torch.equal(alone[0], codes[number]) and float(loss[0]) == pytest.approx(float(losses[number]))
