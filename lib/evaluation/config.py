"""Section ``evaluate`` of params.yaml: what is scored how, and how much time it may take."""

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from lib.evaluation.trainable import GROUP_NAMES, is_group
from lib.params import Fraction, NonNegativeFloat, Params, Positive, PositiveFloat, Precision

StrategyName = Literal["plain", "sliding", "one_pass", "score_first", "lora", "phased", "longest_first", "two_phase"]
LayerName = Literal["query", "key", "value", "output", "attention", "up", "down", "mlp", "head"]


class AdaptationParams(Params):
    """How parameters of the model itself are trained at test time."""

    epochs: Positive
    """Passes over the text that is trained on."""
    lr: NonNegativeFloat
    lr_schedule: Literal["cosine", "constant"]
    """cosine: from lr to 0."""
    optimizer: Literal["adamw", "sgd"]
    """AdamW (arXiv:1711.05101) or SGD with momentum."""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """Momentum of SGD; beta1 of AdamW."""
    weight_decay: NonNegativeFloat
    grad_clip: PositiveFloat | None
    """Largest norm of the gradient of all trained parameters together; None does not clip it."""
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


class ScoreFirstParams(AdaptationParams):
    """Score-first test-time training (pr585): score a chunk without gradients, then train on it, then go to the next chunk.

    A cosine goes over chunks.
    """

    windows: Literal["sliding", "one_pass"]
    """How a chunk is scored: as the strategy of this name scores."""
    chunk_tokens: Positive
    """Targets that are scored before the model is trained on them; a multiple of evaluate.window_tokens."""


