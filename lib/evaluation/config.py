"""Section ``evaluate`` of params.yaml: what is scored how, and how much time it may take."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lib.evaluation.trainable import GROUP_NAMES, is_group
from lib.params import NonNegativeFloat, Params, Positive, PositiveFloat, Precision

StrategyName = Literal["plain", "sliding", "score_first"]


class ScoreFirstParams(Params):
    """Score-first test-time training (pr585): score a chunk without gradients, then train on it, then go to the next chunk."""

    chunk_tokens: Positive
    """Targets that are scored before the model is trained on them; a multiple of evaluate.window_tokens."""
    epochs: Positive
    """Passes over each chunk."""
    lr: NonNegativeFloat
    lr_schedule: Literal["cosine", "constant"]
    """cosine: from lr at the first chunk to 0 at the last (pr585)."""
    optimizer: Literal["adamw", "sgd"]
    """AdamW (arXiv:1711.05101, pr585) or SGD with momentum (second phase of pr410)."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of SGD; beta1 of AdamW."""
    weight_decay: NonNegativeFloat
    grad_clip: PositiveFloat
    """Largest norm of the gradient of all trained parameters together."""
    batch_sequences: Positive
    """Rows of evaluate.window_tokens tokens in one optimizer step, over all processes."""
    trainable: Annotated[tuple[str, ...], Field(min_length=1)]
    """Named groups of parameters that are trained; lib/evaluation/trainable.py lists them."""

    @field_validator("trainable")
    @classmethod
    def _check_groups(cls, groups: tuple[str, ...]) -> tuple[str, ...]:
        for group in groups:
            if not is_group(group):
                raise ValueError(f"expected names among {', '.join(GROUP_NAMES)}, found {group}")
        return groups


class EvaluateParams(Params):
    """Section ``evaluate``."""

    strategies: Annotated[tuple[StrategyName, ...], Field(min_length=1)]
    """Ways to score, all from the same artifact; each adds its loss and bits per byte to the metrics."""
    window_tokens: Positive
    """Inputs that the model sees at once."""
    stride_tokens: Positive
    """sliding, score_first: distance between windows; each window after the first scores its last stride_tokens targets."""
    batch_windows: Positive
    """Windows in one forward pass of one process."""
    precision: Precision
    """bf16: matrix products in bfloat16 (torch.autocast), weights and losses in fp32."""
    limit_seconds: PositiveFloat
    """Wall time from opening the artifact to the last score; when it is passed the stage fails. The challenge allows 600."""
    score_first: ScoreFirstParams

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.strategies)) < len(self.strategies):
            raise ValueError(f"strategies: expected each name once, found {', '.join(self.strategies)}")
        # Both make the scored ranges of windows end exactly where chunks end; the second also leaves no training row short.
        if self.window_tokens % self.stride_tokens:
            raise ValueError(f"stride_tokens: expected a divisor of window_tokens {self.window_tokens}, found {self.stride_tokens}")
        if self.score_first.chunk_tokens % self.window_tokens:
            raise ValueError(f"score_first.chunk_tokens: expected a multiple of window_tokens {self.window_tokens}, "
                             f"found {self.score_first.chunk_tokens}")
        return self
