"""Linear layers: several of one input as one product, and low-rank adapters of the rows of a batch.

Shapes: B batch, T tokens, R rows (outputs), C columns (inputs), K rank.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(NamedTuple):
    """An adapter for each row of a batch; more of them than rows are no fault.

    Attributes:
        a: (B, K, C).
        b: (B, R, K).
        factor: scale of the product B A x.
    """

    a: Tensor
    b: Tensor
    factor: float = 1.0


Adapters = Mapping[str, LowRank]
"""Adapters in one pass of a block, by the name of the layer whose outputs they are added to; a layer may have none. They are arguments,
because a compiled graph is guarded by its arguments, and not by hooks (torch 2.11)."""


def add_low_rank(y: Tensor, x: Tensor, adapter: LowRank | None, row_scale: Tensor | None = None) -> Tensor:
    """y + s factor B A x (LoRA, arXiv:2106.09685), or `y` where there is no adapter.

    Args:
        y: outputs (B, T, R).
        x: inputs (B, T, C).
        adapter: adapters of the rows of the batch.
        row_scale: s (R,), of each output; None for 1.
    """
    if adapter is None:
        return y
    a, b = adapter.a[: len(x)], adapter.factor * adapter.b[: len(x)]
    return y + (x @ a.transpose(1, 2)) @ (b if row_scale is None else row_scale[:, None] * b).transpose(1, 2)


class Linear(nn.Linear):
    """y = W x."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)

    def forward(self, x: Tensor, product: Tensor | None = None, row_scale: Tensor | None = None, adapter: LowRank | None = None) -> Tensor:
        """The outputs, (B, T, R).

        Args:
            x: inputs (B, T, C).
            product: inputs times weight, (B, T, R), where it is known.
            row_scale: (R,), of each output. The rows of the weight are scaled, which are fewer than those of the outputs: forward and
                backward pass save two readings of the outputs and two writings.
            adapter: adapters of the rows of the batch, which are added.
        """
        if product is None:
            product = F.linear(x, self.weight if row_scale is None else row_scale[:, None] * self.weight)
        return add_low_rank(product, x, adapter, row_scale)


def apply_jointly(layers: Sequence[Linear], x: Tensor, adapters: Sequence[LowRank | None]) -> list[Tensor]:
    """The outputs (B, T, R) of several layers, each with its adapter, for the same input (B, T, C), from one product with all weights."""
    products = F.linear(x, torch.cat([layer.weight for layer in layers])).split([layer.out_features for layer in layers], dim=-1)
    return [layer(x, product, adapter=adapter) for layer, product, adapter in zip(layers, products, adapters, strict=True)]
