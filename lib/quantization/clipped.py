"""Grids that clip, as the published systems have them: scales of rows that a clip rule starts and the error of the outputs chooses.

Shapes: B groups of one shape, R rows, C columns.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lib.quantization.clipping import row_scales
from lib.quantization.config import ClipParams, QuantizeParams
from lib.quantization.gptq import Problem, round_gptq
from lib.quantization.grid import round_scales


def round_clipped(problems: Sequence[Problem], hessians: Sequence[Tensor], clips: Sequence[ClipParams], bits: int,
                  params: QuantizeParams) -> tuple[Tensor, Tensor]:
    """Codes and scales of grids that clip; each row keeps those, of all that are tried, with the least squared error of its outputs.

    A clip rule looks at a weight alone. GPTQ moves weights away from their values, and errors that its later columns make up for
    count less, so that the best grid for it is often another one.

    Args:
        problems: B of the same shape.
        hessians: second moments of their inputs, (C, C) fp32 each.
        clips: clip rule of each.
        bits: 2 to 8.
        params: multiples of the clip rule's scale to try, and how often scales are refitted to the codes.

    Returns:
        Codes (B, R, C) int16 and row scales (B, R) fp32.
    """
    columns = [torch.ones_like(problem.weight[0]) for problem in problems]
    starts = torch.stack([row_scales(problem.weight, bits, clip) for problem, clip in zip(problems, clips, strict=True)])
    best_codes, best_scales = torch.zeros_like(torch.stack([problem.weight for problem in problems]), dtype=torch.int16), starts
    best_errors = torch.full_like(starts, torch.inf)
    weights, metric = torch.stack([problem.weight for problem in problems]), torch.stack(list(hessians))
    for attempt in range(len(params.scale_factors) + params.refits):
        if attempt < len(params.scale_factors):
            scales = round_scales(starts * params.scale_factors[attempt])
        else:
            scales = round_scales(refit_scales(weights, best_codes, metric, best_scales))
        codes, errors = round_gptq(problems, list(scales), columns, bits=bits, block_size=params.block_size, rate_weight=params.rate_weight)
        better = errors < best_errors
        best_codes = torch.where(better[:, :, None], codes, best_codes)
        best_scales, best_errors = torch.where(better, scales, best_scales), torch.where(better, errors, best_errors)
    return best_codes, best_scales


def refit_scales(weights: Tensor, codes: Tensor, hessians: Tensor, scales: Tensor) -> Tensor:
    """The scale of each row with the least error (w - s q) H (w - s q)^T for codes q: s = w H q^T / q H q^T.

    Args:
        weights: (B, R, C) fp32.
        codes: (B, R, C) int16.
        hessians: (B, C, C) fp32.
        scales: (B, R) fp32, kept where q H q^T is 0 or the best scale is not positive.

    Returns:
        (B, R) fp32.
    """
    projected = codes.float() @ hessians  # (B, R, C)
    squared = (projected * codes).sum(2)
    best = (projected * weights).sum(2) / squared
    return torch.where((squared > 0) & (best > 0), best, scales)
