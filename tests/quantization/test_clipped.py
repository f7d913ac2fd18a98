import itertools

import torch
from torch import Tensor

from lib.artifacts.quantized import clip_range
from lib.quantization.clipped import refit_scales, round_clipped
from lib.quantization.clipping import row_scales
from lib.quantization.gptq import Problem, factorize, round_gptq, row_errors
from lib.quantization.grid import round_scales, round_to_grid
from tests.quantization.power_law import DAMPING, damped, make_clip, make_hessian, make_problem, make_weight, quadratic_error
from tests.quantization.test_config import make_quantize


def single(problem: Problem, scales: Tensor, bits: int) -> Tensor:
    """The weights after GPTQ with these row scales."""
    codes, _ = round_gptq([problem], [scales], [torch.ones_like(problem.weight[0])], bits=bits, block_size=16)
    return codes[0] * scales.double()[:, None]


def test_each_row_keeps_the_factor_with_the_least_error() -> None:
    problems, hessians = [make_problem(20, 48, seed) for seed in (0, 1)], [make_hessian(48, seed) for seed in (0, 1)]
    factors = (1.0, 0.7, 0.85, 1.2)
    codes, chosen = round_clipped(problems, hessians, [make_clip("max")] * 2, 4, make_quantize(scale_factors=factors, block_size=16))
    assert (codes.dtype, codes.shape, chosen.shape) == (torch.int16, (2, 20, 48), (2, 20))
    for problem, hessian, its_codes, its_scales in zip(problems, hessians, codes, chosen, strict=True):
        starts = row_scales(problem.weight, 4, make_clip("max"))
        for row in range(20):  # each row alone, with every factor
            alone = Problem(problem.weight[row, None], problem.factor)
            tried = [round_scales(starts[row, None] * factor) for factor in factors]
            errors = [quadratic_error(alone.weight - single(alone, scales, 4), damped(hessian)) for scales in tried]
            best = tried[errors.index(min(errors))]
            assert torch.equal(its_scales[row, None], best)
            assert torch.equal(its_codes[row] * its_scales.double()[row], single(alone, best, 4)[0])
        assert len({round(float(scale), 3) for scale in its_scales / starts}) > 1
        plain = quadratic_error(problem.weight - single(problem, starts, 4), hessian)
        assert quadratic_error(problem.weight - its_codes * its_scales.double()[:, None], hessian) < 0.95 * plain


def test_one_factor_without_refits_is_plain_gptq() -> None:
    problem = make_problem(12, 32)
    codes, scales = round_clipped([problem], [make_hessian(32)], [make_clip("max")], 5, make_quantize(block_size=16))
    assert torch.equal(scales[0], row_scales(problem.weight, 5, make_clip("max")))
    assert torch.equal(codes[0] * scales[0].double()[:, None], single(problem, scales[0], 5))


def test_refitted_scales_are_the_best_for_their_codes() -> None:
    weight, hessian = make_weight(10, 24), make_hessian(24)
    start = row_scales(weight, 3, make_clip("max"))
    codes = round_to_grid(weight, start[:, None], 3).to(torch.int16)
    found = refit_scales(weight[None], codes[None], hessian[None], start[None])[0]
    multiples = torch.linspace(0.2, 2.0, 3601)  # exhaustive, to 1/2000
    errors = torch.stack([row_errors(weight - codes * (start * multiple)[:, None], hessian) for multiple in multiples.tolist()])
    torch.testing.assert_close(found / start, multiples[errors.argmin(0)], rtol=0.0, atol=6e-4)
    assert float((found / start - 1).abs().max()) > 0.02


def test_rows_without_a_positive_best_scale_keep_theirs() -> None:
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]])
    codes = torch.tensor([[0, 0], [-1, -1], [1, 1]], dtype=torch.int16)
    found = refit_scales(weight[None], codes[None], torch.eye(2)[None], torch.tensor([[0.3, 0.4, 0.5]]))
    torch.testing.assert_close(found, torch.tensor([[0.3, 0.4, 2.0]]))


def test_refits_never_make_a_row_worse_and_usually_better() -> None:
    problem, hessian = make_problem(32, 48), make_hessian(48)
    errors, all_scales = [], []
    for refits in range(4):
        codes, scales = round_clipped([problem], [hessian], [make_clip("max")], 3,
                                      make_quantize(scale_factors=[0.8], refits=refits, block_size=16))
        assert int(codes.abs().max()) <= clip_range(3)
        errors.append(row_errors(problem.weight - codes[0] * scales[0].double()[:, None], damped(hessian)))
        all_scales.append(scales)
    for worse, better in itertools.pairwise(errors):
        assert (better <= worse * (1 + 1e-9)).all()
    assert float(errors[3].sum()) < 0.97 * float(errors[0].sum())
    assert all(torch.equal(scales, round_scales(scales)) for scales in all_scales)  # at the resolution at which they are stored


def test_scales_of_an_input_that_was_always_zero_are_finite() -> None:
    factor = factorize("test", torch.zeros(5, 5), DAMPING, act_order=True)
    codes, scales = round_clipped([Problem(make_weight(3, 5), factor)], [torch.zeros(5, 5)], [make_clip("max")], 5, make_quantize(refits=2))
    assert codes.abs().sum() == 0 and scales.isfinite().all() and (scales > 0).all()
