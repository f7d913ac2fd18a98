"""The calling convention of attention kernels, and the one that runs everywhere: PyTorch's scaled dot-product attention (SDPA).

Shapes: B batch, L keys (the tokens up to the last attending position), P attending positions, H query heads, K key/value heads,
E head dimension, A tokens that a position attends to at most, by a window or the length of documents, N blocks of A positions.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.model.config import KernelName

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries (B, P, H, E), keys and values (B, L, K, E), K a divisor of H -> (B, P, H, E)."""


class Sight(NamedTuple):
    """Which tokens the attending positions see: those up to their own, of the same document, and not too far back.

    Attributes:
        first: the first attending position, L - P.
        last: the end of the attending positions, L.
        attention_tokens: A, itself included, below L (sliding-window attention, arXiv:2004.05150); None for all.
        starts: (B, L) bool, true where a document begins and at position 0; None if documents see each other.
        longest: tokens of the longest document at most, below L, in place of `attention_tokens`; None where it is not known.
    """

    first: int
    last: int
    attention_tokens: int | None
    starts: Tensor | None
    longest: int | None = None


@dataclass(frozen=True)
class Kernel:
    """A way of computing attention.

    Attributes:
        name: name of the kernel.
        reason: one line, why it was chosen and why better ones were not.
        within: attention within a sight; what the layers share (masks, boundaries of documents) is computed here, once.
    """

    name: KernelName
    reason: str
    within: Callable[[Sight, torch.device], Attend]


def attend_by_sdpa(sight: Sight, device: torch.device) -> Attend:
    """Attention within a sight, for queries, keys and values of any dtype."""
    if (span := sight.attention_tokens or sight.longest) is not None:
        mask = _band(sight, span, device)
        return lambda q, k, v: _attend_to_latest((q, k, v), sight.first, mask)
    if sight.first == 0 and sight.starts is None:
        return partial(_attend_to_all, mask=None)
    mask = torch.ones(sight.last - sight.first, sight.last, dtype=torch.bool, device=device).tril(sight.first)  # (P, L)
    if sight.starts is not None:
        document = sight.starts.cumsum(1)[:, None]  # (B, 1, L)
        mask = mask & (document[..., sight.first :, None] == document[..., None, :])  # (B, 1, P, L)
    return partial(_attend_to_all, mask=mask)


def _attend_to_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return _sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)


def _attend_to_latest(qkv: tuple[Tensor, Tensor, Tensor], first: int, mask: Tensor) -> Tensor:
    # Blocks of A queries; the keys that a block can see are those of the A positions before it and its own. Cost: 2 A keys a query.
    q, k, v = qkv
    num_queries, span = q.shape[1], mask.shape[-2]
    q = _in_blocks(q.transpose(1, 2), 0, span)  # (B, N, H, A, E)
    k, v = (_in_pairs(x.transpose(1, 2), first, span) for x in (k, v))  # (B, N, K, 2A, E)
    y = _sdpa(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask.expand(q.shape[0], -1, -1, -1, -1).flatten(0, 1))  # (B*N, H, A, E)
    return y.unflatten(0, q.shape[:2]).transpose(1, 2).flatten(2, 3)[:, :, :num_queries].transpose(1, 2)


def _band(sight: Sight, span: int, device: torch.device) -> Tensor:
    """The mask of `_attend_to_latest`, (B or 1, N, 1, A, 2A)."""
    query, key = torch.arange(span, device=device)[:, None], torch.arange(2 * span, device=device)
    num_blocks = -(-(sight.last - sight.first) // span)
    exists = key + span * torch.arange(num_blocks, device=device)[:, None] >= span - sight.first  # (N, 2A); before position 0 is nothing
    mask = ((key > query) & (key <= query + span) & exists[:, None])[None, :, None]  # (1, N, 1, A, 2A)
    if sight.starts is None:
        return mask
    document = sight.starts.cumsum(1)[:, None, :, None]  # (B, 1, L, 1)
    queries, keys = _in_blocks(document[:, :, sight.first :], 0, span), _in_pairs(document, sight.first, span)
    return mask & (queries == keys.transpose(-1, -2))


def _in_blocks(x: Tensor, before: int, span: int) -> Tensor:
    """(B, H, T, E), after `before` zeros and as many behind as fill the last block -> (B, N, H, A, E)."""
    x = F.pad(x, (0, 0, before, -(x.shape[2] + before) % span))
    return x.unflatten(2, (-1, span)).transpose(1, 2)


def _in_pairs(x: Tensor, first: int, span: int) -> Tensor:
    """The keys (B, K, L, E) that each block of queries can see: those of the block before it and its own, (B, N, K, 2A, E)."""
    blocks = _in_blocks(x[:, :, max(0, first - span) :], max(0, span - first), span)
    return torch.cat((blocks[:, :-1], blocks[:, 1:]), dim=3)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA on (B, heads, tokens, E), causal unless there is a mask."""
    shared = q.shape[1] // k.shape[1]
    if shared > 1 and mask is not None and q.is_cuda:  # or CUDA computes all scores in memory: memory-efficient attention has no GQA
        k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
    with sdpa_kernel(SDPBackend.MATH) if _needs_math(q, mask) else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared > 1)


def _needs_math(q: Tensor, mask: Tensor | None) -> bool:
    """Whether only the math backend repeats its gradients: memory-efficient attention, which CUDA takes for masks and fp32, does not."""
    return (q.is_cuda and torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
            and (mask is not None or q.dtype == torch.float32))


SDPA = Kernel("sdpa", "sdpa: the default", attend_by_sdpa)
