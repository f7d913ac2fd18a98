"""Orthogonalization of updates: functions that push all singular values of matrices towards 1 (Muon).

A function takes (N, R, C) matrices and a number of iterations, and gives matrices of the same shape; to add one, write it, enter it in
`ORTHOGONALIZATIONS` and name it in ``OptimizerParams.orthogonalization``. On GPUs iterations run in bf16, else in the dtype given.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of K. Jordan's Muon, kellerjordan.github.io/posts/muon
POLAR_EXPRESS = (  # arXiv:2505.16932, as in entry #1855: the best quintic for what each iteration before it has left
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
SMALLEST_NORM = 1e-7

Orthogonalization = Callable[[Tensor, int], Tensor]


def newton_schulz(matrices: Tensor, num_steps: int) -> Tensor:
    """The same iteration every time; 5 of them bring singular values to about 0.7 .. 1.2."""
    x = _start(matrices)
    return _iterate(x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM), [NEWTON_SCHULZ] * num_steps)


def polar_express(matrices: Tensor, num_steps: int) -> Tensor:
    """Another iteration each time (arXiv:2505.16932); from the sixth on the last one again."""
    x = _start(matrices)
    steps = [POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)] for step in range(num_steps)]
    return _iterate(x / (x.norm(dim=(-2, -1), keepdim=True) + SMALLEST_NORM), steps)


def _start(matrices: Tensor) -> Tensor:
    return matrices.bfloat16() if matrices.is_cuda else matrices


def _iterate(x: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """x <- a x + (b S + c S^2) x with S = x x^T, on the shorter side."""
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for a, b, c in steps:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


ORTHOGONALIZATIONS: dict[str, Orthogonalization] = {"newton_schulz": newton_schulz, "polar_express": polar_express}
