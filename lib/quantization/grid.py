"""The grid that clips, for quantization-aware training and for export: symmetric, with a scale for each row.

Shapes: R rows, C columns. With b bits the codes are the integers -c .. c, c = 2^(b-1) - 1 (15 for int5). A code stands for
code * row scale * column scale.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.artifacts.quantized import OCTAVE, clip_range, exponents_of, scales_of

CLIPPED_RESOLUTION = OCTAVE // 64
"""Resolution of row exponents of grids that clip: a scale is at most 0.54 % from the one that was asked for."""
SMALLEST_SCALE = 2.0**-24  # only a row of zeros, or nearly so, is below it


def find_quantiles(weight: Tensor, quantiles: Sequence[float]) -> list[Tensor]:
    """Quantiles of the magnitudes in each row, (R, C) fp32 -> (R,) each, interpolated; nothing below the lowest of them is sorted."""
    last = weight.shape[1] - 1
    falling = weight.abs().topk(weight.shape[1] - int(min(quantiles) * last), dim=1).values
    found = []
    for quantile in quantiles:
        below = min(int(quantile * last), last)
        above = min(below + 1, last)
        found.append(torch.lerp(falling[:, last - below], falling[:, last - above], quantile * last - below))
    return found


def make_scales(clips: Tensor, bits: int, floor: float) -> Tensor:
    """Scale of each row from how far its grid reaches, (R,) fp32 -> (R,) fp32, positive, to the resolution of stored scales.

    Args:
        clips: largest magnitude on the grid of each row; not checked for NaN and infinity, which would wait for the device.
        bits: 2 to 8.
        floor: no grid reaches less far.
    """
    return round_scales(clips.clamp(min=floor) / clip_range(bits))


def round_scales(scales: Tensor) -> Tensor:
    """Scales of rows, (R,) fp32, to the resolution at which those of grids that clip are stored."""
    return scales_of(exponents_of(scales.clamp(min=SMALLEST_SCALE), CLIPPED_RESOLUTION))


def round_to_grid(weight: Tensor, scales: Tensor, bits: int | None, full_range: bool = False) -> Tensor:
    """Nearest codes of weights (R, C), with scales that broadcast to them -> (R, C) in the type of the weights.

    With `full_range` the codes reach from -c - 1, as far as integers of so many bits do.
    """
    limit = clip_range(bits)
    return (weight / scales).round_().clamp_(-limit - full_range, limit)
