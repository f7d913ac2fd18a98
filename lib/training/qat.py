"""Quantization-aware training on the export grid, by swapping the weights around forward and backward.

Computing the loss and its gradient at the quantized weights and applying that gradient to the float weights is the
straight-through estimator. The switch lies outside of the model: a compiled graph takes weights as inputs, so nothing can be
folded into it, and no state of QAT can reach scoring or test-time training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from lib.model.roles import MATRIX_ROLES, role_of
from lib.quantization.grid import fake_quantize
from lib.quantization.grid_config import FLOAT_BITS
from lib.training.config import QatParams
from lib.training.flat import FlatParameters, group_of


class FakeQuantization:
    """The matrices of a model that the export will quantize, with their bits."""

    def __init__(self, parameters: FlatParameters, params: QatParams) -> None:
        self._params = params
        self._matrices: list[tuple[Tensor, int]] = []  # rows (N*R, C) of all matrices of one shape and role, bits
        kinds = parameters.parts(lambda name, p: (group_of(name, p.ndim), role_of(name, p.ndim), tuple(p.shape)))
        for (_, role, shape), part in kinds.items():
            if role in MATRIX_ROLES and (bits := getattr(params.bits, role)) != FLOAT_BITS:
                self._matrices.append((parameters.weights[part].view(-1, shape[-1]), bits))

    def is_on(self, lr_multiplier: float) -> bool:
        """Whether this step trains on the grid."""
        return lr_multiplier < self._params.below_lr

    @contextmanager
    def applied(self, on: bool) -> Iterator[None]:
        """Within the context, if `on`, the matrices hold their quantized values; afterwards their float values, bit for bit."""
        originals = [rows.clone() for rows, _ in self._matrices] if on else []
        if on:
            for rows, bits in self._matrices:
                rows.copy_(fake_quantize(rows, bits, self._params.clip, self._params.full_range))
        try:
            yield
        finally:
            for original, (rows, _) in zip(originals, self._matrices, strict=False):
                rows.copy_(original)
