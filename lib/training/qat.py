"""Quantization-aware training on the export grid, by swapping the weights around forward and backward.

Computing the loss and its gradient at the quantized weights and applying that gradient to the float weights is the
straight-through estimator. The switch lies outside of the model: a compiled graph takes weights as inputs, so nothing can be
folded into it, and no state of QAT can reach scoring or test-time training.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lib.model.roles import MATRIX_ROLES, role_of
from lib.quantization.grid import fake_quantize
from lib.quantization.grid_config import FLOAT_BITS
from lib.training.config import QatParams


class FakeQuantization:
    """The matrices of a model that the export will quantize, with their bits."""

    def __init__(self, model: nn.Module, params: QatParams) -> None:
        self._params = params
        self._matrices: list[tuple[nn.Parameter, int]] = []
        for name, parameter in model.named_parameters():
            role = role_of(name, parameter.ndim)
            if role in MATRIX_ROLES and (bits := getattr(params.bits, role)) != FLOAT_BITS:
                self._matrices.append((parameter, bits))

    def is_on(self, lr_multiplier: float) -> bool:
        """Whether this step trains on the grid."""
        return lr_multiplier < self._params.below_lr

    @contextmanager
    def applied(self, on: bool) -> Iterator[None]:
        """Within the context, if `on`, the matrices hold their quantized values; afterwards their float values, bit for bit."""
        originals = [parameter.detach().clone() for parameter, _ in self._matrices] if on else []
        with torch.no_grad():
            if on:
                for parameter, bits in self._matrices:
                    parameter.data.copy_(fake_quantize(parameter.data, bits, self._params.clip))
        try:
            yield
        finally:
            for original, (parameter, _) in zip(originals, self._matrices, strict=False):
                parameter.data.copy_(original)
