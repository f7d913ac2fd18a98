"""The ways to score an artifact. Adding one: a function, its name in `StrategyName`, a line in `STRATEGIES`, a test.

Shapes: N targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lib.distributed import Process
from lib.evaluation.bpb import Score, make_score, running_bpb
from lib.evaluation.config import EvaluateParams
from lib.evaluation.limit import TimeLimit
from lib.evaluation.score import Scorer, load_stream
from lib.evaluation.ttt import Adaptation, score_first, training_work
from lib.evaluation.windows import Windows, plain_windows, sliding_windows

CURVE_POINTS = 200


@dataclass(frozen=True)
class Job:
    """What every strategy works from: the artifact's model, which none of them changes, and the tokens on its device."""

    model: nn.Module
    stream: Tensor
    params: EvaluateParams
    process: Process
    limit: TimeLimit

    @property
    def num_targets(self) -> int:
        """N."""
        return len(self.stream) - 1


class Outcome(NamedTuple):
    """(N,) fp32 nats, and what adaptation did where there was any."""

    nats: npt.NDArray[np.float32]
    adaptations: list[Adaptation]


class Strategy(NamedTuple):
    """One way to score.

    Attributes:
        metric: prefix of its metrics and curves.
        run: scores a job; every process calls it.
        work: the number of inputs that it scores (or their equivalent), for the projection of the time.
    """

    metric: str
    run: Callable[[Job], Outcome]
    work: Callable[[int, EvaluateParams], int]


def _plain(num_targets: int, params: EvaluateParams) -> Windows:
    return plain_windows(num_targets, params.window_tokens)


def _sliding(num_targets: int, params: EvaluateParams) -> Windows:
    return sliding_windows(num_targets, params.window_tokens, params.stride_tokens)


def _run_windows(choose: Callable[[int, EvaluateParams], Windows]) -> Callable[[Job], Outcome]:
    def run(job: Job) -> Outcome:
        scorer = Scorer(job.model, job.stream, batch_windows=job.params.batch_windows, precision=job.params.precision,
                        process=job.process, advance=job.limit.advance)
        scorer.score(choose(job.num_targets, job.params))
        return Outcome(scorer.collect(), [])
    return run


def _run_score_first(job: Job) -> Outcome:
    return Outcome(*score_first(job.model, job.stream, job.params, job.process, job.limit.advance))


def _score_first_work(num_targets: int, params: EvaluateParams) -> int:
    settings = params.score_first
    num_trained = (num_targets - 1) // settings.chunk_tokens * settings.chunk_tokens  # every chunk but the last
    return int(_sliding(num_targets, params).length.sum()) + settings.epochs * training_work(num_trained)


STRATEGIES = {
    "plain": Strategy("plain", _run_windows(_plain), lambda n, params: int(_plain(n, params).length.sum())),
    "sliding": Strategy("sliding", _run_windows(_sliding), lambda n, params: int(_sliding(n, params).length.sum())),
    "score_first": Strategy("ttt", _run_score_first, _score_first_work),
}


@dataclass(frozen=True)
class Evaluation:
    """Results of all strategies of a run, by the metric prefix of each.

    Attributes:
        scores: loss and bits per byte.
        curves: bits per byte of the first n targets, as pairs (n, bits per byte).
        adaptations: what adaptation did; only strategies that adapt.
        seconds: time of each strategy.
    """

    scores: dict[str, Score]
    curves: dict[str, list[tuple[int, float]]]
    adaptations: dict[str, list[Adaptation]]
    seconds: dict[str, float]

    def metrics(self) -> dict[str, float | int]:
        """``<metric>_loss`` in nats per token and ``<metric>_bpb`` of each strategy with 8 digits, ``num_tokens``, ``num_bytes``."""
        figures: dict[str, float | int] = {}
        for name, score in self.scores.items():
            figures |= {f"{name}_loss": round(score.loss, 8), f"{name}_bpb": round(score.bpb, 8)}
        score = next(iter(self.scores.values()))  # all strategies score the same targets
        return figures | {"num_tokens": score.num_tokens, "num_bytes": score.num_bytes}

    def timing(self, seconds: float) -> dict[str, float]:
        """``seconds`` from opening the artifact on, and ``<metric>_seconds`` and ``<metric>_tokens_per_second`` of each strategy."""
        figures = {"seconds": seconds}
        for name, part in self.seconds.items():
            figures |= {f"{name}_seconds": part, f"{name}_tokens_per_second": self.scores[name].num_tokens / part}
        return figures


def evaluate(model: nn.Module, tokens: npt.NDArray[np.uint16], target_bytes: npt.NDArray[np.int64], params: EvaluateParams, *,
             process: Process, limit: TimeLimit) -> Evaluation:
    """Score the tokens with every strategy of ``evaluate.strategies``.

    Args:
        model: the artifact's model, on the process's device; not changed.
        tokens: (N+1,) uint16.
        target_bytes: (N,) bytes of text of each target.
        params: the section ``evaluate``.
        process: every process calls this and gets the whole result.
        limit: the running clock.

    Raises:
        TimeLimitError: ``evaluate.limit_seconds`` has passed.
        ValueError: no targets, or a trainable group that matches nothing.
    """
    job = Job(model, load_stream(tokens, process.device), params, process, limit)
    evaluation = Evaluation({}, {}, {}, {})
    with limit.plan(sum(STRATEGIES[name].work(job.num_targets, params) for name in params.strategies)):
        for name in params.strategies:
            metric, run, _ = STRATEGIES[name]
            start = limit.seconds
            nats, adaptations = run(job)
            limit.check()  # a GPU may still have been working when the last batch was reported
            evaluation.scores[metric] = make_score(nats, target_bytes)
            evaluation.curves[metric] = running_bpb(nats, target_bytes, CURVE_POINTS)
            if adaptations:
                evaluation.adaptations[metric] = adaptations
            evaluation.seconds[metric] = limit.seconds - start
    return evaluation
