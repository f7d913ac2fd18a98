"""The one quantizer, for quantization-aware training and for export: a symmetric grid, with a scale for each row and each column.

Shapes: R rows, C columns. With b bits the codes are the integers -c .. c, c = 2^(b-1) - 1 (15 for int5). A code stands for
code * row scale * column scale.
"""

from torch import Tensor

from lib.artifacts.quantized import OCTAVE, clip_range, exponents_of, scales_of
from lib.quantization.clipping import CLIP_RULES
from lib.quantization.grid_config import ClipParams

CLIPPED_RESOLUTION = OCTAVE // 64
"""Of row exponents of grids that clip: a scale is at most 0.54 % from the one that was asked for."""
SMALLEST_SCALE = 2.0**-24  # only a row of zeros, or nearly so, is below it


def row_scales(weight: Tensor, bits: int, clip: ClipParams) -> Tensor:
    """Scale of each row: its clip value by `clip`, not below ``clip.floor``, over the clip range, to the resolution of stored scales.

    Args:
        weight: (R, C) fp32; not checked for NaN and infinity, which would wait for the device at every training step.
        bits: 2 to 8.
        clip: the clip rule and its parameters.

    Returns:
        (R,) fp32, positive.
    """
    clips = CLIP_RULES[clip.rule](weight, clip_range(bits), clip).clamp(min=clip.floor)
    return round_scales(clips / clip_range(bits))


def round_scales(scales: Tensor) -> Tensor:
    """Scales of rows, (R,) fp32, to the resolution at which those of grids that clip are stored."""
    return scales_of(exponents_of(scales.clamp(min=SMALLEST_SCALE), CLIPPED_RESOLUTION))


def round_to_grid(weight: Tensor, scales: Tensor, bits: int | None, full_range: bool = False) -> Tensor:
    """Nearest codes of weights (R, C), with scales that broadcast to them -> (R, C) in the type of the weights.

    With `full_range` the codes reach from -c - 1, as far as integers of so many bits do.
    """
    limit = clip_range(bits)
    return (weight / scales).round_().clamp_(-limit - full_range, limit)


def fake_quantize(weight: Tensor, bits: int, clip: ClipParams, full_range: bool = False) -> Tensor:
    """The weights after rounding to the grid and back: (R, C) fp32 -> (R, C) fp32; without `full_range` as the export gives them."""
    scales = row_scales(weight, bits, clip)[:, None]
    return round_to_grid(weight, scales, bits, full_range).mul_(scales)
