"""FlashAttention 2, 3 and 4 (github.com/Dao-AILab/flash-attention) under the calling convention of attention kernels.

Written against flash-attn 2.8.3 (``flash_attn``), hopper/flash_attn_interface.py of commit 01afd16d (``flash_attn_interface``) and
flash-attn-4 4.0.0b36 (``flash_attn.cute``). The first two register their forward and backward passes as custom operators, so that
``torch.compile`` takes them as they are; the third does not, and gets operators of our own here.

Shapes: B batch, L keys (the tokens up to the last attending position), P attending positions, H query heads, K key/value heads,
E head dimension, S upper bound of the number of documents.
"""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lib.model.sdpa import Attend, Sight

FLASH4 = "flash_attn.cute.interface"
MIN_DOCUMENTS, MIN_MEAN_TOKENS = 1024, 32

FlashAttend = Callable[[Tensor, Tensor, Tensor, list[int], Tensor | None], Tensor]
"""Queries, keys, values as in `Attend`; two limits: how many tokens before its own a position attends to, -1 for all, and tokens of the
longest document, for which kernels are launched; `find_boundaries` -> (B, P, H, E)."""


def attend_by_flash(attend: FlashAttend, sight: Sight, _: torch.device) -> Attend:
    """Attention within a sight, in the dtype of the values.

    The causal mask of flash-attn is aligned to the last key: the last query sees all keys, as positions that end with the keys do.
    """
    limits = [(sight.attention_tokens or 0) - 1, sight.longest or sight.last]
    documents = None if sight.starts is None else find_boundaries(sight.starts, sight.first, limits[1])

    def attend_in_one_dtype(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Autocast normalises queries and keys in fp32; values are bf16, as their matrix product gives them.
        return attend(q.to(v.dtype), k.to(v.dtype), v, limits, documents)

    return attend_in_one_dtype


def find_boundaries(starts: Tensor, first: int, longest: int) -> Tensor:
    """Boundaries of documents among the tokens of all sequences, one sequence after the other, without a transfer from the device.

    S is a bound: MIN_DOCUMENTS, or a mean of MIN_MEAN_TOKENS tokens a document, whichever is more. The bound that is always right, the
    number of tokens, can exceed the 65,535 that flash-attn 2 launches, and each document costs its backward pass 128 rows of fp32.

    Args:
        starts: (B, L) bool, true where a document begins and at position 0.
        first: the first attending position, L - P.
        longest: tokens of the longest document, at most.

    Returns:
        (2, S + 1) int32: where the attending positions of each document begin among the B * P, padded with B * P; where its tokens
        begin among the B * L, padded with B * L.

    Raises:
        RuntimeError: there are more than S documents, or longer ones (on CUDA, an assertion on the device).
    """
    batch, num_keys = starts.shape
    num_tokens = batch * num_keys
    bound = min(num_tokens, max(MIN_DOCUMENTS, batch + num_tokens // MIN_MEAN_TOKENS))
    keys = torch.nonzero_static(starts.flatten(), size=bound + 1, fill_value=num_tokens)[:, 0]  # (S + 1,)
    torch._assert_async(keys[-1] == num_tokens, f"more than {bound} documents in {num_tokens} tokens; set model.attention to sdpa")
    torch._assert_async((keys.diff() <= longest).all(), f"expected at most {longest} tokens in a document")
    row, place = keys // num_keys, keys % num_keys
    queries = row * (num_keys - first) + (place - first).clamp(min=0)
    return torch.stack((queries, keys)).int()


def _pack(q: Tensor, k: Tensor, v: Tensor, documents: Tensor, longest: int) -> dict[str, Any]:
    """What functions for sequences of different lengths take: documents in place of sequences."""
    return {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1), "cu_seqlens_q": documents[0], "cu_seqlens_k": documents[1],
            "max_seqlen_k": longest,
            "max_seqlen_q": max(2, min(q.shape[1], longest))}  # 1: one query a document to flash-attn 2 (issue 1537), but some have none


def attend_with(module: ModuleType) -> FlashAttend:
    """Attention with flash-attn 2 or 3, which differ in nothing that is used here."""

    def attend(q: Tensor, k: Tensor, v: Tensor, limits: list[int], documents: Tensor | None) -> Tensor:
        window_size = limits[0], min(limits[0], 0)
        if documents is None:
            y: Tensor = module.flash_attn_func(q, k, v, causal=True, window_size=window_size)
            return y
        y = module.flash_attn_varlen_func(**_pack(q, k, v, documents, limits[1]), causal=True, window_size=window_size)
        return y.view(q.shape)

    return attend


def attend_with_flash4(_: ModuleType) -> FlashAttend:
    """Attention with flash-attn 4."""
    return lambda *arguments: _flash4(*arguments)[0]


@torch.library.custom_op("albatross::flash4", mutates_args=(), schema=(  # not inferred: the submitted program lacks annotations
    "(Tensor q, Tensor k, Tensor v, int[] limits, Tensor? documents) -> (Tensor, Tensor)"))
def _flash4(q: Tensor, k: Tensor, v: Tensor, limits: list[int], documents: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output (B, P, H, E), and for the backward pass log-sum-exp of the scores: (B, H, P), with documents (H, B * P), fp32."""
    y, lse, *_ = importlib.import_module(FLASH4)._flash_attn_fwd(**_flash4_arguments(q, k, v, limits, documents), return_lse=True)
    return y.view(q.shape), lse


@torch.library.custom_op("albatross::flash4_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor[] saved, int[] limits, Tensor? documents) -> (Tensor, Tensor, Tensor)"))
def _flash4_backward(dy: Tensor, saved: list[Tensor], limits: list[int], documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values; `saved` are these three, and both outputs of `_flash4`."""
    q, k, v, y, lse = saved
    arguments = _flash4_arguments(q, k, v, limits, documents)
    shape = arguments["q"].shape
    dq, dk, dv = importlib.import_module(FLASH4)._flash_attn_bwd(**arguments, out=y.view(shape), dout=dy.reshape(shape), lse=lse)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape)


def _flash4_arguments(q: Tensor, k: Tensor, v: Tensor, limits: list[int], documents: Tensor | None) -> dict[str, Any]:
    options = {"causal": True, "window_size_left": None if limits[0] < 0 else limits[0]}
    return options | ({"q": q, "k": k, "v": v} if documents is None else _pack(q, k, v, documents, limits[1]))


@_flash4.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, limits: list[int], documents: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    lse_shape = (batch, heads, queries) if documents is None else (heads, batch * queries)
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


@_flash4_backward.register_fake
def _(dy: Tensor, saved: list[Tensor], limits: list[int], documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, *_ = saved
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.limits, documents = inputs
    ctx.save_for_backward(q, k, v, *output, documents)


def _differentiate(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *saved, documents = ctx.saved_tensors
    return *_flash4_backward(dy, saved, ctx.limits, documents), None, None


_flash4.register_autograd(_differentiate, setup_context=_save)
