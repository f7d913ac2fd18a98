"""An evaluation: one text, one artifact, any number of strategies, each from the artifact's own weights.

Shapes: N targets.
"""

import resource
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.distributed import Process
from lib.evaluation.bpb import Score, make_score, running_bpb
from lib.evaluation.breakdown import context_table, document_table
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.job import Job
from lib.evaluation.ledger import Event
from lib.evaluation.limit import TimeLimit, TimeLimitError
from lib.evaluation.lora import LowRankAdapters
from lib.evaluation.score import Forward, load_stream
from lib.evaluation.sheet import Losses, ScoreSheet
from lib.evaluation.state import describe_state, differing
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.tilt import Tilt
from lib.evaluation.trainable import describe_groups, match_groups
from lib.evaluation.windows import Documents, find_documents
from lib.model.gpt import GPT
from lib.model.parts import parts_of
from lib.progress import say

CURVE_POINTS = 200

BpbCurve = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Text:
    """The text that is scored.

    Attributes:
        tokens: (N+1,) uint16; the first is BOS and only predicts.
        target_bytes: (N,) int64, bytes of text of each target.
        documents: the documents of the tokens.
    """

    tokens: npt.NDArray[np.uint16]
    target_bytes: npt.NDArray[np.int64]
    documents: Documents

    @classmethod
    def of(cls, tokens: npt.NDArray[np.uint16], target_bytes: npt.NDArray[np.int64], bos_id: int) -> "Text":
        """Find the documents.

        Raises:
            ValueError: fewer than two tokens, or a text that does not start with BOS.
        """
        return cls(tokens, target_bytes, find_documents(tokens, bos_id))


