import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.artifacts.quantized import MAX_CODE, OCTAVE, QuantizedTensor, clip_range, exponents_of
from lib.quantization.clipping import CLIP_RULES, row_scales
from lib.quantization.grid import CLIPPED_RESOLUTION, round_scales, round_to_grid
from tests.quantization.power_law import make_clip, make_weight


def export(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The weights that an artifact with these row scales gives back."""
    codes = round_to_grid(weight, scales[:, None], bits).to(torch.int16)
    return QuantizedTensor(codes, exponents_of(scales), torch.zeros(weight.shape[1], dtype=torch.int16), bits).weight()


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (4, 7), (5, 15), (6, 31), (8, 127), (None, 32767)])
def test_codes_are_symmetric_and_use_the_whole_range(bits: int | None, largest: int) -> None:
    weight = torch.cat([make_weight(5, 300), torch.tensor([[-1e4, 1e4]]).expand(5, 2)], 1)
    codes = round_to_grid(weight, torch.full((5, 1), 0.01), bits)
    assert torch.equal(codes, codes.round())
    assert (int(codes.min()), int(codes.max())) == (-largest, largest)


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from(sorted(CLIP_RULES)))
def test_rounds_to_the_nearest_grid_point(bits: int, seed: int, rule: str) -> None:
    weight, largest = make_weight(3, 20, seed), clip_range(bits)
    scales = row_scales(weight, bits, make_clip(rule))
    grid = torch.arange(-largest, largest + 1) * scales.double()[:, None]  # (R, grid points)
    nearest = (weight.double()[:, :, None] - grid[:, None]).abs().amin(2)
    found = (weight.double() - export(weight, scales, bits).double()).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-7)


def test_rows_and_columns_have_steps_of_their_own() -> None:
    weight, scales = make_weight(4, 6), torch.rand(4, 6) + 0.01
    assert torch.equal(round_to_grid(weight, scales, 5), (weight / scales).round())
    double = round_to_grid(weight.double(), scales.double(), 5)
    assert double.dtype == torch.float64


@given(st.floats(2.0**-23, 1e4))
def test_scales_are_the_nearest_that_are_stored(scale: float) -> None:
    """64 to the octave, so at most 0.54 % away."""
    found = float(round_scales(torch.tensor([scale])))
    stored = 2.0 ** (math.floor(64 * math.log2(found) + 0.5) / 64)
    assert found == pytest.approx(stored, rel=1e-6)
    assert abs(math.log2(found / scale)) <= (0.5 + 1e-4) / 64
    assert int(exponents_of(torch.tensor([found]))) % CLIPPED_RESOLUTION == 0 and OCTAVE == 64 * CLIPPED_RESOLUTION


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_scale_is_clip_over_clip_range_to_the_stored_resolution(bits: int) -> None:
    weight = torch.tensor([[3.0, -1.0], [0.0, 0.25], [-7e-4, 1e-5]])
    expected = torch.tensor([3.0, 0.25, 7e-4]) / clip_range(bits)
    scales = row_scales(weight, bits, make_clip())
    assert torch.equal(scales, round_scales(expected))
    torch.testing.assert_close(scales, expected, rtol=0.0055, atol=0.0)


def test_no_floor_binds_far_below_a_clip_of_one() -> None:
    """pr585's floor of 1/15, which would give all of these rows the same scale, is a parameter."""
    weight = make_weight(1, 64) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])[:, None]
    scales = row_scales(weight, 5, make_clip())
    torch.testing.assert_close(scales, weight.abs().amax(1) / 15, rtol=0.0055, atol=0.0)
    assert (round_to_grid(weight, scales[:, None], 5).abs().amax(1) == 15).all()


def nearest_stored(scale: float) -> float:
    """To 2^(1/64)."""
    return 2.0 ** (math.floor(64 * math.log2(scale) + 0.5) / 64)


@pytest.mark.parametrize(("bits", "inverse", "larger"), [(5, 15, 0.0005), (6, 31, 0.0008), (8, 127, 0.0031)])
def test_the_published_floor_is_stored_a_little_larger(bits: int, inverse: int, larger: float) -> None:
    scales = row_scales(torch.tensor([[0.0, 0.0], [0.5, -0.9]]), bits, make_clip(floor=1.0))
    assert torch.equal(scales[0], scales[1]) and 1 / inverse <= float(scales[0]) < (1 + larger) / inverse


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("rule", ["max", "percentile"])
@pytest.mark.parametrize("std", [0.01, 0.2, 0.4, 3.0])
def test_published_quantization_written_anew(rule: str, bits: int, std: float) -> None:
    """#410: the row's maximum, #585: of quantiles the one with the least squared error; scale = max(clip / c, 1 / c); by rows, in fp64."""
    c, quantiles = 2 ** (bits - 1) - 1, (0.9, 0.99, 1.0)
    weight = torch.randn(12, 200, generator=torch.Generator().manual_seed(bits)) * std
    found = row_scales(weight, bits, make_clip(rule, quantiles, floor=1.0))
    codes = round_to_grid(weight, found[:, None], bits)
    for row, scale, its_codes in zip(weight.double(), found.tolist(), codes, strict=True):
        clips = [float(row.abs().max())] if rule == "max" else [float(row.abs().quantile(q)) for q in quantiles]
        scales = [max(clip / c, 1 / c) for clip in clips]
        errors = [float(((row / s).round().clamp(-c, c) * s - row).square().sum()) for s in scales]
        expected = nearest_stored(scales[errors.index(min(errors))])
        assert scale == pytest.approx(expected, rel=1e-6)
        assert torch.equal(its_codes, torch.tensor([float(max(-c, min(c, round(w / scale)))) for w in row.tolist()]))


def test_rows_of_zeros_have_a_finite_scale_and_codes_of_zero() -> None:
    weight = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), 1e-12)])
    scales = row_scales(weight, 5, make_clip("mse"))
    assert scales.isfinite().all() and (scales > 0).all() and (exponents_of(scales).abs() < MAX_CODE).all()
    assert round_to_grid(weight, scales[:, None], 5)[[0, 2]].abs().sum() == 0
