"""What a strategy does with a short piece of the text when tokens of it change: causality and distribution, tried on the real model.

The challenge's conditions C1, the distribution of a token depends only on the artifact and on earlier tokens, and C2, it is a full
normalised distribution that does not depend on the token itself. Shapes: N targets of the piece, D documents, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lib.artifacts.tokens import Tokens
from lib.audit.chronology import Finding
from lib.audit.determinism import NUM_REPETITIONS, judge, largest_difference, largest_spread, worst
from lib.distributed import Process
from lib.evaluation.config import EvaluateParams, StrategyName, TiltParams
from lib.evaluation.evaluation import Outcome, Text, run_strategy
from lib.evaluation.job import Job
from lib.evaluation.limit import TimeLimit
from lib.evaluation.score import Forward, load_stream
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.tilt import NO_HINT, Tilt, find_hints
from lib.evaluation.windows import find_documents

SEED = 0
QUICK_TARGETS, THOROUGH_TARGETS = 4, 64  # values of the last token that are tried, half of them the likeliest ones
QUICK_TARGETS_WITHIN, THOROUGH_TARGETS_WITHIN = 2, 4  # the same of each token within the piece
THOROUGH_CHANGES = 12
THOROUGH_PLACES = 4  # tokens within the piece that are replaced, besides those at borders
SUM_TOLERANCE = 1e-4
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 5e-2}  # nats: the stated distribution is computed for one position, the loss beside others


class Geometry(NamedTuple):
    """The piece of text that a strategy is tried on.

    Attributes:
        unit_tokens: targets after which the strategy may have changed something.
        num_documents: documents that the piece is put together from, each cut short; 0 for the beginning of the text as it is.
        document_tokens: length that the longest of them are cut to.
    """

    unit_tokens: int
    num_documents: int = 0
    document_tokens: int = 0


def geometry(name: StrategyName, params: EvaluateParams) -> Geometry:
    """The smallest piece in which a strategy shows all that it does: it adapts before the end, and fills more than one batch."""
    chunk, handed_down = params.lora.chunk_tokens, (params.lora.warm_start or 0) + 2
    if name == "lora":
        return Geometry(chunk, max(params.lora.batch_documents + 2, handed_down), chunk * 5 // 2)
    if name in ("phased", "longest_first"):  # the documents of the first phase have at least one row to train on, or one step
        boundaries, targets = params.phased.boundaries, 2 * params.window_tokens
        documents = params.phased.documents if boundaries is None else boundaries[0]
        targets *= 1 if boundaries is None else params.phased.batch_sequences
        return Geometry(chunk, max(documents + 2, handed_down), max(chunk * 5 // 2, -(-targets // documents)))
    units = {"score_first": params.score_first.chunk_tokens, "one_pass": params.segment_tokens}
    return Geometry(units.get(name, params.window_tokens))


class Probe(NamedTuple):
    """A short text.

    Attributes:
        tokens: (N+1,) uint16.
        changes: numbers of tokens, each of which and all after it are changed in a run of its own.
        cuts: numbers of tokens after which the text is cut off. They are in the piece's last chunk, and before the end of it, so that
            no number of chunks or phases changes, on which learning rates depend; and side by side: the last target of a window
            shows no leak.
        places: numbers of tokens within the piece that are replaced alone, to compare what their distribution was; none is BOS.
    """

    tokens: Tokens
    changes: tuple[int, ...]
    cuts: tuple[int, ...]
    places: tuple[int, ...]


def make_probe(text: Text, size: Geometry, window_tokens: int, *, thorough: bool, tilt: TiltParams | None = None) -> Probe:
    """Take a piece of the text and choose where to change it: in mid-window, just after a chunk, and all over it if `thorough`.

    With a tilt an n-gram is repeated, so that there are hints, and a hinted token is among the places.

    Args:
        text: the validation text, whose longest documents are used where documents are cut, each to another length than its neighbours.
        size: length and make of the piece; the text may be shorter.
        window_tokens: inputs that the model sees at once.
        thorough: choose more places.
        tilt: what scores are tilted by.
    """
    unit = size.unit_tokens
    if size.num_documents:
        longest = np.sort(np.argsort(-text.documents.length, kind="stable")[:size.num_documents])
        documents = text.documents.select(longest)
        cut = size.document_tokens - unit // 2 * (np.arange(len(longest))[::-1] % 3)  # the last one ends in mid-chunk
        ends = documents.start + np.minimum(documents.length, cut)
        parts = [text.tokens[start:end] for start, end in zip(documents.start, ends, strict=True)]
        tokens = np.concatenate([*parts, text.tokens[ends[-1]:ends[-1] + 1]])
        middle = sum(map(len, parts[:len(parts) // 2]))
    else:
        tokens, middle = text.tokens[:2 * unit + 3 * window_tokens // 2 + 1], 0
    last = len(tokens) - 1
    if tilt is not None:
        tokens = _repeat(tokens, [num_tokens for num_tokens, _ in tilt.boosts])
    quarter = max(1, min(unit, window_tokens) // 4)
    cuts = {last - quarter - 1, last - quarter} | (set(range(last - quarter, last)) if thorough else set())
    changes = {min(middle + unit + unit // 2, last), min(middle + unit + 1, last)}
    if thorough:
        changes |= set(np.linspace(1, last, THOROUGH_CHANGES - 2).astype(int).tolist())
    places = {middle + unit + 1, middle + unit // 2 + 1}  # the first after a chunk, and one in the middle of it
    if thorough:
        borders = {unit, window_tokens, middle, middle + window_tokens} - {0}
        places |= {border + beside for border in borders for beside in (0, 1, 2)}
        places |= set(np.linspace(1, last - 1, THOROUGH_PLACES).astype(int).tolist())
    if tilt is not None:
        hinted = 1 + np.flatnonzero((find_hints(tokens, tilt).tokens != NO_HINT)[:-1] & (tokens[1:last] != tokens[0]))
        places |= set(hinted[-(THOROUGH_PLACES if thorough else 1):].tolist())
    within = sorted(place for place in places if 0 < place < last and tokens[place] != tokens[0])
    return Probe(tokens, tuple(sorted(changes)), tuple(sorted(cut for cut in cuts if cut > 0)[-THOROUGH_CHANGES:]), tuple(within))


def _repeat(tokens: Tokens, lengths: Sequence[int]) -> Tokens:
    """The text with its first run of tokens without BOS again near its end, BOS where it was: of the first of `lengths` that it has room
    for; as it is if there is none."""
    num_bos, repeated = np.cumsum(np.append(0, tokens == tokens[0])), tokens.copy()
    for length in (length for length in lengths if length < len(tokens)):
        starts = np.flatnonzero(num_bos[length:-1] == num_bos[:-1 - length])
        if len(starts) and starts[-1] >= starts[0] + length:
            repeated[starts[-1]:starts[-1] + length] = tokens[starts[0]:starts[0] + length]
            break
    return repeated


def same_hints(one: Tokens, other: Tokens, tilt: TiltParams | None) -> npt.NDArray[np.bool_]:
    """Which targets (N,) of two texts have the same hint and boost: all where there is no tilt."""
    if tilt is None:
        return np.ones(len(one) - 1, np.bool_)
    hints, others = find_hints(one, tilt), find_hints(other, tilt)
    same: npt.NDArray[np.bool_] = (hints.tokens == others.tokens) & (hints.boosts == others.boosts)
    return same


class Trial:
    """Runs one strategy on variations of one piece of text, with the real model and parameters.

    Args:
        name: the strategy.
        forward: forward pass of the artifact's model.
        text: the text that the piece is taken from.
        params: the section ``evaluate``.
        process: every process takes part in every run.
        vocab_size: V.
        thorough: try more places and tokens.
        nondeterministic: why results may not repeat, from `lib.audit.determinism.deterministic`.
    """

    def __init__(self, name: StrategyName, forward: Forward, text: Text, params: EvaluateParams, process: Process, *, vocab_size: int,
                 thorough: bool, nondeterministic: str | None) -> None:
        self._name, self._forward, self._vocab_size, self._params, self._process = name, forward, vocab_size, params, process
        self._bos_id, self._thorough, self._nondeterministic = int(text.tokens[0]), thorough, nondeterministic
        self._probe = make_probe(text, geometry(name, params), params.window_tokens, thorough=thorough, tilt=params.tilt)
        self._generator = np.random.default_rng(SEED)
        self._measured_noise: float | None = None

    def check(self) -> tuple[Finding, Finding]:
        """The conditions C1 and C2: whether they ``passed`` (None where differences may be the device's own noise), and numbers."""
        tokens, original = self._probe.tokens, self.original
        number = np.arange(1, len(tokens))  # of each target's token
        comparison = RunComparison(original)
        for first in self._probe.changes:
            comparison.add(self._run(self._replace(np.arange(len(tokens)) >= first)), number < first)
        deviations = [abs(original.nats[last - 1] + _stated(self._run(tokens[:last + 1]))[tokens[last]]) for last in self._probe.cuts]
        from_cut_text = float(np.max(deviations, initial=0))
        at_places = {place: self._vary(place) for place in (*self._probe.places, len(tokens) - 1)}
        for place, outcomes in at_places.items():
            for outcome in outcomes.values():
                comparison.add(outcome, number < place, has_effect=False)  # two tokens can be equally likely
        isolated = self._check_documents()
        passed = [comparison.judge(self._noise), judge(from_cut_text, LOSS_TOLERANCE[self._params.precision], self._noise)]
        if isolated and "changes" in isolated:
            passed.append(isolated["passed"])  # type: ignore[arg-type]
        figures = comparison.figures() | {"largest_deviation_from_cut_text": _figure(from_cut_text), "documents_isolated": isolated}
        return self._conclude(worst(*passed), figures), self._check_distribution(at_places)

    def _check_documents(self) -> Finding | None:
        """Change some documents, then the others; None for a strategy that does not claim that documents are isolated.

        Hints of the tilt come from other documents; only where they stay the same are scores compared.
        """
        if not STRATEGIES[self._name].isolates_documents(self._params):
            return None
        documents = find_documents(self._probe.tokens, self._bos_id)
        if (num_documents := len(documents.start)) == 1:
            return {"passed": None, "why": "the text has one document"}
        number = np.repeat(np.arange(num_documents), documents.length)  # of each target's document
        rank = np.argsort(np.argsort(-documents.length, kind="stable"))
        parts = [rank < num_documents // 2, rank % 2 == 0]  # the longer half may be scored before the other, neighbours in one batch
        if self._thorough:  # any two documents differ in one bit of their numbers
            parts += [np.arange(num_documents) >> bit & 1 == 1 for bit in range((num_documents - 1).bit_length())]
        comparison = RunComparison(self.original)
        for part in (*parts, *(~part for part in parts)):
            changed = self._replace(part[np.append(number, number[-1])])
            comparison.add(self._run(changed), ~part[number] & same_hints(changed, self._probe.tokens, self._params.tilt))
        return self._conclude(comparison.judge(self._noise), comparison.figures())

    def _vary(self, place: int) -> dict[int, Outcome]:
        """What the strategy does where the token of this number is as it is, and where it is another; the original first."""
        tokens, is_last = self._probe.tokens, place == len(self._probe.tokens) - 1
        original = self.original if is_last else self._run(tokens, place)
        others = [token for token in np.argsort(-_stated(original), kind="stable").tolist()
                  if token != tokens[place] and (is_last or token != self._bos_id)]
        half = ((THOROUGH_TARGETS if is_last else THOROUGH_TARGETS_WITHIN) if self._thorough else
                (QUICK_TARGETS if is_last else QUICK_TARGETS_WITHIN)) // 2
        tried = others[:half] + self._generator.permutation(others[half:])[:half].tolist()
        return {int(tokens[place]): original} | {token: self._run(_with(tokens, place, token), place) for token in tried}

    def _check_distribution(self, at_places: dict[int, dict[int, Outcome]]) -> Finding:
        sums, losses, differences, complete, num_tried = 0.0, 0.0, list[float](), True, 0
        for place, outcomes in at_places.items():
            stated = [_stated(outcome) for outcome in outcomes.values()]
            complete &= all(len(each) == self._vocab_size for each in stated)
            sums = max(sums, *(float(abs(np.exp(each).sum() - 1)) for each in stated))
            losses = max(losses, *(float(abs(outcome.nats[place - 1] + each[token])) if token < len(each) else math.inf
                                   for (token, outcome), each in zip(outcomes.items(), stated, strict=True)))
            differences += [largest_difference(each, stated[0]) for each in stated]
            num_tried += len(stated)
        passed = worst(complete and sums <= SUM_TOLERANCE, judge(max(differences), 0, self._noise),
                       judge(losses, LOSS_TOLERANCE[self._params.precision], self._noise))
        tilt, hinted = self._params.tilt, {}
        if tilt is not None:
            hints = find_hints(self._probe.tokens, tilt).tokens
            hinted = {"places_with_hint": int(sum(hints[place - 1] != NO_HINT for place in at_places))}
            if passed and not hinted["places_with_hint"]:
                return {"passed": None, "why": "no token of the text that was tried has a hint of the tilt", "places": len(at_places)}
        return self._conclude(passed, hinted | {
            "probabilities": self._vocab_size if complete else None, "places": len(at_places), "targets_tried": num_tried,
            "distributions_differing": sum(map(bool, differences)), "largest_deviation_of_sum": _figure(sums),
            "largest_deviation_of_loss": _figure(losses)})

    def _conclude(self, passed: bool | None, figures: Finding) -> Finding:
        if passed is not None:
            return {"passed": passed} | figures
        reason = f" ({self._nondeterministic})" if self._nondeterministic else ""
        return {"passed": None, "why": f"the same text gets other scores each time on this device{reason}", "repetitions": NUM_REPETITIONS,
                "largest_difference_of_repetitions": _figure(self._noise())} | figures

    @cached_property
    def original(self) -> Outcome:
        """What the strategy did on the piece as it is."""
        return self._run(self._probe.tokens)

    def _noise(self) -> float:
        """How far the same text's losses, and what is stated for the last token, lie apart when it is scored again."""
        if self._measured_noise is None:
            runs = [self.original, *(self._run(self._probe.tokens) for _ in range(NUM_REPETITIONS))]
            self._measured_noise = max(largest_spread([run.nats for run in runs]), largest_spread([_stated(run) for run in runs]))
        return self._measured_noise

    def _replace(self, which: npt.NDArray[np.bool_]) -> Tokens:
        """Random other tokens instead of some; BOS stays where it is and appears nowhere else."""
        tokens = self._probe.tokens.astype(np.int64)
        which = which & (tokens != self._bos_id)
        new = self._generator.integers(0, self._vocab_size - 2, len(tokens))
        for avoided in (np.minimum(tokens, self._bos_id), np.maximum(tokens, self._bos_id)):
            new += new >= avoided
        return np.where(which, new, tokens).astype(np.uint16)

    def _run(self, tokens: Tokens, place: int | None = None) -> Outcome:
        """Run the strategy, with the distribution of the token of this number; of the last one if None."""
        process = self._process
        stream = load_stream(tokens, process.device)
        sheet = ScoreSheet(len(tokens) - 1, process.device, tilt=Tilt.of(stream, self._params.tilt),
                           wanted=(len(tokens) - 1 if place is None else place) - 1)
        return run_strategy(self._name, Job(self._forward, stream, find_documents(tokens, self._bos_id), self._params, process,
                                            NoLimit(math.inf, process), sheet))


class RunComparison:
    """How far scores of changed texts differ from those of the `original`, to the last bit."""

    def __init__(self, original: Outcome) -> None:
        self._original = original
        self._num_changes = self._num_without_effect = self._num_compared = self._num_differing = 0
        self._largest = 0.0

    def add(self, changed: Outcome, same: npt.NDArray[np.bool_], *, has_effect: bool = True) -> None:
        """Compare the scores where they must be the `same` (N,); elsewhere one at least must differ if the change `has_effect`."""
        differs = changed.nats.view(np.uint32) != self._original.nats.view(np.uint32)
        self._num_changes += 1
        self._num_without_effect += has_effect and not (differs & ~same).any()
        self._num_compared += int(same.sum())
        self._num_differing += int((differs & same).sum())
        self._largest = max(self._largest, largest_difference(changed.nats[same], self._original.nats[same]))

    def judge(self, noise: Callable[[], float]) -> bool | None:
        """Whether all was as it must be; None if differences may be the device's own `noise`."""
        return worst(judge(self._largest, 0, noise), not self._num_without_effect)

    def figures(self) -> Finding:
        """What was compared, and what was found."""
        return {"targets": len(self._original.nats), "changes": self._num_changes, "changes_without_effect": self._num_without_effect,
                "scores_compared": self._num_compared, "scores_differing": self._num_differing,
                "largest_difference": _figure(self._largest)}


class NoLimit(TimeLimit):
    """A clock that limits nothing and shows nothing."""

    def advance(self, work: int) -> None:
        """Nothing happens."""


def _stated(outcome: Outcome) -> npt.NDArray[np.float64]:
    assert outcome.distribution is not None
    return outcome.distribution.astype(np.float64)


def _with(tokens: Tokens, place: int, token: int) -> Tokens:
    changed = tokens.copy()
    changed[place] = token
    return changed


def _figure(value: float) -> float | None:
    """With two digits; None for what JSON has no number for."""
    return float(f"{value:.2g}") if math.isfinite(value) else None
