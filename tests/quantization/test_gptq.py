from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lib.artifacts.quantized import clip_range, dequantize
from lib.quantization.gptq import factorize, quadratic_error, round_gptq, round_with_best_scales
from lib.quantization.grid import multiply_scales, round_to_grid, row_scales
from tests.quantization.power_law import make_clip, make_hessian, make_weight

Array = npt.NDArray[Any]
DAMPING = 0.01


def eliminate(weight: Array, hessian: Array, scales: Array, largest: int, order: Array) -> Array:
    """OBQ (arXiv:2208.11580) in a given order, on the explicit inverse: after each column, all others move to their best place given
    that it stays where it was rounded to (optimal brain surgeon), and the column leaves the inverse (Gaussian elimination)."""
    weight, codes = weight.copy(), np.zeros(weight.shape)
    inverse = np.linalg.inv(hessian + DAMPING * np.diag(hessian).mean() * np.eye(len(hessian)))
    left = np.ones(len(hessian), bool)
    for j in order:
        codes[:, j] = np.clip(np.round(weight[:, j] / scales), -largest, largest)
        error = weight[:, j] - codes[:, j] * scales
        left[j] = False
        weight[:, left] -= np.outer(error / inverse[j, j], inverse[j, left])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return codes


def run(weight: Tensor, hessian: Tensor, bits: int = 5, *, block_size: int = 16, act_order: bool = True) -> tuple[Tensor, Tensor]:
    scales = row_scales(weight.float(), bits, make_clip("mse"))
    return round_gptq(weight, scales, bits, factorize("test", hessian, DAMPING, act_order), block_size), scales


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("shape", "bits", "block_size"), [((24, 48), 5, 16), ((7, 33), 3, 1), ((1, 20), 2, 128), ((40, 64), 8, 24)])
def test_equals_column_by_column_elimination(shape: tuple[int, int], bits: int, block_size: int, act_order: bool) -> None:
    num_rows, num_columns = shape
    weight, hessian = make_weight(num_rows, num_columns).double(), make_hessian(num_columns)
    codes, scales = run(weight, hessian, bits, block_size=block_size, act_order=act_order)
    diagonal = hessian.diagonal().numpy()
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(num_columns)
    expected = eliminate(weight.numpy(), hessian.double().numpy(), scales.double().numpy(), clip_range(bits), order)
    np.testing.assert_array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("act_order", [True, False])
def test_propagated_errors_add_up_to_the_quadratic_error(act_order: bool) -> None:
    """sum ((w - q)/U_jj)^2 == tr(E H_damped E^T), where w, rounded to q, is what the errors of earlier columns left of the weight."""
    weight, hessian = make_weight(20, 48).double(), make_hessian(48)
    codes, scales = run(weight, hessian, act_order=act_order)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(48, dtype=torch.float64)
    order = factorize("test", hessian, 0.01, act_order).order
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    columns, result, total = weight[:, order].clone(), dequantize(codes, scales).double()[:, order], 0.0
    for j in range(48):
        assert torch.equal(round_to_grid(columns[:, j, None], scales, 5)[:, 0], codes[:, order[j]])
        error = (columns[:, j] - result[:, j]) / upper[j, j]
        columns[:, j:] -= torch.outer(error, upper[j, j:])
        total += float(error.square().sum())
    assert total == pytest.approx(quadratic_error(weight - dequantize(codes, scales).double(), damped), rel=1e-9)


def test_upper_is_the_cholesky_factor_of_the_inverse() -> None:
    hessian = make_hessian(40)
    factor = factorize("test", hessian, 0.01, act_order=True)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(40, dtype=torch.float64)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped[factor.order][:, factor.order]), upper=True)
    torch.testing.assert_close(factor.upper, expected, rtol=1e-9, atol=1e-9)
    assert (hessian.diagonal()[factor.order].diff() <= 0).all()


def test_codes_do_not_depend_on_the_block_size() -> None:
    weight, hessian = make_weight(16, 50).double(), make_hessian(50)
    expected, _ = run(weight, hessian, block_size=50)
    for block_size in (1, 7, 49, 1000):
        assert torch.equal(run(weight, hessian, block_size=block_size)[0], expected)


def test_fp32_is_as_good_as_fp64() -> None:
    weight, hessian = make_weight(64, 128), make_hessian(128)
    errors = []
    for values in (weight, weight.double()):
        codes, scales = run(values, hessian)
        errors.append(quadratic_error(weight - dequantize(codes, scales), hessian))
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight = make_weight(16, 40)
    codes, scales = run(weight, torch.rand(40, generator=torch.Generator().manual_seed(0)).diag())
    assert torch.equal(codes, round_to_grid(weight, scales, 5))


def test_is_near_the_best_codes_of_all() -> None:
    """Two bits and four columns: 81 choices for each row. Greedy is not optimal, but no worse than rounding to nearest on average."""
    weight, hessian = make_weight(200, 4), make_hessian(4, exponent=2.0)
    codes, scales = run(weight, hessian, bits=2)
    choices = torch.cartesian_prod(*[torch.arange(-1.0, 2.0)] * 4)  # (81, C)
    errors = weight[:, None] - choices * scales.float()[:, None, None]  # (R, 81, C)
    best = torch.einsum("rkc,cd,rkd->rk", errors, hessian, errors).amin(1).double()
    best_total = float(best.sum())
    found, nearest = (quadratic_error(weight - dequantize(c, scales), hessian) for c in (codes, round_to_grid(weight, scales, 2)))
    assert best_total * (1 - 1e-5) < found < best_total + 0.5 * (nearest - best_total)


