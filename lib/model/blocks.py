"""The blocks of the language model, and what happens to the residual stream between them.

Shapes: B batch, T tokens, P wanted positions, D model. The residual stream is (B, T, D); from the first parallel block on it has two lanes,
(2, B, T, D), that of attention and that of the MLP.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.attention import Attention, Scope, rms_norm
from lib.model.config import ModelParams
from lib.model.linear import Adapters, Linear, add_low_rank


class MLP(nn.Module):
    """leaky_relu(x W_up)^2 W_down, without the residual connection around it."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.negative_slope = params.mlp_negative_slope
        self.up = Linear(params.model_dim, params.mlp_hidden_dim)
        self.down = Linear(params.mlp_hidden_dim, params.model_dim)

    def forward(self, x: Tensor, output_scale: Tensor, adapters: Adapters) -> Tensor:
        """(B, T, D), the scale (D,) of the outputs, and adapters of up, down and mlp: from `x` to the outputs, before their scale."""
        y = F.leaky_relu(self.up(x, adapter=adapters.get("up")), self.negative_slope).square()
        y = self.down(y, row_scale=output_scale, adapter=adapters.get("down"))
        return add_low_rank(y, x, adapters.get("mlp"), output_scale)


class Skip(NamedTuple):
    """The output of an earlier block that is added to the stream.

    Attributes:
        scale: scale (D,) of the earlier output.
        gate: logits (D,) of the share that the stream keeps, the scaled output has the rest; None for the sum of both.
        earlier: the earlier output, (B, T, D); None for the stream itself.
    """

    scale: Tensor
    gate: Tensor | None
    earlier: Tensor | None


class Entry(NamedTuple):
    """What happens to the residual stream between two blocks.

    Attributes:
        skip: what is added to it, on two lanes to that of attention; None for nothing.
        mix: factors (2, D) of the stream and of the embedding; None for 1 and 0.
        input_scale: scale () fp32 of the normalised inputs; None for 1.
        parallel: whether a parallel block follows.
    """

    skip: Skip | None = None
    mix: Tensor | None = None
    input_scale: Tensor | None = None
    parallel: bool = False


def enter(x: Tensor, x0: Tensor, entry: Entry) -> tuple[Tensor, Tensor]:
    """The stream in a block and its normalised inputs, from the stream before it and the embedding `x0` (B, T, D).

    Both are (B, T, D); before a `ParallelBlock`, which has the embedding mixed into its input and not into the stream, (2, B, T, D).
    """
    if not entry.parallel:
        x = _mix(_add_skip(x.mean(0) if x.ndim == 4 else x, entry.skip), x0, entry.mix)
        return x, rms_norm(x, entry.input_scale)
    attention, mlp = x if x.ndim == 4 else (x, x)
    attention = _add_skip(attention, entry.skip)
    return torch.stack((attention, mlp)), rms_norm(torch.stack((_mix(attention, x0, entry.mix), mlp)), entry.input_scale)


def _add_skip(x: Tensor, skip: Skip | None) -> Tensor:
    if skip is None:
        return x
    scaled = skip.scale.to(x.dtype) * (x if skip.earlier is None else skip.earlier)
    return x + scaled if skip.gate is None else torch.lerp(scaled, x, torch.sigmoid(skip.gate).to(x.dtype))


def _mix(x: Tensor, x0: Tensor, mix: Tensor | None) -> Tensor:
    if mix is None:
        return x
    mix = mix.to(x.dtype)
    return mix[0] * x + mix[1] * x0


class Block(nn.Module):
    """Attention and MLP, each scaled by a learned vector and added to the residual stream.

    Both halves begin with a matrix product and end with the norm before the next one, so that a compiler can fuse all that happens in
    between. Everything in which the layers of a model differ is an argument: one compiled graph of a half serves many of them.
    """

    residual_mix: nn.Parameter | None

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__()
        self.attention = Attention(params, layer)
        self.mlp = MLP(params)
        self.attention_scale = nn.Parameter(torch.empty(params.model_dim))
        self.mlp_scale = nn.Parameter(torch.empty(params.model_dim))
        self.register_parameter("residual_mix", nn.Parameter(torch.empty(2, params.model_dim)) if params.residual_mix else None)

    def attend(self, x: Tensor, y: Tensor, scope: Scope, added_value: Tensor | None, input_scale: Tensor | None, *,
               adapters: Adapters) -> tuple[Tensor, Tensor]:
        """The first half.

        Args:
            x: residual stream (B, T, D).
            y: its normalised inputs (B, T, D).
            scope: what the T positions attend to, and how.
            added_value: value embedding (B, T, K*E).
            input_scale: () fp32, of the MLP's normalised inputs; None for 1.
            adapters: those of this pass of the block.

        Returns:
            The stream and the MLP's normalised inputs at the positions of `scope`, both (B, P, D).
        """
        x = x[:, scope.first : scope.last] + self.attention(y, added_value, scope, self.attention_scale, adapters)
        return x, rms_norm(x, input_scale)

    def transform(self, x: Tensor, y: Tensor, x0: Tensor, entry: Entry, keep: bool, *,
                  adapters: Adapters) -> tuple[Tensor, Tensor, Tensor | None]:
        """The second half, and the entry to what follows.

        Args:
            x: residual stream (B, P, D).
            y: its normalised inputs (B, P, D).
            x0: embedding (B, T, D).
            entry: how the next block, or the head, takes its input.
            keep: whether the output of the block is wanted, for a later one.
            adapters: those of this pass of the block.

        Returns:
            The stream in the next block, its normalised inputs, and the output of this one, all (B, P, D).
        """
        output = x + self.mlp(y, self.mlp_scale, adapters)
        return *enter(output, x0, entry), output if keep else None


class ParallelBlock(Block):
    """Attention and MLP side by side, each with an input of its own; both add to both lanes, which are scaled before (#1855)."""

    def __init__(self, params: ModelParams, layer: int) -> None:
        super().__init__(params, layer)
        self.lane_residual = nn.Parameter(torch.empty(2))
        self.lane_outputs = nn.Parameter(torch.empty(2, 2))  # of attention and MLP, for each lane

    def attend(self, x: Tensor, y: Tensor, scope: Scope, added_value: Tensor | None, input_scale: Tensor | None, *,
               adapters: Adapters) -> tuple[Tensor, Tensor]:
        """As of `Block`, with `x` and `y` (2, B, T, D); the stream is (2, B, P, D) again, and the MLP's inputs (B, P, D) those of `y`."""
        x, mlp_input = x[:, :, scope.first : scope.last], y[1, :, scope.first : scope.last]
        output = self.attention(y[0], added_value, scope, self.attention_scale, adapters)
        return self._on_lanes(self.lane_residual, x.dtype) * x + self._on_lanes(self.lane_outputs[0], x.dtype) * output, mlp_input

    def transform(self, x: Tensor, y: Tensor, x0: Tensor, entry: Entry, keep: bool, *,
                  adapters: Adapters) -> tuple[Tensor, Tensor, Tensor | None]:
        """As of `Block`, with `x` (2, B, P, D)."""
        output = x + self._on_lanes(self.lane_outputs[1], x.dtype) * self.mlp(y, self.mlp_scale, adapters)
        return *enter(output, x0, entry), output if keep else None

    @staticmethod
    def _on_lanes(factors: Tensor, dtype: torch.dtype) -> Tensor:
        return factors.to(dtype).view(2, 1, 1, 1)
