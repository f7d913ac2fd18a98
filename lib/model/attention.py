"""Causal attention of both reference systems: grouped queries, normalised q and k, partial RoPE, query gains, exclusive self-attention.

Shapes: B batch, T tokens, D model, H query heads, K key/value heads, G = H/K, E head dimension, R rotated dimensions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.config import ModelParams


class Rotation(NamedTuple):
    """Cosines and sines of the rotary position embedding, each (T, 1, R/2) fp32."""

    cos: Tensor
    sin: Tensor


def make_rotation(params: ModelParams, num_tokens: int, device: torch.device) -> Rotation:
    """Rotation for positions 0 .. `num_tokens` - 1 (RoFormer, arXiv:2104.09864).

    A sequence longer than the trained length raises the base by NTK scaling: base * (T/T0)^(R/(R-2)), as in pr585 and pr410.
    """
    dims = params.rope_dims
    base = params.rope_base
    if num_tokens > params.rope_trained_tokens:
        base *= (num_tokens / params.rope_trained_tokens) ** (dims / (dims - 2))
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

    def forward(self, x: Tensor, rotation: Rotation, added_value: Tensor | None) -> Tensor:
        """Attend.

        Args:
            x: normalised input (B, T, D).
            rotation: of the T positions.
            added_value: value embedding (B, T, K*E) added to the values, or None.

        Returns:
            (B, T, D).
        """
        q = self.query(x).unflatten(-1, (self.num_heads, -1))  # (B, T, H, E)
        k = self.key(x).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        v = self.value(x)
        v = (v if added_value is None else v + added_value).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        q = rotate(F.rms_norm(q, q.shape[-1:]), rotation) * self.q_gain.to(q.dtype)[:, None]
        k = rotate(F.rms_norm(k, k.shape[-1:]), rotation)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=self.num_heads != self.num_kv_heads
        ).transpose(1, 2)  # (B, T, H, E)
        if self.exclusive:
            y = remove_own_value(y, v)
        return self.output(y.flatten(2))
