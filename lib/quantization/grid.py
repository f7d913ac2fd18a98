"""The one quantizer, for quantization-aware training and for export: a symmetric grid for each row of a matrix.

Shapes: R rows, C columns. With b bits the codes are the integers -c .. c, c = 2^(b-1) - 1 (15 for int5), and stand for
code * scale; every row has its scale, kept in fp16.
"""

import torch
from torch import Tensor

from lib.artifacts.quantized import clip_range, dequantize
from lib.quantization.clipping import CLIP_RULES
from lib.quantization.grid_config import ClipParams

SMALLEST_SCALE = 2.0**-24  # smallest positive fp16; only a row of zeros, or nearly so, is below it


def row_scales(weight: Tensor, bits: int, clip: ClipParams) -> Tensor:
    """Scale of each row: its clip value by `clip` over the clip range.

    Args:
        weight: (R, C) fp32; not checked for NaN and infinity, which would wait for the device at every training step.
        bits: 2 to 8.
        clip: the clip rule and its parameters.

    Returns:
        (R,) fp16, positive.
    """
    clips = CLIP_RULES[clip.rule](weight, clip_range(bits), clip)
    return (clips / clip_range(bits)).clamp(min=SMALLEST_SCALE).to(torch.float16)


def multiply_scales(scales: Tensor, factor: float) -> Tensor:
    """A multiple of the scales, (R,) fp16, no smaller than `SMALLEST_SCALE`."""
    return (scales.float() * factor).clamp(min=SMALLEST_SCALE).to(torch.float16)


def round_to_grid(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Code of the nearest grid point of each weight: (R, C) and (R,) -> (R, C) int8."""
    return _round(weight, scales, bits).to(torch.int8)


def fake_quantize(weight: Tensor, bits: int, clip: ClipParams) -> Tensor:
    """The weights after rounding to the grid and back, as the export gives them: (R, C) fp32 -> (R, C) fp32."""
    scales = row_scales(weight, bits, clip)
    return dequantize(_round(weight, scales, bits), scales)


def _round(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    limit = clip_range(bits)
    return (weight / scales.to(weight.dtype)[:, None]).round_().clamp_(-limit, limit)
