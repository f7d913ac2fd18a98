"""The ways to score an artifact. Adding one: a function, its name in `StrategyName`, a line in `STRATEGIES`, a test.

A strategy fills the job's sheet: it scores with `Scorer` or `DocumentScorer` and trains with `Adapter`, which keep the record
that the audit judges. Shapes: N targets.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from lib.evaluation.adapter import Adapter, scheduled_lr, training_work
from lib.evaluation.config import AdaptationParams, EvaluateParams, StrategyName, WholeTextParams
from lib.evaluation.job import Job
from lib.evaluation.lora import DocumentScorer, document_work
from lib.evaluation.windows import Documents, Integers, Windows, one_pass_windows, plain_windows, sliding_windows


class Strategy(NamedTuple):
    """One way to score.

    Attributes:
        run: fills the sheet of a job; every process calls it.
        work: the number of inputs that it scores (or their equivalent), for the projection of the time.
        trains: the settings of the adaptation of the model's own parameters.
        transductive: whether it trains on text before scoring it or what comes before it, so that its score is not a legal one.
        isolates_documents: whether with given parameters no document's score depends on another document, but for hints of the tilt; the
            audit checks it.
        chunk_tokens: targets that are scored between two changes of what they are scored with, at most: the weights, an adapter,
            or for strategies that change nothing the window. The audit chooses its places by it.
    """

    run: Callable[[Job], None]
    work: Callable[[Documents, EvaluateParams], int]
    trains: Callable[[EvaluateParams], tuple[AdaptationParams, ...]] = lambda _: ()
    transductive: bool = False
    isolates_documents: Callable[[EvaluateParams], bool] = lambda _: False
    chunk_tokens: Callable[[EvaluateParams], int] = lambda params: params.window_tokens


def _fixed(windows: Callable[[int, EvaluateParams], Windows],
           chunk_tokens: Callable[[EvaluateParams], int] = lambda params: params.window_tokens) -> Strategy:
    def run(job: Job) -> None:
        with job.limit.phase("scoring"):
            job.scorer().score(windows(job.num_targets, job.params))
    return Strategy(run, lambda documents, params: windows(_num_targets(documents), params).work, chunk_tokens=chunk_tokens)


def _num_targets(documents: Documents) -> int:
    return int(documents.length.sum())


def _plain(num_targets: int, params: EvaluateParams) -> Windows:
    return plain_windows(num_targets, params.window_tokens)


def _sliding(end: int, params: EvaluateParams, first: int = 0) -> Windows:
    return sliding_windows(end, params.window_tokens, params.stride_tokens, first=first)


def _one_pass(end: int, params: EvaluateParams, first: int = 0) -> Windows:
    return one_pass_windows(end, params.window_tokens, params.segment_tokens, first=first)


CHUNK_WINDOWS = {"sliding": _sliding, "one_pass": _one_pass}  # ways to score a chunk


def _chunks(num_targets: int, params: EvaluateParams) -> Iterator[tuple[int, int]]:
    size = params.score_first.chunk_tokens
    return ((first, min(first + size, num_targets)) for first in range(0, num_targets, size))


def _score_first(job: Job) -> None:
    """pr585: score a chunk, then train on it, never on the last one."""
    settings, limit = job.params.score_first, job.limit
    adapter, windows = Adapter(job, settings), CHUNK_WINDOWS[settings.windows]
    *trained, _ = chunks = list(_chunks(job.num_targets, job.params))
    num_epochs = 0
    for number, (first, end) in enumerate(chunks):
        with limit.phase("scoring"):
            job.scorer().score(windows(end, job.params, first))
        if number < len(trained):
            epochs = adapter.affordable_epochs(end - first, trained[-1][1] - first)
            num_epochs += epochs
            with limit.phase("adaptation"):
                adapter.train(np.arange(first, end, job.params.window_tokens), scheduled_lr(settings, number, len(trained)), epochs)
    _note_epochs(job, num_epochs, len(trained))


def _score_first_work(documents: Documents, params: EvaluateParams) -> int:
    settings = params.score_first
    windows = CHUNK_WINDOWS[settings.windows]
    *trained, last = chunks = list(_chunks(_num_targets(documents), params))
    scoring = sum(windows(end, params, first).work for first, end in chunks)
    return scoring + settings.epochs * training_work(last[0] if trained else 0)


def _lora(job: Job) -> None:
    """pr410-lora: every document on its own, with an adapter of its own."""
    with job.limit.phase("scoring"):
        DocumentScorer(job, job.documents).score(np.arange(len(job.documents.start)))


class Phase(NamedTuple):
    """Documents that are scored, and what the model is trained on after them.

    Attributes:
        documents: their numbers.
        parts: for each learning rate the first inputs of rows that are trained on.
        lrs: the learning rates.
    """

    documents: range
    parts: list[range]
    lrs: list[float]

    @property
    def num_rows(self) -> int:
        """Rows of all parts."""
        return sum(map(len, self.parts))


def _phases(documents: Documents, params: EvaluateParams) -> list[Phase]:
    """Phases of so many documents each: whole rows, none left out between; or phases with boundaries, trained on from the beginning."""
    settings, row, num_documents = params.phased, params.window_tokens, len(documents.start)
    step, boundaries = row * settings.batch_sequences, settings.boundaries
    if boundaries is None:
        boundaries = tuple(range(settings.documents, num_documents, settings.documents))
    firsts, phases, trained = [0, *(boundary for boundary in boundaries if boundary < num_documents)], list[Phase](), 0
    for first, next_first in itertools.pairwise(firsts):
        end = int(documents.length[:next_first].sum())  # of what has been scored
        if settings.boundaries is None:
            parts, lrs = [range(trained, end - row + 1, row)], [scheduled_lr(settings, len(phases), len(firsts) - 1)]
            trained += len(parts[0]) * row
        else:
            parts = [range(begin, begin + step, row) for begin in range(0, end - step, step)]
            lrs = [scheduled_lr(settings, place, len(parts)) for place in range(len(parts))]
        phases.append(Phase(range(first, next_first), parts, lrs))
    return [*phases, Phase(range(firsts[-1], num_documents), [], [])]


def _longest(documents: Documents) -> Documents:
    """Documents in the order of their lengths."""
    return documents.select(np.argsort(-documents.length, kind="stable"))


def _longest_first(job: Job) -> None:
    """#1855: phased, the longest documents first: whether the model has been trained on others depends on how a document will end."""
    documents = _longest(job.documents)
    _phased(job, documents, np.concatenate([np.arange(start, start + length) for start, length in zip(*documents, strict=True)]))


