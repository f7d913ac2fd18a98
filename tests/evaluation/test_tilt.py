import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation import tilt
from lib.evaluation.config import StrategyName, TiltParams
from lib.evaluation.evaluation import Outcome, run_strategy
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.tilt import NO_HINT, Tilt, find_hints
from lib.model import compilation
from tests.evaluation.tiny import MODEL, make_job, make_model, make_params, make_tokens
from tests.processes import run_processes

TILT = {"threshold": 0.6, "boosts": [[4, 1.5]]}
STARTS = (0, 13, 14, 30, 47, 60)


def params(order: int = 4, threshold: float = 0.6, boost: float = 1.5) -> TiltParams:
    return TiltParams(threshold=threshold, boosts=((order, boost),))


def hints_by_hand(tokens: list[int], settings: TiltParams) -> list[int]:
    """One pass with dictionaries: context -> token -> count, and the token that first reached the largest."""
    counts: dict[tuple[int, ...], dict[int, int]] = {}
    leaders: dict[tuple[int, ...], int] = {}
    hints, ((order, _),) = [], settings.boosts
    for target in range(len(tokens) - 1):
        context, following = tuple(tokens[max(0, target + 2 - order):target + 1]), tokens[target + 1]
        if len(context) < order - 1:
            hints.append(NO_HINT)
            continue
        of_context = counts.setdefault(context, {})
        leader = leaders.get(context)
        is_hint = leader is not None and of_context[leader] / sum(of_context.values()) >= settings.threshold
        hints.append(leader if leader is not None and is_hint else NO_HINT)
        of_context[following] = of_context.get(following, 0) + 1
        if leader is None or of_context[following] > of_context[leader]:
            leaders[context] = following
    return hints


TOKENS = st.integers(1, 6).flatmap(lambda vocab: st.lists(st.integers(0, vocab - 1), min_size=2, max_size=120))
SETTINGS = st.builds(params, st.integers(2, 6), st.sampled_from([0.0, 0.5, 2 / 3, 0.8, 1.0]))


@given(TOKENS, SETTINGS)
def test_hints_are_those_of_a_pass_with_dictionaries(tokens: list[int], settings: TiltParams) -> None:
    hints = find_hints(np.array(tokens, np.int32), settings).tokens
    assert hints.dtype == np.int32
    assert hints.tolist() == hints_by_hand(tokens, settings)


@given(TOKENS, st.sampled_from([0.5, 0.8]))
def test_the_longest_ngram_with_a_hint_counts(tokens: list[int], threshold: float) -> None:
    boosts = ((5, 3.0), (3, 0.0), (2, 1.0))
    hints = find_hints(np.array(tokens, np.uint16), TiltParams(threshold=threshold, boosts=boosts))
    of_each = [hints_by_hand(tokens, params(order, threshold)) for order, _ in boosts]
    for found, boost, *candidates in zip(hints.tokens.tolist(), hints.boosts.tolist(), *of_each, strict=True):
        expected = next(((hint, its) for hint, (_, its) in zip(candidates, boosts, strict=True) if hint != NO_HINT), (NO_HINT, 0.0))
        assert (found, boost) == expected


def test_hints_of_a_long_repetitive_text_are_those_of_a_pass_with_dictionaries() -> None:
    generator = np.random.default_rng(0)
    phrases = generator.integers(0, 60000, (40, 20))
    tokens = np.concatenate([phrases[number, :20 if number % 9 else 5] for number in generator.integers(0, 40, 1500)]).astype(np.uint16)
    for order in (2, 8, 16):
        hints = find_hints(tokens, params(order, 0.8)).tokens
        assert hints.tolist() == hints_by_hand(tokens.tolist(), params(order, 0.8))
        assert (hints != NO_HINT).mean() > 0.1


@given(TOKENS, TOKENS, SETTINGS)
def test_what_comes_later_changes_no_hint_also_where_hashes_collide(first: list[int], later: list[int], settings: TiltParams) -> None:
    for multiplier in (tilt.MULTIPLIER, np.uint64(0), np.uint64(1)):  # 0: the last token alone; 1: in any order
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tilt, "MULTIPLIER", multiplier)
            hints, joined = (find_hints(np.array(tokens, np.int32), settings).tokens for tokens in (first, first + later))
        assert joined[:len(first) - 1].tolist() == hints.tolist()
        length, seen = settings.boosts[0][0] - 1, set[tuple[int, ...]]()
        for target, hint in enumerate(hints.tolist()):  # no context ever gets the counts of another one
            if hint != NO_HINT:
                assert (*first[target + 1 - length:target + 1], hint) in seen
            if target >= length - 1:
                seen.add(tuple(first[target + 1 - length:target + 2]))


def make_tilt(hints: list[int], targets: list[int], boost: float) -> Tilt:
    found = torch.tensor([*hints, NO_HINT], dtype=torch.int32)
    return Tilt(found, boost * (found != NO_HINT), found == torch.tensor([*targets, 0]))


