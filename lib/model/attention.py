"""Causal attention of both reference systems: grouped queries, normalised q and k, partial RoPE, query gains, exclusive self-attention.

Shapes: B batch, T tokens, P attending positions, D model, H query heads, K key/value heads, G = H/K, E head dimension, R rotated
dimensions, A tokens that a position attends to at most, N blocks of A positions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.config import ModelParams

ALL_POSITIONS = slice(None)


class Rotation(NamedTuple):
    """Cosines and sines of the rotary position embedding, each (T, 1, R/2) fp32."""

    cos: Tensor
    sin: Tensor


class Scope(NamedTuple):
    """Which positions attend, and to how much.

    Attributes:
        rotation: of all T positions.
        positions: the P positions whose output is wanted.
        attention_tokens: how many tokens a position attends to at most, itself included; None for all before it.
    """

    rotation: Rotation
    positions: slice
    attention_tokens: int | None


def make_rotation(params: ModelParams, num_tokens: int, attention_tokens: int | None, device: torch.device) -> Rotation:
    """Rotation for positions 0 .. `num_tokens` - 1 (RoFormer, arXiv:2104.09864).

    Distances beyond the trained length raise the base by NTK scaling: base * (T/T0)^(R/(R-2)), as in pr585 and pr410. T is the
    largest distance that attention spans: `num_tokens`, or `attention_tokens` where that is less.
    """
    dims = params.rope_dims
    base = params.rope_base
    if (span := min(num_tokens, attention_tokens or num_tokens)) > params.rope_trained_tokens:
        base *= (span / params.rope_trained_tokens) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)  # (R/2,)
    angles = torch.outer(torch.arange(num_tokens, device=device, dtype=torch.float32), frequencies)[:, None]  # (T, 1, R/2)
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the first R dimensions of each head of `x` (B, T, H, E), pairing dimension i with i + R/2; the rest passes through."""
    cos, sin = rotation.cos.to(x.dtype), rotation.sin.to(x.dtype)
    half = cos.shape[-1]
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos, rest), dim=-1)


def remove_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention (pr410): drop from each head's output its component along the token's own value.

    Args:
        y: attention output (B, T, H, E).
        v: values (B, T, K, E); each serves H/K consecutive query heads.

    Returns:
        y - (y . v̂) v̂ with v̂ = v/|v|, (B, T, H, E).
    """
    direction = F.normalize(v, dim=-1)[:, :, :, None]  # (B, T, K, 1, E)
    grouped = y.unflatten(2, (v.shape[2], -1))  # (B, T, K, G, E)
    return (grouped - (grouped * direction).sum(-1, keepdim=True) * direction).flatten(2, 3)


def attend(q: Tensor, k: Tensor, v: Tensor, first: int, attention_tokens: int | None) -> Tensor:
    """Causal attention of some positions to all tokens up to their own, or to the latest of them.

    Args:
        q: queries of positions `first` .. T - 1, (B, H, P, E).
        k: keys of positions 0 .. T - 1, (B, K, T, E).
        v: values, (B, K, T, E).
        first: T - P.
        attention_tokens: A, how many tokens a position attends to at most, itself included (sliding-window attention,
            arXiv:2004.05150); None for all.

    Returns:
        (B, H, P, E).
    """
    if attention_tokens is not None and attention_tokens < k.shape[2]:
        return _attend_to_latest(q, k, v, first, attention_tokens)
    gqa = q.shape[1] != k.shape[1]
    if first == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(first)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)


def _attend_to_latest(q: Tensor, k: Tensor, v: Tensor, first: int, span: int) -> Tensor:
    # Blocks of A queries; the keys that a block can see are those of the A positions before it and its own. Cost: 2 A keys a query.
    num_queries = q.shape[2]
    num_blocks = -(-num_queries // span)
    after = num_blocks * span - num_queries
    before = max(0, span - first)  # positions before the first token, which do not exist
    q = F.pad(q, (0, 0, 0, after)).unflatten(2, (num_blocks, span)).transpose(1, 2)  # (B, N, H, A, E)
    k, v = (F.pad(x[:, :, max(0, first - span):], (0, 0, before, after)).unflatten(2, (num_blocks + 1, span)).transpose(1, 2)
            for x in (k, v))  # (B, N+1, K, A, E)
    k, v = (torch.cat((x[:, :-1], x[:, 1:]), dim=3) for x in (k, v))  # (B, N, K, 2A, E)
    query, key = torch.arange(span, device=q.device)[:, None], torch.arange(2 * span, device=q.device)
    band = (key > query) & (key <= query + span)  # (A, 2A)
    exists = key + span * torch.arange(num_blocks, device=q.device)[:, None] >= before  # (N, 2A)
    mask = (band & exists[:, None])[:, None]  # (N, 1, A, 2A)
    y = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), attn_mask=mask.repeat(q.shape[0], 1, 1, 1),
                                       enable_gqa=q.shape[2] != k.shape[2])  # (B*N, H, A, E)
    return y.unflatten(0, (-1, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :num_queries]


class Attention(nn.Module):
    """One attention layer, without the residual connection around it."""

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = params.num_heads, params.num_kv_heads
        self.exclusive = layer >= params.num_layers - params.num_xsa_layers
        self.query = nn.Linear(params.model_dim, params.model_dim, bias=False)
        self.key = nn.Linear(params.model_dim, params.kv_dim, bias=False)
        self.value = nn.Linear(params.model_dim, params.kv_dim, bias=False)
        self.output = nn.Linear(params.model_dim, params.model_dim, bias=False)
        self.q_gain = nn.Parameter(torch.empty(params.num_heads))

    def forward(self, x: Tensor, added_value: Tensor | None, scope: Scope) -> Tensor:
        """Attend.

        Args:
            x: normalised input (B, T, D).
            added_value: value embedding (B, T, K*E) added to the values, or None.
            scope: of the T positions.

        Returns:
            (B, P, D).
        """
        rotation, positions, attention_tokens = scope
        first, last, _ = positions.indices(x.shape[1])
        q = self.query(x[:, positions]).unflatten(-1, (self.num_heads, -1))  # (B, P, H, E)
        k = self.key(x).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        v = self.value(x)
        v = (v if added_value is None else v + added_value).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        q = rotate(F.rms_norm(q, q.shape[-1:]), Rotation(*(part[positions] for part in rotation))) * self.q_gain.to(q.dtype)[:, None]
        k = rotate(F.rms_norm(k, k.shape[-1:]), rotation)
        y = attend(q.transpose(1, 2), k[:, :last].transpose(1, 2), v[:, :last].transpose(1, 2), first, attention_tokens)
        y = y.transpose(1, 2)  # (B, P, H, E)
        if self.exclusive:
            y = remove_own_value(y, v[:, positions])
        return self.output(y.flatten(2))
