"""Linear layers: several of one input as one product, and low-rank adapters of the rows of a batch.

Shapes: B batch, T tokens, R rows (outputs), C columns (inputs), K rank.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LowRank = tuple[Tensor, Tensor]
"""A (B, K, C) and B (B, R, K) of an adapter for each row of a batch; more of them than rows are no fault."""


def add_low_rank(y: Tensor, x: Tensor, adapter: LowRank | None, row_scale: Tensor | None = None) -> Tensor:
    """y + s B A x (LoRA, arXiv:2106.09685), or `y` where there is no adapter.

    Args:
        y: outputs (B, T, R).
        x: inputs (B, T, C).
        adapter: adapters of the rows of the batch.
        row_scale: s (R,), of each output; None for 1.
    """
    if adapter is None:
        return y
    a, b = (part[: len(x)] for part in adapter)
    return y + (x @ a.transpose(1, 2)) @ (b if row_scale is None else row_scale[:, None] * b).transpose(1, 2)


class Linear(nn.Linear):
    """y = W x.

    Attributes:
        adapter: added to the product while it is set. A compiled graph is guarded by it, as it is not by hooks (torch 2.11).
    """

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__(num_inputs, num_outputs, bias=False)
        self.adapter: LowRank | None = None

    def forward(self, x: Tensor, product: Tensor | None = None, row_scale: Tensor | None = None) -> Tensor:
        """The outputs, (B, T, R).

        Args:
            x: inputs (B, T, C).
            product: inputs times weight, (B, T, R), where it is known.
            row_scale: (R,), of each output. The rows of the weight are scaled, which are fewer than those of the outputs: forward and
                backward pass save two readings of the outputs and two writings.
        """
        if product is None:
            product = F.linear(x, self.weight if row_scale is None else row_scale[:, None] * self.weight)
        return add_low_rank(product, x, self.adapter, row_scale)


def apply_jointly(layers: Sequence[Linear], x: Tensor) -> list[Tensor]:
    """The outputs (B, T, R) of several layers for the same input (B, T, C), from one product with all their weights."""
    products = F.linear(x, torch.cat([layer.weight for layer in layers])).split([layer.out_features for layer in layers], dim=-1)
    return [layer(x, product) for layer, product in zip(layers, products, strict=True)]