class LoraParams(Params):
    """A low-rank adapter (arXiv:2106.09685) for each document (pr410-lora): score a chunk, then train the adapter on it."""

    rank: Positive
    alpha: PositiveFloat | None
    """What the adapter adds is scaled by alpha / rank; None is the rank."""
    layers: Annotated[tuple[LayerName, ...], Field(min_length=1)]
    """Layers of every block, and the head, that get an adapter, one for each time that a pass runs through the block. That of a matrix
    (query, key, value, output, up, down) has its inputs and outputs; those of attention and mlp lie beside the whole, from its normalised
    input to its output, and are scaled with that (#1855)."""
    window_tokens: Positive
    """Inputs that the model sees at once, within the document."""
    chunk_tokens: Positive
    """Targets between optimizer steps; at most window_tokens."""
    steps: Positive
    """Optimizer steps on each chunk."""
    lr: NonNegativeFloat
    """Learning rate of AdamW (arXiv:1711.05101)."""
    adam_betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
    adam_eps: PositiveFloat
    weight_decay: NonNegativeFloat
    """Decoupled, as AdamW has it: each step takes lr * weight_decay of every weight away."""
    warm_start: Positive | None
    """How many documents before a document, in the order of the text, the one is whose trained A it starts with, instead of the same values
    for all (#1855); B and the optimizer start anew all the same. So many documents are scored at a time."""
    batch_documents: Positive
    """Documents in one forward pass of one process; changes speed, not scores."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: expected each name once, found {', '.join(self.layers)}")
        if self.chunk_tokens > self.window_tokens:
            raise ValueError(f"chunk_tokens: expected at most window_tokens {self.window_tokens}, found {self.chunk_tokens}")
        return self


class PhasedParams(AdaptationParams):
    """Documents with adapters as in lora, in the order of the text or (longest_first) of their lengths; after some of them the model
    itself is trained on what has been scored.

    A cosine goes over phases, with boundaries over the steps of each.
    """

    documents: Positive
    """Documents of a phase: they are scored, then trained on, then the next ones are scored."""
    boundaries: tuple[Positive, ...] | None
    """Instead: numbers of documents, ascending, after which the model is trained on all text that has been scored so far (#1855), by an
    optimizer of its own, in steps of batch_sequences rows from the beginning of the text; the last step is left out."""

    @field_validator("boundaries")
    @classmethod
    def _check_boundaries(cls, boundaries: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if boundaries is not None and (not boundaries or list(boundaries) != sorted(set(boundaries))):
            raise ValueError(f"expected ascending numbers of documents, at least one, or null, found {list(boundaries)}")
        return boundaries


class WholeTextParams(AdaptationParams):
    """Training on the whole text at once. A cosine goes over epochs."""

    drop_last: bool
    """Leave out the rows that are left over when a pass is divided into steps of batch_sequences (pr410), if there is a whole step."""


class TwoPhaseParams(Params):
    """Training on the text before it is scored (pr410): not a legal score."""

    recalibration: WholeTextParams
    """First: scales only."""
    selective: WholeTextParams
    """Then: some blocks and the embedding."""


class TiltParams(Params):
    """N-gram tilt (#2135): a token that nearly always followed the last tokens, where they came before, is made likelier.

    Shifts the scores of all strategies, and nothing that is trained on.
    """

    threshold: Fraction
    """Share of the times a context came, at least, that the token must have followed."""
    boosts: Annotated[tuple[tuple[Annotated[int, Field(ge=2, lt=2**15)], NonNegativeFloat], ...], Field(min_length=1)]
    """(tokens of an n-gram, boost) pairs, the longest n-grams first. The longest ones whose context, all tokens but the last, has such a
    token count; the boost is added to the logarithm of its probability before all are normalised again (#2135: [[16, 2.625]])."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(shorter >= longer for (longer, _), (shorter, _) in pairwise(self.boosts)):
            raise ValueError(f"boosts: expected (tokens, boost) pairs, tokens falling, found {[list(pair) for pair in self.boosts]}")
        return self


class EvaluateParams(Params):
    """Section ``evaluate``."""

    strategies: Annotated[tuple[StrategyName, ...], Field(min_length=1)]
    """Ways to score, all from the same artifact; each adds its loss and bits per byte to the metrics."""
    strategy: StrategyName
    """The one of them whose score is val_bpb. Choose it on held-out documents, not by its score."""
    window_tokens: Positive
    """Inputs that the model sees at once."""
    stride_tokens: Positive
    """sliding: distance between windows; each window after the first scores its last stride_tokens targets."""
    segment_tokens: Positive
    """one_pass: targets of a segment; each attends to the last window_tokens inputs. Larger is faster."""
    batch_tokens: Positive
    """Inputs in one forward pass of one process."""
    precision: Precision
    """bf16: matrix products in bfloat16 (torch.autocast), weights and losses in fp32."""
    compile: bool
    """Compile the model's parts (needs a C++ compiler on CPUs, Triton on GPUs); the time that it takes counts in limit_seconds."""
    limit_seconds: PositiveFloat
    """Wall time from opening the artifact to the last score; when it is passed the stage fails. The challenge allows 600."""
    when_late: Literal["fail", "fewer_epochs"]
    """When the time will not suffice: fail at the limit, or train for fewer epochs (score_first, phased)."""
    audit: bool
    """Check the conditions of a legal score on the model and the strategies of the run; a violation fails the stage."""
    tilt: TiltParams | None
    """Makes tokens likelier by what followed the same context before; None for no tilt."""
    score_first: ScoreFirstParams
    lora: LoraParams
    phased: PhasedParams
    two_phase: TwoPhaseParams

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.strategies)) < len(self.strategies):
            raise ValueError(f"strategies: expected each name once, found {', '.join(self.strategies)}")
        if self.strategy not in self.strategies:
            raise ValueError(f"strategy: expected one of strategies {', '.join(self.strategies)}, found {self.strategy}")
        if self.strategy in ("longest_first", "two_phase"):
            raise ValueError(f"strategy: expected one that scores text before it trains on later text, found {self.strategy}")
        if self.stride_tokens > self.window_tokens:
            raise ValueError(f"stride_tokens: expected at most window_tokens {self.window_tokens}, found {self.stride_tokens}")
        if self.score_first.chunk_tokens % self.window_tokens:  # or the last row of a chunk would be short
            raise ValueError(f"score_first.chunk_tokens: expected a multiple of window_tokens {self.window_tokens}, "
                             f"found {self.score_first.chunk_tokens}")
        return self
