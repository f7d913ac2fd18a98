"""Parameters of the quantize stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params import Fraction, NonNegative, NonNegativeFloat, Params, Positive, PositiveFloat, Precision
from lib.quantization.grid_config import Bits

FREE: Literal["free"] = "free"
BitWidth = Bits | Literal["free"]
"""2 to 8: bits of a grid that clips; 16: fp16; free: steps for rows, columns and matrices that `target_bytes` decides, without clipping."""


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
    """Rule std: standard deviations of the row."""
    num_std_of: dict[str, PositiveFloat]
    """Exceptions: role of matrices -> the same."""
    floor: NonNegativeFloat
    """No row has a smaller clip, whatever the rule gives; 0 = none. Entries #585 and #410 have 1 in all grids, that is a scale of at
    least 1/15 with 5 bits, 1/31 with 6, 1/127 with 8, which all rows of their models have: one uniform step."""

    def of_role(self, role: str) -> Self:
        """The parameters for matrices of a role, in `num_std`."""
        return self.model_copy(update={"num_std": self.num_std_of.get(role, self.num_std)})


class LowRankParams(Params):
    """Low-rank correction of the quantization error (LQER, arXiv:2402.02446)."""

    max_bytes: NonNegative
    """Bytes of all factors together, before entropy coding; 0 = none. Spent one direction at a time, where that lowers the predicted loss
    most per byte."""
    bits: Annotated[int, Field(ge=2, le=8)]
    """Bits of the factors."""


class DistillParams(Params):
    """Training of codes and vectors towards the float model, on training text (`lib.quantization.distillation`)."""

    steps: NonNegative
    """0 = none."""
    batch_sequences: Positive
    """Training sequences per step, over all processes."""
    code_lr: PositiveFloat
    """Adam, in steps of the codes; falls to 0 along a cosine."""
    vector_lr: NonNegativeFloat
    """Adam: gains, scales and mixes; the same."""
    excess: NonNegativeFloat
    """Free steps: how much larger than `target_bytes`, as a fraction, the codes are that distillation starts from and makes shorter."""
    precision: Precision
    """Precision of matrix products."""


class QuantizeParams(Params):
    """Section ``quantize``."""

    target_bytes: Positive | None
    """Size of code and artifact together that the steps of free matrices are chosen for; null when none is free."""
    method: Literal["gptq", "rtn"]
    """GPTQ (arXiv:2210.17323) or round-to-nearest."""
    bits: dict[str, BitWidth]
    """Role of matrices (`lib.model.parts`) -> bits; every role that the model has."""
    bits_of: dict[str, BitWidth]
    """Exceptions: name of a matrix -> the same."""
    free_rows: bool
    """Free steps: one for each row, by the gradients at the outputs."""
    free_columns: bool
    """Free steps: one for each column, by the Cholesky factor that GPTQ works with."""
    clip: ClipParams
    damping: Annotated[Fraction, Field(gt=0)]
    """Fraction of the mean diagonal that is added to the Hessian's diagonal; raised tenfold where that is not enough."""
    feedback_damping: Fraction | None
    """Free steps: feedback across the outputs of linear layers (as YAQA, arXiv:2505.22988), with this fraction of the mean diagonal added
    to the second moments of the output gradients; null = within each output alone, as GPTQ."""
    block_size: Positive
    """GPTQ: columns between two updates of all later columns; changes speed, not results."""
    act_order: bool
    """GPTQ: columns in descending order of the Hessian's diagonal, instead of in their own order."""
    rate_weight: NonNegativeFloat
    """Rounding minimises squared error + rate_weight x code length in bits, the error in squared steps, weighed as GPTQ weighs the
    column; 0 = nearest. At 0.1155 a bit costs what it would cost to buy it with finer steps (uniform quantizer at high rate)."""
    prune_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Fraction of each matrix: so many of its smallest magnitudes are fixed at zero, and the others compensate."""
    low_rank: LowRankParams
    distill: DistillParams
    vector_mantissa_bits: Annotated[int, Field(ge=0, le=10)]
    """Mantissa bits of gains, scales and mixes, which are stored as fp16; fewer than fp16's 10 are smaller after compression."""
    heldout_tokens: Positive
    """At most so many held-out tokens, in evenly spread windows, to measure the quantized model against the float one."""

    @property
    def first_target_bytes(self) -> int | None:
        """Size that GPTQ is to meet, from which distillation goes on to `target_bytes`."""
        if self.target_bytes is None or not self.distill.steps:
            return self.target_bytes
        return round(self.target_bytes * (1 + self.distill.excess))

    @property
    def undistilled(self) -> Self:
        """The same without distillation."""
        return self.model_copy(update={"distill": self.distill.model_copy(update={"steps": 0})})

    @model_validator(mode="after")
    def _check(self) -> Self:
        is_free = FREE in (*self.bits.values(), *self.bits_of.values())
        if is_free != (self.target_bytes is not None):
            raise ValueError("target_bytes: expected a number exactly when the bits of some matrices are free, "
                             f"found {self.target_bytes} and {'some' if is_free else 'no'} free matrices")
        if self.distill.steps and (self.low_rank.max_bytes or self.prune_fraction):
            raise ValueError("distill.steps: expected 0, or neither pruning nor low-rank corrections, which distillation would undo, "
                             f"found {self.distill.steps}, prune_fraction {self.prune_fraction:g} and low_rank.max_bytes "
                             f"{self.low_rank.max_bytes}")
        return self