def _phased(job: Job, documents: Documents | None = None, targets: Integers | None = None) -> None:
    """Documents as they are, or others with the targets of all of them."""
    documents, settings, limit = documents or job.documents, job.params.phased, job.limit
    adapter, scorer = Adapter(job, settings, targets), DocumentScorer(job, documents)
    phases = _phases(documents, job.params)
    num_left = sum(phase.num_rows for phase in phases) * job.params.window_tokens
    num_epochs = 0
    for phase in phases:
        with limit.phase("scoring"):
            scorer.score(np.array(phase.documents))
        num_targets = phase.num_rows * job.params.window_tokens
        epochs = adapter.affordable_epochs(num_targets, num_left)
        num_left -= num_targets
        if settings.boundaries is not None:
            adapter = Adapter(job, settings, targets)
        with limit.phase("adaptation"):
            for rows, lr in zip(phase.parts, phase.lrs, strict=True):
                adapter.train(np.array(rows), lr, epochs)
        num_epochs += epochs if num_targets else 0
    _note_epochs(job, num_epochs, sum(phase.num_rows > 0 for phase in phases))


def _phased_work(documents: Documents, params: EvaluateParams) -> int:
    num_trained = sum(phase.num_rows for phase in _phases(documents, params)) * params.window_tokens
    return document_work(documents, params.lora) + params.phased.epochs * training_work(num_trained)


def _two_phase(job: Job) -> None:
    """pr410: train on the whole text, first scales, then some blocks and the embedding; then score it."""
    with job.limit.phase("adaptation"):
        for settings in _two_phase_settings(job.params):
            adapter, rows = Adapter(job, settings), _all_rows(job.num_targets, job.params, settings)
            for epoch in range(settings.epochs):
                adapter.train(rows, scheduled_lr(settings, epoch, settings.epochs), 1)
    with job.limit.phase("scoring"):
        job.scorer().score(_sliding(job.num_targets, job.params))


def _all_rows(num_targets: int, params: EvaluateParams, settings: WholeTextParams) -> Integers:
    rows = np.arange(0, num_targets - params.window_tokens + 1, params.window_tokens)
    left_over = len(rows) % settings.batch_sequences if settings.drop_last else 0
    return rows[:(len(rows) - left_over) or len(rows)]


def _two_phase_settings(params: EvaluateParams) -> tuple[WholeTextParams, ...]:
    return params.two_phase.recalibration, params.two_phase.selective


def _two_phase_work(documents: Documents, params: EvaluateParams) -> int:
    num_targets = _num_targets(documents)
    num_rows = sum(settings.epochs * len(_all_rows(num_targets, params, settings)) for settings in _two_phase_settings(params))
    return training_work(num_rows * params.window_tokens) + _sliding(num_targets, params).work


def _note_epochs(job: Job, num_epochs: int, num_parts: int) -> None:
    if job.params.when_late == "fewer_epochs" and num_parts:
        job.figures["epochs"] = num_epochs / num_parts


STRATEGIES: dict[StrategyName, Strategy] = {
    "plain": _fixed(_plain),
    "sliding": _fixed(_sliding),
    "one_pass": _fixed(_one_pass, lambda params: params.segment_tokens),
    "score_first": Strategy(_score_first, _score_first_work, trains=lambda params: (params.score_first,),
                            chunk_tokens=lambda params: params.score_first.chunk_tokens),
    "lora": Strategy(_lora, lambda documents, params: document_work(documents, params.lora),
                     chunk_tokens=lambda params: params.lora.chunk_tokens,
                     isolates_documents=lambda params: params.lora.warm_start is None),
    "phased": Strategy(_phased, _phased_work, trains=lambda params: (params.phased,), chunk_tokens=lambda params: params.lora.chunk_tokens),
    "longest_first": Strategy(_longest_first, lambda documents, params: _phased_work(_longest(documents), params), transductive=True,
                              trains=lambda params: (params.phased,), chunk_tokens=lambda params: params.lora.chunk_tokens),
    "two_phase": Strategy(_two_phase, _two_phase_work, trains=_two_phase_settings, transductive=True),
}
