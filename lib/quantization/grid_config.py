"""Parameters of the grid, which quantization-aware training and export share.

Apart from `lib.quantization.config`, so that a new option of the quantize stage does not make a checkpoint stale.
"""

from typing import Annotated, Generic, Literal, TypeVar

from pydantic import AfterValidator, Field

from lib.params import NonNegativeFloat, Params, Positive, PositiveFloat

FLOAT_BITS = 16
MAX_INTEGER_BITS = 8


def _check_bits(bits: int) -> int:
    if bits != FLOAT_BITS and not 2 <= bits <= MAX_INTEGER_BITS:
        raise ValueError(f"expected 2 to {MAX_INTEGER_BITS}, or {FLOAT_BITS} for fp16 without quantization, found {bits}")
    return bits


Bits = Annotated[int, AfterValidator(_check_bits)]


T = TypeVar("T")


class ByRole(Params, Generic[T]):
    """One value for each role of a matrix."""

    attention: T
    """Query, key, value and output projections."""
    mlp: T
    embedding: T
    """Token embedding; also the head where the head is tied to it."""
    bigram: T
    """Hashed bigram table and its projection."""
    value_embedding: T
    """Value-embedding table and its projection."""
    head: T
    """Untied head; without effect on a tied one."""


class ClipParams(Params):
    """How far the grid of each row reaches: codes -clip_range .. clip_range cover -clip .. clip."""

    rule: Literal["max", "percentile", "mse", "std"]
    """max: largest magnitude of the row. percentile: the best of `percentiles`. mse: the best of `num_candidates` fractions
    of the maximum. std: `num_std` standard deviations. Best is the least squared rounding error. An entry of CLIP_RULES."""
    percentiles: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Field(min_length=1)]
    """Rule percentile: candidate quantiles of the row's magnitudes, as fractions (entry #585: 0.999 .. 1)."""
    num_candidates: Positive
    """Rule mse: candidates k/num_candidates of the maximum, k = 1 .. num_candidates."""
    num_std: PositiveFloat
    """Rule std: standard deviations (about zero) of the row."""
    floor: NonNegativeFloat
    """No row has a smaller clip, whatever the rule gives; 0 = none. Entries #585 and #410 have 1 in all grids, that is a scale of at
    least 1/15 with 5 bits, 1/31 with 6, 1/127 with 8, which all rows of their models have: one uniform step."""
