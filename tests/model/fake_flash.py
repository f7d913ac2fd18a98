# ruff: noqa: PLR0917, N803 (these are the signatures of others)
# mypy: disable-error-code="no-untyped-def"
"""Stand-ins for the three flash-attn libraries: their published signatures, layouts, checks and semantics, computed naively on any device.

flash-attn 2.8.3, hopper/flash_attn_interface.py of commit 01afd16d, flash-attn-4 4.0.0b36. Options that the project does not use must
keep their defaults. Shapes: B batch, P queries, L keys, H query heads, K key/value heads, E head dimension, S packed sequences.
"""

import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

OPTIONS_USED = {"q", "k", "v", "causal", "window_size", "window_size_left", "window_size_right", "cu_seqlens_q", "cu_seqlens_k",
                "max_seqlen_q", "max_seqlen_k", "return_lse", "out", "dout", "lse"}


def check(condition: bool, text: str) -> None:
    if not condition:
        raise RuntimeError(f"flash-attn: {text}")


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    check(q.dtype in (torch.bfloat16, torch.float16) and q.dtype == k.dtype == v.dtype, "fp16 or bf16, the same for all")
    check(q.shape[-2] % k.shape[-2] == 0 and k.shape == v.shape and q.shape[-1] == k.shape[-1] and k.dim() == q.dim(), "shapes")
    check(q.shape[-1] % 8 == 0 and q.shape[-1] <= 256, "head dimension")
    check(all(x.stride(-1) == 1 for x in (q, k, v)), "contiguous last dimension")


def visible(query: Tensor, key: Tensor, num_queries: Tensor | int, num_keys: Tensor | int, left: int) -> Tensor:
    """Causal mask aligned to the bottom right corner, with a window to the left if `left` >= 0."""
    own = query + num_keys - num_queries
    return (key <= own) & (key >= own - left if left >= 0 else key >= 0)