def test_tilted_losses_and_distributions_are_the_formula_s_and_sum_to_one() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probabilities = torch.randn(6, 32, generator=generator).mul(3).log_softmax(-1)
    targets, hints = [3, 5, 5, 0, 31, 7], [3, 4, NO_HINT, 0, 2, NO_HINT]
    nats = -torch.stack([log_probabilities[torch.arange(6), torch.tensor(each).clamp(min=0)] for each in (targets, hints)])
    made = make_tilt(hints, targets, 2.625)
    losses = made.losses(nats[:, None], torch.arange(6)[None])[0]
    for number, (target, hint) in enumerate(zip(targets, hints, strict=True)):
        p = log_probabilities[number].double().exp().numpy()
        weights = p * np.exp(2.625 * (np.arange(32) == hint))
        distribution = made.distribution(log_probabilities[number], number)
        assert float(distribution.exp().sum()) == pytest.approx(1, abs=1e-6)
        assert distribution.exp().numpy() == pytest.approx(weights / weights.sum(), rel=1e-5)
        assert float(losses[number]) == pytest.approx(-math.log(weights[target] / weights.sum()), abs=1e-6)
        assert hint != NO_HINT or losses[number] == nats[0, number]
    assert torch.equal(make_tilt(hints, targets, 0.0).losses(nats[:, None], torch.arange(6)[None])[0], nats[0])


def repetitive_tokens() -> npt.NDArray[np.uint16]:
    """Documents that share a passage; after it comes now this token, now that one."""
    tokens = make_tokens(71, starts=STARTS)
    for start in (3, 18, 36, 50, 62):
        tokens[start:start + 7] = tokens[3:10]
    tokens[[42, 68]] = tokens[42] + 1
    return tokens


def run(name: StrategyName, wanted: int | None = None, **changes: Any) -> Outcome:
    job = make_job(make_model(), repetitive_tokens(), make_params(**changes))
    job.sheet.wanted = wanted
    return run_strategy(name, job)


@pytest.mark.parametrize(("name", "changes"), [
    ("plain", {}), ("sliding", {}), ("one_pass", {}), ("score_first", {}), ("lora", {}), ("lora", {"lora": {"steps": 2}}), ("phased", {})])
def test_a_strategy_with_tilt_gives_its_distributions_tilted_and_trains_as_without(name: StrategyName, changes: dict[str, Any]) -> None:
    tokens = repetitive_tokens()
    hints = hints_by_hand(tokens.tolist(), params())
    tilted, untilted = run(name, **changes, tilt=TILT), run(name, **changes)
    hinted = [target for target, hint in enumerate(hints) if hint != NO_HINT]
    hits = {target for target in hinted if hints[target] == tokens[target + 1]}
    assert len(hits) > 8 and len(hinted) > len(hits)
    others = np.setdiff1d(np.arange(len(hints)), hinted)
    assert tilted.nats[others].tobytes() == untilted.nats[others].tobytes()
    for target in hinted[::9] + sorted(set(hinted) - hits):
        p = np.exp(run(name, target, **changes).distribution.astype(np.float64))  # type: ignore[union-attr]
        weights = p * np.exp(1.5 * (np.arange(len(p)) == hints[target]))
        assert tilted.nats[target] == pytest.approx(-math.log(weights[tokens[target + 1]] / weights.sum()), abs=2e-6)
        stated = run(name, target, **changes, tilt=TILT).distribution
        assert stated == pytest.approx(np.log(weights / weights.sum()), abs=2e-6)
    assert untilted.figures == {}
    assert tilted.figures == {"tilted_targets": len(hinted),
                              "tilt_gain": pytest.approx((untilted.nats - tilted.nats).sum() / len(hints), abs=1e-6)}


def _run_in_process(process: Process) -> None:
    names: list[StrategyName] = ["sliding", "lora"]
    for name in names:
        alone = run(name, tilt=TILT)
        together = run_strategy(name, make_job(make_model(), repetitive_tokens(), make_params(tilt=TILT), process))
        np.testing.assert_allclose(together.nats, alone.nats, atol=1e-5)
        assert together.figures == pytest.approx(alone.figures, abs=1e-6)


@pytest.mark.slow
def test_several_processes_give_the_tilt_of_one() -> None:
    run_processes(_run_in_process, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one_pass", "lora"])
def test_compiled_scores_with_tilt_are_those_without_compiler(name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    changes: dict[str, Any] = {"tilt": TILT, "lora": {"window_tokens": 8, "chunk_tokens": 3, "batch_documents": 5}}
    expected = run(name, **changes)
    job = make_job(make_model(), repetitive_tokens(), make_params(**changes))
    job.forward.compiled = True
    np.testing.assert_allclose(run_strategy(name, job).nats, expected.nats, atol=1e-5)


def test_losses_of_several_tokens_at_a_position_are_those_of_each_and_only_the_first_has_a_gradient() -> None:
    model = make_model()
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(2, MODEL["vocab_size"], shape, generator=generator) for shape in ((2, 8), (3, 2, 5)))
    together = model(tokens, targets, slice(3, 8))
    apart = torch.stack([model(tokens, each, slice(3, 8)) for each in targets])
    assert torch.equal(together[0], apart[0])
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)
    weight = model.token_embedding.weight
    of_all, = torch.autograd.grad(together.sum(), weight)
    of_first, = torch.autograd.grad(3 * apart[0].sum(), weight)
    torch.testing.assert_close(of_all, of_first)


def test_the_loss_that_belongs_to_no_target_has_no_hint() -> None:
    stream = torch.from_numpy(repetitive_tokens().astype(np.int32))
    sheet = ScoreSheet(71, torch.device("cpu"), tilt=Tilt.of(stream, params()))
    hints = sheet.hints(torch.tensor([[70, 71]]))
    assert hints is not None and hints[0, 1] == NO_HINT
    sheet.write(torch.tensor([[71]]), torch.ones(2, 1, 1), torch.tensor([0]))
    assert sheet.tilt_figures(SINGLE_CPU)["tilt_gain"] == 0
    assert ScoreSheet(71, torch.device("cpu")).hints(torch.tensor([[70]])) is None
