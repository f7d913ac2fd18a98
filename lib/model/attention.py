"""Causal attention: grouped queries, normalised q and k, partial RoPE, query gains, exclusive self-attention, gates of heads.

Shapes: B batch, T tokens, P attending positions, D model, H query heads, K key/value heads, G = H/K, E head dimension, R rotated
dimensions.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.config import GATE_DIMS, ModelParams
from lib.model.linear import Adapters, Linear, add_low_rank, apply_jointly
from lib.model.sdpa import Attend, Kernel, Sight

ALL_POSITIONS = slice(None)
GATE_SCALE = 0.5  # of what a gate reads (#1855)
SMALLEST_ENERGY = 1e-24  # of a value whose direction counts: |v| = 1e-12, as torch.nn.functional.normalize has it


class Rotation(NamedTuple):
    """Cosines and sines of the rotary position embedding, each (T, 1, R/2) fp32."""

    cos: Tensor
    sin: Tensor


class Scope(NamedTuple):
    """Which positions attend, and how.

    Attributes:
        rotation: rotation of all T positions.
        first: the first of the P positions whose output is wanted.
        last: their end.
        attend: attention of these positions to the tokens that they may see.
    """

    rotation: Rotation
    first: int
    last: int
    attend: Attend


def make_scope(kernel: Kernel, rotation: Rotation, positions: slice, attention_tokens: int | None, starts: Tensor | None, *,
               is_packed: bool) -> Scope:
    """The scope of some positions.

    Args:
        kernel: the kernel that computes attention.
        rotation: rotation of all T positions.
        positions: the P positions whose output is wanted.
        attention_tokens: how many tokens a position attends to at most, itself included; None for all before it.
        starts: (B, T) bool, true where a document begins and at position 0; None if documents see each other.
        is_packed: whether no document is longer than `attention_tokens`.
    """
    first, last, _ = positions.indices(len(rotation.cos))
    span = attention_tokens if attention_tokens is not None and attention_tokens < last else None
    sight = Sight(first, last, None if is_packed else span, None if starts is None else starts[:, :last], span if is_packed else None)
    return Scope(rotation, first, last, kernel.within(sight, rotation.cos.device))


def make_rotation(params: ModelParams, num_tokens: int, attention_tokens: int | None, device: torch.device) -> Rotation:
    """Rotation for positions 0 .. `num_tokens` - 1 (RoFormer, arXiv:2104.09864).

    Distances beyond the trained length raise the base by NTK scaling: base * (T/T0)^(R/(R-2)), as in pr585 and pr410. T is the
    largest distance that attention spans: `num_tokens`, or `attention_tokens` where that is less.
    """
    dims = params.rope_dims
    base = params.rope_base
    if params.rope_trained_tokens and (span := min(num_tokens, attention_tokens or num_tokens)) > params.rope_trained_tokens:
        base *= (span / params.rope_trained_tokens) ** (dims / (dims - 2))
    frequencies = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)  # (R/2,)
    angles = torch.outer(torch.arange(num_tokens, device=device, dtype=torch.float32), frequencies)[:, None]  # (T, 1, R/2)
    return Rotation(angles.cos(), angles.sin())


def rms_norm(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """`x` over its root mean square along the last dimension, times a `scale` that broadcasts; computed in fp32, in the dtype of `x`."""
    y = F.rms_norm(x.float(), x.shape[-1:])
    return (y if scale is None else y * scale).to(x.dtype)


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
        y - (y . v̂) v̂ with v̂ = v/|v|, (B, T, H, E); computed in fp32.
    """
    own = v[:, :, :, None]  # (B, T, K, 1, E)
    grouped = y.unflatten(2, (v.shape[2], -1))  # (B, T, K, G, E)
    along, energy = ((own * other).sum(-1, keepdim=True, dtype=torch.float32) for other in (grouped, own))
    return (grouped - along / energy.clamp(min=SMALLEST_ENERGY) * own).flatten(2, 3).to(y.dtype)


class Attention(nn.Module):
    """One attention layer, without the residual connection around it."""

    gate: nn.Parameter | None

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = params.num_heads, params.num_kv_heads
        self.exclusive = layer >= params.num_layers - params.num_xsa_layers
        self.query = Linear(params.model_dim, params.model_dim)
        self.key = Linear(params.model_dim, params.kv_dim)
        self.value = Linear(params.model_dim, params.kv_dim)
        self.output = Linear(params.model_dim, params.model_dim)
        self.q_gain = nn.Parameter(torch.empty(params.num_heads))
        self.register_parameter("gate", nn.Parameter(torch.empty(params.num_heads, min(GATE_DIMS, params.model_dim)))
                                if params.attention_gate else None)

    def forward(self, x: Tensor, added_value: Tensor | None, scope: Scope, output_scale: Tensor, adapters: Adapters) -> Tensor:
        """Attend.

        Args:
            x: normalised input (B, T, D).
            added_value: value embedding (B, T, K*E) added to the values, or None.
            scope: what the T positions attend to, and how.
            output_scale: (D,), of the outputs.
            adapters: those of query, key, value and output, and that of attention: from the inputs to the outputs, before their scale.

        Returns:
            (B, P, D).
        """
        rotation, first, last, attend = scope
        if last - first == x.shape[1]:
            q, k, v = apply_jointly((self.query, self.key, self.value), x, [adapters.get(name) for name in ("query", "key", "value")])
        else:
            q = self.query(x[:, first:last], adapter=adapters.get("query"))
            k, v = apply_jointly((self.key, self.value), x, [adapters.get(name) for name in ("key", "value")])
        q = q.unflatten(-1, (self.num_heads, -1))  # (B, P, H, E)
        k = k.unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        v = (v if added_value is None else v + added_value).unflatten(-1, (self.num_kv_heads, -1))  # (B, T, K, E)
        q = rotate(rms_norm(q, self.q_gain[:, None]), Rotation(*(part[first:last] for part in rotation)))
        k = rotate(rms_norm(k), rotation)
        y = attend(q, k[:, :last], v[:, :last])  # (B, P, H, E)
        if self.exclusive:
            y = remove_own_value(y, v[:, first:last])
        if self.gate is not None:
            y = y * torch.sigmoid(GATE_SCALE * F.linear(x[:, first:last, :GATE_DIMS], self.gate))[..., None].to(y.dtype)
        y = self.output(y.flatten(2), row_scale=output_scale, adapter=adapters.get("output"))
        return add_low_rank(y, x[:, first:last], adapters.get("attention"), output_scale)
