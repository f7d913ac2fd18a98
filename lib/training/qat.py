"""Quantization-aware training on the export grid, by swapping the weights around forward and backward.

Computing the loss and its gradient at the quantized weights and applying that gradient to the float weights is the
straight-through estimator. The switch lies outside of the model: a compiled graph takes weights as inputs, so nothing can be
folded into it, and no state of QAT can reach scoring or test-time training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lib.quantization.grid import find_quantiles, make_scales, round_to_grid
from lib.quantization.grid_config import FLOAT_BITS
from lib.training.config import QatParams
from lib.training.flat import FlatParameters, group_of


def fake_quantize(weight: Tensor, bits: int, params: QatParams) -> Tensor:
    """The weights after rounding to the grid and back: (R, C) fp32 -> (R, C) fp32."""
    clips, = find_quantiles(weight, [params.clip_quantile])
    scales = make_scales(clips, bits, params.floor)[:, None]
    return round_to_grid(weight, scales, bits, params.full_range).mul_(scales)


class FakeQuantization:
    """The matrices of a model that the export will quantize, with their bits."""

    def __init__(self, parameters: FlatParameters, params: QatParams) -> None:
        self._params = params
        self._matrices: list[tuple[Tensor, int]] = []  # rows (N*R, C) of all matrices of one shape and role, bits
        alike = parameters.slices(lambda part, p: (group_of(part), part.role, tuple(p.shape)) if part.is_matrix else None)
        for (_, role, shape), where in alike.items():
            if (bits := params.bits[role]) != FLOAT_BITS:
                self._matrices.append((parameters.weights[where].view(-1, shape[-1]), bits))

    def is_on(self, lr_multiplier: float) -> bool:
        """Whether this step trains on the grid."""
        return lr_multiplier < self._params.below_lr

    @contextmanager
    def applied(self, on: bool) -> Iterator[None]:
        """Within the context, if `on`, the matrices hold their quantized values; afterwards their float values, bit for bit."""
        originals = [rows.clone() for rows, _ in self._matrices] if on else []
        if on:
            for rows, bits in self._matrices:
                rows.copy_(fake_quantize(rows, bits, self._params))
        try:
            yield
        finally:
            for original, (rows, _) in zip(originals, self._matrices, strict=False):
                rows.copy_(original)
