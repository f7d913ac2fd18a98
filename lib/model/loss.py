"""Cross-entropy of soft-capped logits, fused: fp32 logits exist only for as many rows at a time as fit into a processor's cache.

Shapes: N tokens, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CPU_CHUNK = 2**18  # elements computed together, 1 MiB of fp32: in cache, and enough work between two meetings of the threads
GPU_CHUNK = 2**26  # few launches, and bounded memory


def softcapped_cross_entropy(z: Tensor, targets: Tensor, cap: float) -> Tensor:
    """Cross-entropy of the logits ``cap * tanh(z / cap)`` (Gemma 2, arXiv:2408.00118).

    What is kept for the backward pass is of the size and dtype of `z`; nothing is kept where no gradient is wanted.

    Args:
        z: (N, V) outputs of the head, fp32 or less; fp64 is computed in fp64.
        targets: (N,) int64 in 0 .. V - 1.
        cap: bound of the logits.

    Returns:
        (N,) fp32 nats, fp64 for fp64.

    Raises:
        RuntimeError: a target out of range (as a failed assertion on GPUs), or `create_graph`: there is no second derivative.
    """
    if torch.compiler.is_compiling():  # the compiler fuses this expression, keeps z and recomputes the rest in the backward pass
        return F.cross_entropy(cap * torch.tanh(z.to(_loss_dtype(z)) / cap), targets, reduction="none")
    if torch.is_grad_enabled() and z.requires_grad:
        return _SoftcappedCrossEntropy.apply(z, targets, cap)  # type: ignore[no-untyped-call]
    return _compute(z, targets, cap, None)


class _SoftcappedCrossEntropy(torch.autograd.Function):
    """Computes the gradient together with the losses: the softmax that it needs is in the cache then."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, targets: Tensor, cap: float) -> Tensor:
        gradient = torch.empty_like(z)
        losses = _compute(z, targets, cap, gradient)
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # with create_graph, where the kept gradient would pass for a constant
            raise RuntimeError("softcapped_cross_entropy has no second derivative; take gradients without create_graph")
        gradient, = ctx.saved_tensors
        return torch.mul(gradient, grad_losses[:, None], out=torch.empty_like(gradient)), None, None  # rounded once, after the product


def _compute(z: Tensor, targets: Tensor, cap: float, gradient: Tensor | None) -> Tensor:
    # Losses (N,); `gradient` (N, V), where given, receives the derivative of each loss by its row of z.
    dtype = _loss_dtype(z)
    losses = z.new_empty(len(z), dtype=dtype)
    size = min(len(z), max(1, (CPU_CHUNK if z.device.type == "cpu" else GPU_CHUNK) // z.shape[1]))  # rows
    buffers = z.new_empty(3, size, z.shape[1], dtype=dtype)
    for first in range(0, len(z), max(1, size)):
        rows = slice(first, first + size)
        z_rows, target = z[rows], targets[rows, None]
        tanh, logits, log_probs = buffers[:, :len(z_rows)]
        torch.div(z_rows.to(dtype), cap, out=tanh).tanh_()
        torch.mul(tanh, cap, out=logits)
        torch.log_softmax(logits, -1, out=log_probs)
        torch.neg(log_probs.gather(1, target)[:, 0], out=losses[rows])
        if gradient is not None:
            by_logits = log_probs.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=dtype))  # softmax - one-hot
            torch.addcmul(by_logits, by_logits, tanh.square_(), value=-1, out=gradient[rows])  # times tanh' = 1 - tanh^2
    return losses


def _loss_dtype(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)
