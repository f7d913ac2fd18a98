"""Parameters of the train stage."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params import Fraction, NonNegative, NonNegativeFloat, Params, Positive, PositiveFloat, Precision
from lib.quantization.grid_config import Bits
from lib.training.schedule import lr_multiplier


class ByGroup(Params):
    """A value for each group of parameters."""

    matrix: NonNegativeFloat
    embedding: NonNegativeFloat
    vector: NonNegativeFloat
    head: NonNegativeFloat


class OptimizerParams(Params):
    """Muon for the matrices of linear layers, AdamW for everything else."""

    matrix_lr: PositiveFloat
    """Muon: matrices of linear layers except an untied head."""
    embedding_lr: PositiveFloat
    """AdamW: token, bigram and value embedding tables."""
    vector_lr: PositiveFloat
    """AdamW: gains, scales, gates, mixes, skip weights."""
    head_lr: PositiveFloat
    """AdamW: untied head."""
    weight_decay: ByGroup
    """Decoupled."""
    cautious_decay: bool
    """Muon: only weights that the update makes smaller decay (arXiv:2510.12402)."""
    momentum: Fraction
    """Muon, Nesterov, after its warmup."""
    momentum_start: Fraction
    """Muon momentum at the first step."""
    momentum_warmup: Fraction
    """Fraction of the budget in which the momentum rises linearly."""
    orthogonalization: Literal["newton_schulz", "polar_express"]
    """Muon: how updates are orthogonalised; an entry of ORTHOGONALIZATIONS."""
    orthogonalization_steps: Positive
    normalize_rows: Literal["none", "before", "after"]
    """Muon: rows of updates are divided by their norm before orthogonalization (MuonEq-R, entry #1855), or after it by the root of the
    running mean of their squares (NorMuon, arXiv:2510.05491)."""
    row_beta: Annotated[float, Field(ge=0, lt=1)]
    """Decay of that running mean."""
    adam_betas: tuple[Fraction, Fraction]
    adam_eps: PositiveFloat
    grad_clip: PositiveFloat
    """Largest global gradient norm."""
    warmdown: Fraction
    """Last fraction of the budget, in which the learning rates fall linearly to 0,"""
    lr_floor: Fraction
    """but not below this fraction of what they were (entry #1855: 0.1)."""


class AveragingParams(Params):
    """Averages of the weights over the run, kept in fp32."""

    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    ema_every_steps: Positive
    swa_below_lr: Fraction
    """Snapshots are taken while the learning-rate multiplier is below this."""
    swa_every_steps: Positive
    select: Literal["raw", "ema", "swa", "heldout"]
    """What becomes the checkpoint; `heldout` takes the one with the fewest bits per byte on the held-out documents."""


class QatParams(Params):
    """Late quantization-aware training: fake quantization with straight-through gradients."""

    below_lr: NonNegativeFloat
    """On while the learning-rate multiplier is below this: 0 never, more than 1 from the first step."""
    bits: dict[str, Bits]
    """Role of matrices (`lib.model.parts`) -> bits; every role that the model has."""
    full_range: bool
    """Codes reach down to -2^(bits - 1), -16 of int5, as #585 and #410 train; the export is symmetric."""
    clip_quantile: Annotated[float, Field(gt=0, le=1)]
    """The grid of a row reaches to this quantile of its magnitudes; 1 is the largest one (#585: .9995, #410: 1)."""
    floor: NonNegativeFloat
    """But no less far than this; 0 = none. Should be that of ``quantize.clip``."""


class HeldoutCurveParams(Params):
    """Held-out scores of the raw weights while they are trained. They change no weight, and take no time from ``budget_seconds``."""

    every_steps: Positive
    """Steps between two points; the last one is measured after the last step."""
    tokens: Annotated[Positive, Field(ge=2)]
    """Held-out tokens, at most, in evenly spread windows; all that there are, if they are no more."""


class TrainParams(Params):
    """Section ``train``."""

    budget_steps: Positive | Annotated[tuple[tuple[NonNegative, Positive], ...], Field(min_length=1)] | None
    """Optimizer steps; or, to repeat a run that was limited in seconds, what its metrics say under ``budget_steps``."""
    budget_seconds: PositiveFloat | None
    """Exactly one of the two budgets is given; schedules follow the fraction of it that is done."""
    reserve_seconds: PositiveFloat | None
    """Part of `budget_seconds` that is left for calibrate, which then fails if it takes longer; None if it has no limit."""
    reserve_distill_seconds: PositiveFloat | None
    """The same for ``quantize.distill``."""
    sequence_tokens: Annotated[Positive, Field(ge=2)]
    """The largest context, also of all later stages."""
    row_tokens: Positive | None
    """Packed rows of so many tokens, whose parts do not see each other: one begins with the row, at every BOS, and every
    `sequence_tokens` after each (#1855: 98,304). None: rows of `sequence_tokens`, which are not packed."""
    sequence_schedule: tuple[tuple[Fraction, Annotated[Positive, Field(ge=2)]], ...]
    """(fraction of the budget at which it ends, tokens in place of `sequence_tokens`) pairs, both rising, for packed rows."""
    data_order: Literal["shuffled", "sequential"]
    """shuffled: rows from all over the text, others for every seed and epoch (`lib.data.loader`). sequential: the text as it comes, the
    same for every seed (#1855; `lib.data.sequential`)."""
    batch_sequences: Positive
    """Rows per optimizer step, over all processes, which need not divide it."""
    micro_batch_sequences: Positive
    """Rows per forward pass of one process, at most; less memory, more passes."""
    loop_start: Fraction
    """Fraction of the budget from which on the layers of ``model.loop`` are run through several times; before it, once, which is faster.
    Averages, and all later stages, run them several times."""
    precision: Precision
    """Precision of matrix products; weights, optimizer state and averages are fp32."""
    compile: bool
    """Compile the model's parts (needs a C++ compiler on CPUs, Triton on GPUs)."""
    optimizer: OptimizerParams
    averaging: AveragingParams
    qat: QatParams
    heldout_curve: HeldoutCurveParams | None
    """None: not measured before the end."""

    @property
    def tokens_per_row(self) -> int:
        """Inputs of a row, packed or not."""
        return self.row_tokens or self.sequence_tokens

    @property
    def tokens_per_step(self) -> int:
        """Inputs of a step, over all processes."""
        return self.batch_sequences * self.tokens_per_row

    @property
    def reserved_seconds(self) -> float:
        """Part of `budget_seconds` that is left for later stages."""
        return (self.reserve_seconds or 0.0) + (self.reserve_distill_seconds or 0.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.budget_steps is None) == (self.budget_seconds is None):
            raise ValueError("budget_steps, budget_seconds: expected a value for exactly one and null for the other, "
                             f"found {self.budget_steps} and {self.budget_seconds}")
        if isinstance(self.budget_steps, tuple):
            starts = [step for step, _ in self.budget_steps]
            if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)) or any(step > end for step, end in self.budget_steps):
                raise ValueError("budget_steps: expected pairs of a step, rising from 0, and planned numbers of steps from there on, found "
                                 f"{[list(pair) for pair in self.budget_steps]}")
        if self.reserved_seconds and (self.budget_seconds is None or self.reserved_seconds >= self.budget_seconds):
            raise ValueError("reserve_seconds, reserve_distill_seconds: expected null, or together a number below budget_seconds "
                             f"{self.budget_seconds}, found {self.reserve_seconds} and {self.reserve_distill_seconds}")
        if self.row_tokens is not None and self.row_tokens < self.sequence_tokens:
            raise ValueError(f"row_tokens: expected null, or at least sequence_tokens {self.sequence_tokens}, found {self.row_tokens}")
        bounded = (0.0, 1), *self.sequence_schedule, (1.0, self.sequence_tokens)
        if any(end >= later or tokens >= more for (end, tokens), (later, more) in pairwise(bounded)):
            raise ValueError("sequence_schedule: expected pairs of a fraction of the budget, rising between 0 and 1, and tokens, rising "
                             f"below sequence_tokens {self.sequence_tokens}, found {[list(pair) for pair in self.sequence_schedule]}")
        if self.sequence_schedule and self.row_tokens is None:
            raise ValueError("sequence_schedule: expected an empty list for rows that are not packed; set row_tokens")
        if self.averaging.select == "swa" and not self._takes_snapshots():
            raise ValueError("averaging.select: swa needs a snapshot, and none is taken; raise averaging.swa_below_lr or lower "
                             "averaging.swa_every_steps")
        return self

    def _takes_snapshots(self) -> bool:
        """Whether SWA has anything to average; where the number of steps is not known, whether it may."""
        every, below = self.averaging.swa_every_steps, self.averaging.swa_below_lr
        if not isinstance(self.budget_steps, int):
            return below > 0
        last = self.budget_steps // every * every  # the learning rate is never lower when a snapshot could be taken
        return last > 0 and lr_multiplier((last - 1) / self.budget_steps, self.optimizer.warmdown, self.optimizer.lr_floor) < below
