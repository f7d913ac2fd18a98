"""The tilt is audited: as it is it passes with every strategy, and each known way to leak through an n-gram cache is caught."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lib.audit import probe, replay
from lib.audit.probe import geometry, make_probe
from lib.evaluation import tilt
from lib.evaluation.config import StrategyName
from lib.evaluation.tilt import NO_HINT, Tilt, find_hints, follow_ngrams
from tests.audit import test_audit
from tests.audit.test_audit import audit, violated
from tests.evaluation.tiny import BOS, make_params, make_text, make_tokens

TILT = {"threshold": 0.6, "boosts": [[3, 2.0]]}
PARAMS = make_params(tilt=TILT)
LEGAL: list[StrategyName] = ["plain", "sliding", "one_pass", "score_first", "lora", "phased"]


def repetitive_tokens(num_documents: int = 5) -> npt.NDArray[np.uint16]:
    """Documents that share passages of four tokens."""
    tokens = make_tokens(30 * num_documents, starts=[0, *(30 * number + 7 * number % 5 for number in range(1, num_documents))])
    for start in range(20, len(tokens) - 8, 12):
        shared = np.arange(start, start + 4)
        shared = shared[tokens[shared] != BOS]
        tokens[shared] = 5 + (start // 24 % 2) + shared - start
    return tokens


@pytest.fixture(autouse=True)
def _repetitive_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_audit, "TOKENS", repetitive_tokens())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thorough"), [*((name, False) for name in LEGAL), ("lora", True)])
def test_every_legal_strategy_passes_with_a_tilt(name: StrategyName, thorough: bool) -> None:
    report = audit(name, params=PARAMS, thorough=thorough)
    assert violated(report, name) == []
    assert report["strategies"][name]["legal"]
    if name == "lora":
        assert report["strategies"][name]["causality"]["replays"]["cuts"] == ["anywhere", "in every document"]


@pytest.mark.parametrize("name", ["plain", "score_first", "lora", "phased"])
@pytest.mark.parametrize("repeats", [False, True])
def test_a_hinted_token_is_among_the_places_that_are_tried_whether_or_not_the_text_repeats(name: StrategyName, repeats: bool) -> None:
    assert PARAMS.tilt is not None
    tokens = repetitive_tokens() if repeats else make_tokens(150, starts=(0, 31, 60, 83, 107))
    tried = make_probe(make_text(tokens), geometry(name, PARAMS), PARAMS.window_tokens, thorough=False, tilt=PARAMS.tilt)
    hints = find_hints(tried.tokens, PARAMS.tilt).tokens
    assert any(hints[place - 1] != NO_HINT for place in tried.places)
    without = make_probe(make_text(tokens), geometry(name, PARAMS), PARAMS.window_tokens, thorough=False)
    assert (tried.tokens == BOS).tolist() == (without.tokens == BOS).tolist()
    assert (tried.changes, tried.cuts) == (without.changes, without.cuts)


def test_a_tilt_of_which_no_hint_was_tried_is_not_checked() -> None:
    """N-grams that the text has no room to repeat."""
    found = audit("plain", params=make_params(tilt={"threshold": 0.6, "boosts": [[1000, 2.0]]}))["strategies"]["plain"]["distribution"]
    assert found["passed"] is None and "no token of the text that was tried has a hint" in found["why"]
    found = audit("plain", params=PARAMS)["strategies"]["plain"]["distribution"]
    assert found["passed"] is True and found["places_with_hint"] > 0


Follow = Callable[[npt.NDArray[Any], int, float], npt.NDArray[np.int32]]


def _counting_the_target_itself(tokens: npt.NDArray[Any], num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """Looks its hint up after it has counted the target."""
    hints = np.full(len(tokens) - 1, NO_HINT, np.int32)
    counts: dict[tuple[int, ...], list[int]] = {}
    for target in range(num_tokens - 2, len(hints)):
        following = counts.setdefault(tuple(tokens[target + 2 - num_tokens:target + 1].tolist()), [])
        following.append(int(tokens[target + 1]))
        if len(following) > 1:
            best = max(following, key=following.count)
            hints[target] = best if following.count(best) / len(following) >= threshold else NO_HINT
    return hints


def _counting_the_whole_text(tokens: npt.NDArray[Any], num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """Of two copies of the text, the hints of the second."""
    return follow_ngrams(np.concatenate((tokens, tokens)), num_tokens, threshold)[len(tokens):]


def _one_token_ahead(tokens: npt.NDArray[Any], num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """The context of the next target."""
    return np.append(follow_ngrams(tokens, num_tokens, threshold)[1:], NO_HINT).astype(np.int32)


def _only_hits(tokens: npt.NDArray[Any], num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """A hint is used where it is the realised token only, as by a cache that is asked for that token alone."""
    hints = follow_ngrams(tokens, num_tokens, threshold)
    return np.where(hints == tokens[1:], hints, NO_HINT).astype(np.int32)


@pytest.mark.parametrize("name", ["plain", "lora"])
@pytest.mark.parametrize("leak", [_counting_the_target_itself, _counting_the_whole_text, _one_token_ahead, _only_hits])
def test_hints_that_know_the_target_or_later_tokens_are_caught(leak: Follow, name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilt, "follow_ngrams", leak)
    assert "distribution" in violated(audit(name, params=PARAMS), name)


def _counting_all_others(tokens: npt.NDArray[Any], num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """Counts over the whole text, but for the target itself: no distribution knows its own token."""
    contexts = [tuple(tokens[target + 2 - num_tokens:target + 1].tolist()) for target in range(len(tokens) - 1)]
    hints = np.full(len(contexts), NO_HINT, np.int32)
    for target in range(num_tokens - 2, len(hints)):
        others = [int(tokens[other + 1]) for other, context in enumerate(contexts) if context == contexts[target] and other != target]
        if others:
            hints[target] = max(others, key=others.count)
    return hints


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_counts_of_later_text_are_caught_by_replays_and_changed_tokens(name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tilt, "follow_ngrams", _counting_all_others)
    monkeypatch.setattr(test_audit, "TOKENS", repetitive_tokens(12))  # a quick replay scores an eighth of it
    causality = audit(name, params=PARAMS)["strategies"][name]["causality"]
    assert causality["replays"]["passed"] is False
    assert causality["scores_differing"] > 0


@pytest.mark.parametrize("name", ["one_pass", "lora"])
def test_a_tilt_that_is_not_normalised_is_caught(name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(made: Tilt, nats: Tensor, targets: Tensor) -> Tensor:
        return nats[0] - made.boosts[targets] * made.hits[targets]

    def boosted(made: Tilt, log_probabilities: Tensor, target: int) -> Tensor:
        hint = int(made.hints[target])
        return log_probabilities + made.boosts[target] * (torch.arange(len(log_probabilities)) == hint)
    monkeypatch.setattr(Tilt, "losses", shifted)
    report = audit(name, params=PARAMS)
    assert "distribution" in violated(report, name)
    assert report["strategies"][name]["distribution"]["largest_deviation_of_sum"] < 1e-4
    monkeypatch.setattr(Tilt, "distribution", boosted)
    report = audit(name, params=PARAMS)
    assert "distribution" in violated(report, name)
    assert report["strategies"][name]["distribution"]["largest_deviation_of_sum"] > 1e-4


def test_a_stated_distribution_without_the_tilt_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tilt, "distribution", lambda made, log_probabilities, target: log_probabilities)
    assert "distribution" in violated(audit("sliding", params=PARAMS), "sliding")


def test_isolation_is_judged_where_hints_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all compared, hints from other documents would pass for a leak."""
    everywhere = lambda one, other, settings: np.ones(len(one) - 1, np.bool_)  # noqa: E731
    monkeypatch.setattr(probe, "same_hints", everywhere)
    monkeypatch.setattr(replay, "same_hints", everywhere)
    causality = audit("lora", params=PARAMS)["strategies"]["lora"]["causality"]
    assert causality["documents_isolated"]["passed"] is False