def raw_inverse(weight: Tensor, hessian: Tensor, scales: Tensor, bits: int, order: Tensor) -> Tensor:
    """pr585's procedure: the inverse itself instead of its Cholesky factor."""
    hessian = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(hessian[order][:, order])
    columns, codes = weight.double()[:, order], torch.empty(weight.shape, dtype=torch.int8)
    for j in range(len(order)):
        codes[:, j] = round_to_grid(columns[:, j, None], scales, bits)[:, 0]
        error = (columns[:, j] - codes[:, j] * scales.double()) / inverse[j, j]
        columns[:, j + 1:] -= error[:, None] * inverse[j, j + 1:]
    return codes[:, torch.argsort(order)]


def test_is_better_than_the_published_mistakes() -> None:
    weight, hessian = make_weight(128, 256), make_hessian(256)
    codes, scales = run(weight, hessian, block_size=64)
    ascending = torch.argsort(hessian.diagonal())
    errors = {name: quadratic_error(weight - dequantize(c, scales), hessian) for name, c in {
        "gptq": codes, "natural order": run(weight, hessian, act_order=False)[0], "nearest": round_to_grid(weight, scales, 5),
        "raw inverse": raw_inverse(weight, hessian, scales, 5, ascending)}.items()}
    assert errors["gptq"] < errors["natural order"]
    assert errors["gptq"] < 0.6 * errors["raw inverse"]
    assert errors["raw inverse"] < errors["nearest"]


def test_dead_columns_become_zero_and_leave_the_others_alone() -> None:
    weight, hessian = make_weight(8, 30), make_hessian(30)
    live = torch.ones(30, dtype=torch.bool)
    live[[3, 17]] = False
    with_dead = hessian * live * live[:, None]
    codes, scales = run(weight, with_dead)
    factor = factorize("test", with_dead, DAMPING, act_order=True)
    assert torch.equal(factor.dead, ~live)
    assert codes[:, ~live].abs().sum() == 0
    without = factorize("test", hessian[live][:, live], DAMPING, act_order=True)
    torch.testing.assert_close(factor.upper[:28, :28], without.upper)  # dead columns come last, and do not count for the damping
    assert torch.equal(codes[:, live], round_gptq(weight[:, live], scales, 5, without, 16))


def test_input_that_was_always_zero() -> None:
    codes, _ = run(make_weight(8, 5), torch.zeros(5, 5))
    assert codes.abs().sum() == 0


def test_damping_is_raised_until_the_decomposition_exists() -> None:
    hessian = make_hessian(20).double()
    values, vectors = torch.linalg.eigh(hessian)
    values[0] = -0.05 * float(hessian.diagonal().mean())  # smaller damping than 5 % leaves it indefinite
    factor = factorize("test", ((vectors * values) @ vectors.T).float(), 1e-4, act_order=True)
    assert factor.damping == pytest.approx(0.1)
    assert factor.upper.isfinite().all()


def test_hopeless_hessians_are_errors_that_name_the_input() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up: .*not positive definite even with damping"):
        factorize("blocks.0.mlp.up", torch.tensor([[1.0, 1e7], [1e7, 1.0]]), 0.01, act_order=True)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.up: expected a finite Hessian"):
        factorize("blocks.0.mlp.up", torch.tensor([[1.0, torch.nan], [torch.nan, 1.0]]), 0.01, act_order=True)


def test_quadratic_error() -> None:
    error, hessian = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert quadratic_error(error, hessian) == 2 + 2 * 2 + 12 + 3
    assert quadratic_error(error, None) == 6


def test_each_row_keeps_the_scale_with_the_least_error() -> None:
    weight, hessian = make_weight(20, 48), make_hessian(48)
    scales, factor = row_scales(weight, 4, make_clip("max")), factorize("test", hessian, DAMPING, act_order=True)
    multiples = (1.0, 0.7, 0.85, 1.2)
    codes, chosen = round_with_best_scales(weight, scales, multiples, bits=4, factor=factor, hessian=hessian, block_size=16)
    expected = []
    for row in range(20):  # each row alone, with every multiple
        tried = [multiply_scales(scales[row, None], multiple) for multiple in multiples]
        results = [dequantize(round_gptq(weight[row, None], scale, 4, factor, 16), scale) for scale in tried]
        expected.append(min(results, key=lambda result: quadratic_error(weight[row, None] - result, hessian)))
    torch.testing.assert_close(dequantize(codes, chosen), torch.cat(expected))
    assert 2 <= len((chosen / scales).unique()) <= 20
    plain = dequantize(round_gptq(weight, scales, 4, factor, 16), scales)
    assert quadratic_error(weight - dequantize(codes, chosen), hessian) < 0.95 * quadratic_error(weight - plain, hessian)


def test_one_multiple_is_plain_gptq() -> None:
    weight, hessian = make_weight(12, 32), make_hessian(32)
    scales, factor = row_scales(weight, 5, make_clip("mse")), factorize("test", hessian, DAMPING, act_order=True)
    codes, chosen = round_with_best_scales(weight, scales, (1.0,), bits=5, factor=factor, hessian=hessian, block_size=16)
    assert torch.equal(chosen, scales)
    assert torch.equal(codes, round_gptq(weight, scales, 5, factor, 16))
