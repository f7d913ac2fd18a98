"""Low-rank correction of quantization errors (LQER, arXiv:2402.02446): a few directions of W - Wq, kept beside the codes.

Shapes: R rows, C columns, k directions. The directions are those that lower the predicted loss 1/2 tr(G E H E^T) most: with
H = L L^T the singular vectors of sqrt(G) E L, of which one with the singular value s is worth s^2 / 2.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib.artifacts.quantized import QuantizedTensor, clip_range, exponents_of, scales_of
from lib.quantization.allocation import floor_gradients
from lib.quantization.config import LowRankParams
from lib.quantization.grid import CLIPPED_RESOLUTION, SMALLEST_SCALE, round_to_grid

MAX_RANK = 32
NUM_ITERATIONS = 4  # of the randomised decomposition (arXiv:0909.4061)
DAMPING = 1e-4  # of H, relative to its mean diagonal: only so that it has a Cholesky factor, also with fewer samples than columns in fp32


@dataclass(frozen=True, eq=False)
class Error:
    """What is left of one matrix after quantization, and what it costs.

    Attributes:
        error: (R, C) fp32.
        hessian: (C, C) fp32.
        gradients: (R,) fp32.
    """

    error: Tensor
    hessian: Tensor
    gradients: Tensor


def correct(errors: Mapping[str, Error], params: LowRankParams) -> dict[str, tuple[QuantizedTensor, QuantizedTensor]]:
    """Factors of corrections: greedily, the direction that lowers the predicted loss most per byte, while the bytes last.

    Args:
        errors: name of the matrix -> its error.
        params: how many bytes, and the bits of the factors.

    Returns:
        Factors (R, k) and (k, C), on the CPU, of every matrix that gets any.
    """
    factors = {name: _decompose(error) for name, error in errors.items()}
    directions = []  # (worth per byte, bytes, name), of each matrix in descending order of worth
    for name, (_, singular, _) in factors.items():
        num_bytes = sum(errors[name].error.shape) * params.bits / 8
        directions += [(value / num_bytes, num_bytes, name) for value in (singular.square() / 2).tolist()]
    ranks, left_bytes = dict.fromkeys(factors, 0), float(params.max_bytes)
    for worth, num_bytes, name in sorted(directions, reverse=True):
        if worth > 0 and num_bytes <= left_bytes:
            ranks[name] += 1
            left_bytes -= num_bytes
    corrections = {}
    for name, rank in ranks.items():
        if rank:
            left, singular, right = factors[name]
            root = singular[:rank].sqrt()
            corrections[name] = (_quantize((left[:, :rank] * root).T, params.bits, transposed=True),
                                 _quantize(root[:, None] * right[:rank], params.bits, transposed=False))
    return corrections


def _decompose(error: Error) -> tuple[Tensor, Tensor, Tensor]:
    """(R, k), (k,), (k, C): E is close to left @ diag(singular) @ right, singular values in the metric of the predicted loss."""
    hessian = error.hessian.double()
    mean = hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)  # 0 for an input that was always 0
    damped = hessian + DAMPING * mean * torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    lower = torch.linalg.cholesky(damped)
    roots = floor_gradients(error.gradients).double().sqrt()[:, None]
    weighted = roots * (error.error.double() @ lower)
    rank = min(MAX_RANK, *weighted.shape)
    with torch.random.fork_rng(devices=[weighted.device] if weighted.is_cuda else []):
        torch.manual_seed(0)
        left, singular, right = torch.svd_lowrank(weighted, q=rank, niter=NUM_ITERATIONS)
    return left / roots, singular, torch.linalg.solve_triangular(lower, right.T, upper=False, left=False)


def _quantize(factor: Tensor, bits: int, *, transposed: bool) -> QuantizedTensor:
    """A factor with one direction in each row, (k, R or C), rounded to nearest with one scale for each direction."""
    exponents = exponents_of((factor.abs().amax(1) / clip_range(bits)).clamp(min=SMALLEST_SCALE), CLIPPED_RESOLUTION)
    codes = round_to_grid(factor, scales_of(exponents)[:, None], bits).to(torch.int16).cpu()
    ones = torch.zeros(factor.shape[1], dtype=torch.int16)
    if transposed:
        return QuantizedTensor(codes.T.contiguous(), ones, exponents.cpu(), bits)
    return QuantizedTensor(codes, exponents.cpu(), ones, bits)
