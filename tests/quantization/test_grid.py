import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.quantized import clip_range, dequantize
from lib.quantization.clipping import CLIP_RULES
from lib.quantization.grid import fake_quantize, round_to_grid, row_scales
from tests.quantization.power_law import make_clip, make_weight


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (4, 7), (5, 15), (6, 31), (8, 127)])
def test_codes_are_symmetric_and_use_the_whole_range(bits: int, largest: int) -> None:
    weight = torch.cat([make_weight(5, 300), torch.tensor([[-10.0, 10.0]]).expand(5, 2)], 1)
    codes = round_to_grid(weight, torch.full((5,), 0.01).half(), bits)
    assert clip_range(bits) == largest
    assert (codes.dtype, int(codes.min()), int(codes.max())) == (torch.int8, -largest, largest)


@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from(sorted(CLIP_RULES)))
def test_rounds_to_the_nearest_grid_point(bits: int, seed: int, rule: str) -> None:
    weight, largest = make_weight(3, 20, seed), clip_range(bits)
    scales = row_scales(weight, bits, make_clip(rule))
    grid = torch.arange(-largest, largest + 1) * scales.double()[:, None]  # (R, grid points)
    nearest = (weight.double()[:, :, None] - grid[:, None]).abs().amin(2)
    found = (weight.double() - dequantize(round_to_grid(weight, scales, bits), scales).double()).abs()
    torch.testing.assert_close(found, nearest, rtol=1e-4, atol=1e-7)


def test_scale_is_clip_over_clip_range_in_fp16() -> None:
    weight = torch.tensor([[3.0, -1.0], [0.0, 0.25]])
    assert torch.equal(row_scales(weight, 5, make_clip()), torch.tensor([3.0, 0.25]).div(15).half())


def test_no_floor_binds_far_below_a_clip_of_one() -> None:
    """pr585's floor of 1/15 would give all of these rows the same scale."""
    weight = make_weight(1, 64) * torch.tensor([1.0, 1e-1, 1e-2, 1e-3])[:, None]
    scales = row_scales(weight, 5, make_clip()).double()
    expected = weight.double().abs().amax(1) / 15
    torch.testing.assert_close(scales, expected, rtol=1e-2, atol=0.0)
    assert (round_to_grid(weight, scales.half(), 5).abs().amax(1) == 15).all()


def test_rows_of_zeros_have_a_finite_scale_and_codes_of_zero() -> None:
    weight = torch.stack([torch.zeros(4), torch.ones(4), torch.full((4,), 1e-12)])
    scales = row_scales(weight, 5, make_clip("mse"))
    assert scales.isfinite().all() and (scales > 0).all()
    assert round_to_grid(weight, scales, 5)[[0, 2]].abs().sum() == 0
    assert torch.equal(fake_quantize(weight, 5, make_clip("mse"))[0], torch.zeros(4))


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("rule", CLIP_RULES)
def test_training_sees_exactly_what_the_export_gives(rule: str, bits: int) -> None:
    weight = make_weight(16, 64)
    scales = row_scales(weight, bits, make_clip(rule))
    assert torch.equal(fake_quantize(weight, bits, make_clip(rule)), dequantize(round_to_grid(weight, scales, bits), scales))