class Outcome(NamedTuple):
    """What one strategy did.

    Attributes:
        nats: (N,) fp32 loss of each target.
        context: (N,) int32, inputs that the model saw before each target's own.
        events: what was scored and trained on, in order.
        figures: what the strategy itself reports.
        seconds: time of all, and of its phases by name.
        distribution: (V,) log-probabilities that the wanted target was scored from; only where they were asked for.
        trained: whether weights of the model were others at the end than at the beginning; they have been put back.
        left_behind: what else of the model differs from before: buffers, hooks, gradients, attributes, by name.
    """

    nats: Losses
    context: npt.NDArray[np.int32]
    events: list[Event]
    figures: dict[str, float]
    seconds: dict[str, float]
    distribution: Losses | None
    trained: bool = False
    left_behind: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Results of all strategies of a run, by name.

    Attributes:
        params: the section ``evaluate``.
        text: what was scored.
        outcomes: what each strategy did.
    """

    params: EvaluateParams
    text: Text
    outcomes: dict[StrategyName, Outcome] = field(default_factory=dict)

    def score(self, name: StrategyName) -> Score:
        """Loss and bits per byte of one strategy."""
        return make_score(self.outcomes[name].nats, self.text.target_bytes)

    def metrics(self) -> dict[str, float | int | str]:
        """Figures for ``metrics.json``, losses in nats per token, with 8 digits.

        ``val_loss`` and ``val_bpb`` of ``evaluate.strategy``; ``<strategy>_loss`` and ``<strategy>_bpb`` of each, where those of a
        strategy that is declared to train on text before it is scored are called ``<strategy>_transductive_loss`` and ``_bpb``.
        """
        chosen = self.score(self.params.strategy)
        figures: dict[str, float | int | str] = {
            "val_loss": round(chosen.loss, 8), "val_bpb": round(chosen.bpb, 8), "strategy": self.params.strategy}
        for name, outcome in self.outcomes.items():
            score, prefix = self.score(name), f"{name}_transductive" if STRATEGIES[name].transductive else name
            figures |= {f"{prefix}_loss": round(score.loss, 8), f"{prefix}_bpb": round(score.bpb, 8)}
            figures |= {f"{name}_{key}": round(value, 8) for key, value in outcome.figures.items()}
        return figures | {"num_tokens": chosen.num_tokens, "num_bytes": chosen.num_bytes, "num_documents": len(self.text.documents.start)}

    def timing(self, limit: TimeLimit, process: Process) -> dict[str, float]:
        """Figures for ``timing.json``: seconds from opening the artifact on, of each strategy and its phases, and memory."""
        figures = {"seconds": limit.seconds, "open_seconds": limit.open_seconds, "compile_seconds": limit.compile_seconds,
                   "peak_memory_mib": peak_memory_mib(process.device)}
        for name, outcome in self.outcomes.items():
            figures |= {f"{name}_{phase}": seconds for phase, seconds in outcome.seconds.items()}
            figures[f"{name}_tokens_per_second"] = len(outcome.nats) / outcome.seconds["seconds"]
        return figures

    def curves(self) -> dict[str, BpbCurve]:
        """Bits per byte of the first n targets, as pairs (n, bits per byte), by strategy."""
        return {name: running_bpb(outcome.nats, self.text.target_bytes, CURVE_POINTS) for name, outcome in self.outcomes.items()}

    def context_tables(self) -> dict[str, list[tuple[int, int, float]]]:
        """Loss by the number of inputs before a target, by strategy."""
        return {name: context_table(outcome.nats, outcome.context) for name, outcome in self.outcomes.items()}

    def document_tables(self) -> dict[str, list[tuple[int, int, int, float]]]:
        """Bits per byte by length of document, by strategy."""
        return {name: document_table(outcome.nats, self.text.target_bytes, self.text.documents) for name, outcome in self.outcomes.items()}


def evaluate(model: GPT, text: Text, params: EvaluateParams, *, process: Process, limit: TimeLimit,
             keep: Callable[[Mapping[str, BpbCurve]], None] = lambda _: None) -> Evaluation:
    """Score a text with every strategy of ``evaluate.strategies``.

    Args:
        model: the artifact's model, on the process's device; it ends as it was.
        text: what is scored.
        params: the section ``evaluate``.
        process: every process calls this and gets the whole result.
        limit: the running clock.
        keep: called in the main process with the curves as far as they go when the time is over.

    Raises:
        TimeLimitError: ``evaluate.limit_seconds`` has passed.
        ValueError: a trainable group or a kind of layer that matches nothing.
    """
    _describe(model, params, process)
    evaluation = Evaluation(params, text)
    with limit.plan(sum(STRATEGIES[name].work(text.documents, params) for name in params.strategies)):
        for name, job in make_jobs(model, text, params, params.strategies, process=process, limit=limit):
            try:
                evaluation.outcomes[name] = run_strategy(name, job)
            except TimeLimitError:
                nats, scored = job.sheet.collect_unfinished(process)
                if process.is_main:
                    keep(evaluation.curves() | {name: running_bpb(nats[scored], text.target_bytes[scored], CURVE_POINTS)})
                raise
    return evaluation


def make_jobs(model: GPT, text: Text, params: EvaluateParams, names: Collection[StrategyName], *, process: Process,
              limit: TimeLimit) -> Iterator[tuple[StrategyName, Job]]:
    """The jobs of some strategies on one text, in the order of `STRATEGIES`; none knows anything of another."""
    stream, forward = load_stream(text.tokens, process.device), Forward(model, params.precision, compiled=params.compile)
    tilt = Tilt.of(stream, params.tilt)
    for name in (name for name in STRATEGIES if name in names):
        yield name, Job(forward, stream, text.documents, params, process, limit, ScoreSheet(len(stream) - 1, process.device, tilt=tilt))


def run_strategy(name: StrategyName, job: Job) -> Outcome:
    """Run one strategy, put the weights of the model back, and collect its results in all processes.

    Raises:
        TimeLimitError: ``evaluate.limit_seconds`` has passed.
        RuntimeError: a target was not scored, or more than once.
    """
    before = describe_state(job.forward.model)
    with restored(job.forward.model) as trained, job.limit.timed() as seconds:
        STRATEGIES[name].run(job)
    left_behind = differing(before, describe_state(job.forward.model))
    job.limit.check()
    nats, context = job.sheet.collect(job.process)
    distribution = job.sheet.collect_distribution(job.process) if job.sheet.wanted is not None else None
    figures = job.figures | job.sheet.tilt_figures(job.process)
    return Outcome(nats, context, job.sheet.ledger.events, figures, seconds, distribution, any(trained), left_behind)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory that this process has held so far: of the GPU where it computes on one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def restored(model: nn.Module) -> Iterator[list[str]]:
    """Put the weights of a model back at the end; the list then names those that had changed."""
    before: dict[str, Tensor] = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    changed: list[str] = []
    try:
        yield changed
    finally:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not torch.equal(parameter, before[name]):
                    changed.append(name)
                    parameter.copy_(before[name])


def _describe(model: GPT, params: EvaluateParams, process: Process) -> None:
    """Say what will be trained, before anything takes time."""
    sizes, parts = {name: parameter.numel() for name, parameter in model.named_parameters()}, parts_of(model)
    for name in params.strategies:
        for settings in STRATEGIES[name].trains(params):
            say(f"{name} trains {describe_groups(match_groups(settings.trainable, parts), sizes)}", enabled=process.is_main)
        if name in ("lora", "phased", "longest_first"):
            num_parameters = LowRankAdapters(model, params.lora, process.device).num_parameters
            say(f"{name} trains an adapter of {num_parameters:,} parameters per document ({', '.join(params.lora.layers)})",
                enabled=process.is_main)
