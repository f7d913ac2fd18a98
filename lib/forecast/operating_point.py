"""Which size of model a byte budget wants: more weights, or more bits for each.

A model of N weights in B bytes has b = 8 B / N bits for each. Its loss is that of the float model, L(N) = L(N0) - a ln(N / N0), and what
quantization adds to it, KL(b, N) = k 2^(-p b) (N / N0)^-q, where N0 is the size that others are compared with. Rounding errors fall
with p = 2 where steps are small. With q = 0 all weights are equally dear; where errors in the added ones matter less, as in rows of a table
that are seldom read, q > 0. At the best N a further weight is worth what it costs: a = KL (p b ln 2 - q).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A model in some bytes, measured or predicted.

    Attributes:
        num_weights: N, weights in matrices.
        num_bytes: B, of the packed model.
        float_loss: L, nats per token of the float model.
        kl: what quantization adds, nats per token; above 0.
    """

    num_weights: int
    num_bytes: int
    float_loss: float
    kl: float

    @property
    def bits(self) -> float:
        """Bits per weight."""
        return 8 * self.num_bytes / self.num_weights

    @property
    def loss(self) -> float:
        """Nats per token of the quantized model."""
        return self.float_loss + self.kl


class Direction(NamedTuple):
    """Models that differ in the number of weights in one place; letters as at the head of this module.

    Attributes:
        num_weights: N0.
        float_loss: L(N0), nats per token.
        value: a, nats per token.
        scale: k, nats per token.
        rate: p, halvings for each bit per weight.
        dilution: q.
        residual: root mean square of what the fit leaves of ln KL.
    """

    num_weights: int
    float_loss: float
    value: float
    scale: float
    rate: float
    dilution: float
    residual: float

    def predict(self, num_weights: int, num_bytes: int) -> Point:
        """The model of so many weights in so many bytes."""
        growth = num_weights / self.num_weights
        kl = self.scale * 2 ** (-self.rate * 8 * num_bytes / num_weights) * growth**-self.dilution
        return Point(num_weights, num_bytes, self.float_loss - self.value * math.log(growth), kl)


def fit_direction(start: Sequence[Point], end: Sequence[Point]) -> Direction:
    """The direction from one model to another; k, p and q by least squares of ln KL.

    Args:
        start: the model of N0 weights in several sizes.
        end: another one, of another number of weights, in several sizes.
    """
    first, last, points = start[0], end[0], [*start, *end]
    bits, growth, kl = np.array([(each.bits, each.num_weights / first.num_weights, each.kl) for each in points]).T
    design = np.stack([np.ones_like(bits), -math.log(2) * bits, -np.log(growth)], axis=1)
    found = np.linalg.lstsq(design, np.log(kl), rcond=None)[0]
    residual = math.sqrt(np.mean((np.log(kl) - design @ found) ** 2))
    log_scale, rate, dilution = found.tolist()
    value = (first.float_loss - last.float_loss) / math.log(last.num_weights / first.num_weights)
    return Direction(first.num_weights, first.float_loss, value, math.exp(log_scale), rate, dilution, residual)
