"""Parameters of the train stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lib.params import Fraction, NonNegativeFloat, Params, Positive, PositiveFloat, Precision
from lib.quantization.grid_config import Bits, ByRole, ClipParams


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
    weight_decay: NonNegativeFloat
    """Decoupled, of all groups."""
    momentum: Fraction
    """Muon, Nesterov, after its warmup."""
    momentum_start: Fraction
    """Muon momentum at the first step."""
    momentum_warmup: Fraction
    """Fraction of the budget in which the momentum rises linearly."""
    newton_schulz_steps: Positive
    adam_betas: tuple[Fraction, Fraction]
    adam_eps: PositiveFloat
    grad_clip: PositiveFloat
    """Largest global gradient norm."""
    warmdown: Fraction
    """Last fraction of the budget, in which the learning rates fall linearly to 0."""


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
    bits: ByRole[Bits]
    clip: ClipParams


class TrainParams(Params):
    """Section ``train``."""

    budget_steps: Positive | None
    budget_seconds: PositiveFloat | None
    """Exactly one of the two budgets is a number; schedules follow the fraction of it that is done."""
    sequence_tokens: Annotated[int, Field(ge=2)]
    batch_sequences: Positive
    """Sequences per optimizer step, over all processes."""
    micro_batch_sequences: Positive
    """Sequences per forward pass of one process, at most; less memory, more passes."""
    precision: Precision
    """Of matrix products; weights, optimizer state and averages are fp32."""
    compile: bool
    """Compile the model (needs a C++ compiler on CPUs, Triton on GPUs)."""
    optimizer: OptimizerParams
    averaging: AveragingParams
    qat: QatParams

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.budget_steps is None) == (self.budget_seconds is None):
            raise ValueError("budget_steps, budget_seconds: expected a number for exactly one and null for the other, "
                             f"found {self.budget_steps} and {self.budget_seconds}")
        if self.averaging.select == "swa" and self.averaging.swa_below_lr == 0:
            raise ValueError("averaging.select: swa needs averaging.swa_below_lr above 0")
        return self