def spread(q: Tensor, *others: Tensor) -> list[Tensor]:
    """(..., T, heads, E) -> (..., H, T, E) fp32, each key head repeated for its query heads."""
    return [x.float().repeat_interleave(q.shape[-2] // x.shape[-2], dim=-2).transpose(-2, -3) for x in (q, *others)]


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (..., P, H, E) -> outputs of that shape in their dtype, log-sum-exp (..., H, P) fp32; `seen` (..., P, L)."""
    queries, keys, values = spread(q, k, v)
    scores = (queries @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ values).transpose(-2, -3).to(q.dtype), scores.logsumexp(-1)


def differentiate(q: Tensor, k: Tensor, v: Tensor, y: Tensor, dy: Tensor, lse: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
    """Gradients as the FlashAttention papers derive them from outputs and log-sum-exp."""
    queries, keys, values, outputs, gradients = spread(q, k, v, y, dy)
    scale = 1 / math.sqrt(q.shape[-1])
    shares = (queries @ keys.transpose(-1, -2) * scale - lse[..., None]).exp().masked_fill(~seen, 0)
    scores = shares * (gradients @ values.transpose(-1, -2) - (gradients * outputs).sum(-1, keepdim=True)) * scale
    found = scores @ keys, scores.transpose(-1, -2) @ queries, shares.transpose(-1, -2) @ gradients  # each (..., H, T, E)
    return tuple(x.transpose(-2, -3).unflatten(-2, (like.shape[-2], -1)).sum(-2).to(like.dtype)
                 for x, like in zip(found, (q, k, v), strict=True))


def see_dense(q: Tensor, k: Tensor, v: Tensor, left: int) -> Tensor:
    check(q.dim() == 4 and q.shape[0] == k.shape[0], "(B, T, heads, E)")
    check_inputs(q, k, v)
    queries, keys = q.shape[1], k.shape[1]
    return visible(torch.arange(queries)[:, None], torch.arange(keys), queries, keys, left)


def see_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, left: int) -> Tensor:
    check(q.dim() == 3, "(total, heads, E)")
    check_inputs(q, k, v)
    check(cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.stride(0) == cu_k.stride(0) == 1 and cu_q.shape == cu_k.shape, "cu_seqlens")
    check(not (max_q == 1 and q.shape[1] > k.shape[1] and q.shape[0] != len(cu_q) - 1), "issue 1537: one query a sequence")
    torch._assert_async(((cu_q.diff() >= 0) & (cu_q.diff() <= max_q) & (cu_k.diff() >= 0) & (cu_k.diff() <= max_k)).all(), "lengths")
    torch._assert_async((cu_q[0] == 0) & (cu_k[0] == 0) & (cu_q[-1] == len(q)) & (cu_k[-1] == len(k)), "ends")
    places_q, places_k = (torch.arange(len(x), dtype=torch.int32) for x in (q, k))
    sequence, owner = torch.searchsorted(cu_q[1:], places_q, right=True), torch.searchsorted(cu_k[1:], places_k, right=True)
    query, key = (places_q - cu_q[sequence])[:, None], places_k - cu_k[owner]
    return visible(query, key, cu_q.diff()[sequence][:, None], cu_k.diff()[sequence][:, None], left) & (sequence[:, None] == owner)


def refuse_other_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Raises, like the real one, for arguments that it does not have, and for options that are not implemented here."""
    signature = inspect.signature(function)
    others = {name: parameter.default for name, parameter in signature.parameters.items() if name not in OPTIONS_USED}

    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        check(bound["causal"] is True, "only causal attention is implemented here")
        check(all(bound[name] == default for name, default in others.items() if name in bound), "option not implemented here")
        with torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return checked


@torch.library.custom_op("albatross_fake::forward", mutates_args=())
def custom_operator(q: Tensor) -> Tensor:
    return q.clone()


def make_flash2() -> ModuleType:
    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):
        return attend(q, k, v, see_dense(q, k, v, window_size[0]))[0]

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                               causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
                               return_attn_probs=False, block_table=None):
        return attend(q, k, v, see_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size[0]))[0]

    return make_module("flash_attn.flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def make_flash3() -> ModuleType:
    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                        sm_margin=0, return_attn_probs=False):
        return attend(q, k, v, see_dense(q, k, v, window_size[0]))[0]

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
                               softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
                               window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
                               sm_margin=0, return_attn_probs=False):
        return attend(q, k, v, see_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size[0]))[0]

    return make_module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def make_flash4() -> ModuleType:
    def find_seen(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int, left: int | None,
                  ) -> Tensor:
        bound = -1 if left is None else left
        return see_dense(q, k, v, bound) if cu_q is None or cu_k is None else see_packed(q, k, v, cu_q, cu_k, max_q, max_k, bound)

    def _flash_attn_fwd(q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
                        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
                        window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
                        intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
                        block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
                        q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
                        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False):
        check(out is None and lse is None, "preallocated outputs are not implemented here")
        y, denominators = attend(q, k, v, find_seen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left))
        return y.contiguous(), denominators.contiguous() if return_lse else None, None, None, None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
                        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
                        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
                        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
                        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
                        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
                        learnable_sink=None):
        check(out.shape == dout.shape == q.shape and out.dtype == dout.dtype == q.dtype and lse.dtype == torch.float32, "backward inputs")
        seen = find_seen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, window_size_left)
        check(lse.shape == (*q.shape[:-3], q.shape[-2], q.shape[-3]), "lse")
        return differentiate(q, k, v, out, dout, lse, seen)

    return make_module("flash_attn.cute.interface", _flash_attn_fwd, _flash_attn_bwd)


def make_module(name: str, *functions: Callable[..., Any]) -> ModuleType:
    module = ModuleType(name)
    module.__dict__["_flash_attn_forward"] = custom_operator
    module.__dict__.update({function.__name__: refuse_other_options(function) for function in functions})
    return module


FAKES = {"flash2": make_flash2, "flash3": make_flash3, "flash4": make_flash4}
