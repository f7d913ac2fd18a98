"""Clip rules: how far the symmetric grid of each row of a matrix reaches.

Shapes: R rows, C columns, K candidates. A rule is a function ``(weight (R, C) fp32, clip_range, params) -> clips (R,)``;
to add one, write the function, enter it in `CLIP_RULES` and name it in ``ClipParams.rule``. Only the stage quantize uses them: training for
a grid (`lib.training.qat`) has a clip of its own.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lib.artifacts.quantized import clip_range as clip_range_of
from lib.quantization.config import ClipParams
from lib.quantization.grid import find_quantiles, make_scales

ClipRule = Callable[[Tensor, int, ClipParams], Tensor]


def clip_max(weight: Tensor, clip_range: int, params: ClipParams) -> Tensor:
    """Largest magnitude of each row: nothing is clipped."""
    return weight.abs().amax(1)


def clip_std(weight: Tensor, clip_range: int, params: ClipParams) -> Tensor:
    """`num_std` standard deviations of each row, about its mean (SDClip, entry #1855)."""
    return params.num_std * weight.std(1, correction=min(1, weight.shape[1] - 1))


def clip_percentile(weight: Tensor, clip_range: int, params: ClipParams) -> Tensor:
    """The quantile of each row's magnitudes, among `percentiles`, with the least squared error (entry #585)."""
    return _best(weight, clip_range, find_quantiles(weight, params.percentiles), params.floor)


def clip_mse(weight: Tensor, clip_range: int, params: ClipParams) -> Tensor:
    """The fraction of each row's maximum, among k/`num_candidates`, with the least squared error; of equals the largest."""
    maximum = weight.abs().amax(1)
    return _best(weight, clip_range, (maximum * (k / params.num_candidates) for k in range(params.num_candidates, 0, -1)), params.floor)


def _best(weight: Tensor, clip_range: int, candidates: Iterable[Tensor], floor: float) -> Tensor:
    """The best of K candidates (R,): for each row the first with the least squared rounding error on the grid that it gives."""
    magnitudes = weight.abs()
    rounded = torch.empty_like(magnitudes)
    best_clips = torch.zeros_like(magnitudes[:, 0])
    best_errors = torch.full_like(best_clips, torch.inf)
    for clips in candidates:
        steps = (clips.clamp(min=floor) / clip_range).clamp(min=torch.finfo(clips.dtype).tiny)[:, None]  # a row of zeros has the clip 0
        torch.div(magnitudes, steps, out=rounded).round_().clamp_(max=clip_range)
        errors = rounded.mul_(steps).sub_(magnitudes).square_().sum(1)
        better = errors < best_errors
        best_clips = torch.where(better, clips, best_clips)
        best_errors = torch.where(better, errors, best_errors)
    return best_clips


CLIP_RULES: dict[str, ClipRule] = {"max": clip_max, "percentile": clip_percentile, "mse": clip_mse, "std": clip_std}


def row_scales(weight: Tensor, bits: int, clip: ClipParams) -> Tensor:
    """Scale of each row by a clip rule, (R, C) fp32 -> (R,) fp32, positive.

    Args:
        weight: not checked for NaN and infinity.
        bits: 2 to 8.
        clip: the clip rule and its parameters, those of the role of the matrix.
    """
    return make_scales(CLIP_RULES[clip.rule](weight, clip_range_of(bits), clip), bits, clip.floor)
