import copy
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.config import StrategyName
from lib.evaluation.evaluation import evaluate, run_strategy
from lib.evaluation.ledger import Event
from lib.evaluation.limit import TimeLimit
from lib.evaluation.strategies import STRATEGIES
from tests.evaluation.test_lora import NUM_TARGETS, STARTS
from tests.evaluation.test_score_first import pass_once_by_hand, slide_by_hand
from tests.evaluation.tiny import BOS, make_job, make_model, make_params, make_text, make_tokens
from tests.processes import run_processes

NAMES: tuple[StrategyName, ...] = get_args(StrategyName)
LEGAL = [name for name in NAMES if not STRATEGIES[name].transductive]


def score(name: StrategyName, tokens: npt.NDArray[np.uint16], **changes: Any) -> npt.NDArray[np.float32]:
    return run_strategy(name, make_job(make_model(), tokens, make_params(**changes))).nats


@pytest.mark.parametrize("num_targets", [91, 96, 23, 8, 3, 1])
@pytest.mark.parametrize("changes", [{}, {"stride_tokens": 3, "segment_tokens": 5, "batch_tokens": 1}, {"stride_tokens": 8}])
def test_fixed_strategies_score_as_brute_force_does(num_targets: int, changes: dict[str, Any]) -> None:
    model, tokens, params = make_model(), make_tokens(num_targets), make_params(**changes)
    plain = make_params(stride_tokens=params.window_tokens)
    assert score("plain", tokens, **changes) == pytest.approx(slide_by_hand(model, tokens, plain, 0, num_targets), abs=1e-5)
    assert score("sliding", tokens, **changes) == pytest.approx(slide_by_hand(model, tokens, params, 0, num_targets), abs=1e-5)
    assert score("one_pass", tokens, **changes) == pytest.approx(pass_once_by_hand(model, tokens, params, 0, num_targets), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("starts", "num_targets"), [(STARTS, NUM_TARGETS), ((0, 33), 96), ((0,), 9), ((0, 1), 2)])
@pytest.mark.parametrize("changes", [
    {},
    {"score_first": {"windows": "one_pass", "chunk_tokens": 8, "epochs": 1}, "lora": {"batch_documents": 3}, "phased": {"documents": 1}},
    {"lora": {"warm_start": 4}, "phased": {"boundaries": [1, 4, 5]}},
    {"lora": {"steps": 2, "batch_documents": 1}, "stride_tokens": 3, "two_phase": {"selective": {"epochs": 3}}},
    {"two_phase": {"recalibration": {"drop_last": True, "batch_sequences": 4}, "selective": {"drop_last": True, "batch_sequences": 3}}}])
def test_the_announced_work_is_the_work_reported(name: StrategyName, starts: tuple[int, ...], num_targets: int,
                                                 changes: dict[str, Any]) -> None:
    reported = []

    class Recorder(TimeLimit):
        def advance(self, work: int) -> None:
            reported.append(work)
            super().advance(work)

    strategies = sorted({name, "plain"})
    params, text = make_params(strategies=strategies, strategy="plain", **changes), make_text(make_tokens(num_targets, starts=starts))
    evaluate(make_model(), text, params, process=SINGLE_CPU, limit=Recorder(60, SINGLE_CPU))
    assert sum(reported) == sum(STRATEGIES[each].work(text.documents, params) for each in params.strategies)


def test_work_is_counted_in_inputs_and_three_times_where_it_is_trained_on() -> None:
    documents, params = make_text(make_tokens(40, starts=(0, 17))).documents, make_params()
    work = {name: STRATEGIES[name].work(documents, params) for name in NAMES}
    assert work == {
        "plain": 40, "sliding": 17 * 8, "one_pass": 24 + 24, "score_first": 17 * 8 + 3 * 2 * 32,
        "lora": (4 * 3 + 8 * 3 * 3 + 8) + (4 * 3 + 8 * 3 * 4 + 8), "phased": work["lora"], "longest_first": work["lora"],
        "two_phase": 17 * 8 + (2 + 2) * 3 * 40}


def first_changed_score(name: StrategyName, changed_token: int, **changes: Any) -> int:
    """The first target whose score differs when a token and everything after it changes, but no start of a document."""
    tokens = make_tokens(NUM_TARGETS, starts=STARTS)
    other = tokens.copy()
    other[changed_token:] = np.where(tokens[changed_token:] == BOS, BOS, 33 - tokens[changed_token:])
    return int(np.flatnonzero(score(name, tokens, **changes) != score(name, other, **changes))[0])


@pytest.mark.parametrize("changed_token", [6, 20, 33, 48, 49, 80, 91])
@pytest.mark.parametrize("name", LEGAL)
def test_later_tokens_change_no_earlier_score_by_a_single_bit(name: StrategyName, changed_token: int) -> None:
    assert first_changed_score(name, changed_token) == changed_token - 1  # target t is token t + 1


@pytest.mark.parametrize("changed_token", [20, 49, 80])
def test_no_token_after_a_chunk_in_one_pass_changes_its_scores_by_a_single_bit(changed_token: int) -> None:
    assert first_changed_score("score_first", changed_token, score_first={"windows": "one_pass"}) == changed_token - 1


def test_training_before_scoring_is_seen_by_that_test() -> None:
    assert first_changed_score("two_phase", 80) < 20


@pytest.mark.parametrize("name", NAMES)
def test_the_record_has_every_target_scored_once_and_before_it_is_trained_on_unless_it_is_not_legal(name: StrategyName) -> None:
    events = run_strategy(name, make_job(make_model(), make_tokens(NUM_TARGETS, starts=STARTS), make_params(lora={"steps": 2}))).events
    scored_at, too_early = dict[int, int](), 0
    for event in sorted(events):
        for target in range(event.first, event.last + 1):
            if event.kind == "scored":
                assert target not in scored_at
                scored_at[target] = event.step
            elif scored_at.get(target, math.inf) >= event.step:
                too_early += 1
    assert scored_at.keys() == set(range(NUM_TARGETS))
    assert too_early == (88 * 4 if name == "two_phase" else 0)


@pytest.mark.parametrize("name", ["plain", "sliding", "one_pass"])
def test_what_is_scored_with_the_artifact_s_weights_is_one_event(name: StrategyName) -> None:
    outcome = run_strategy(name, make_job(make_model(), make_tokens(NUM_TARGETS), make_params()))
    assert outcome.events == [Event(0, "scored", -1, 0, NUM_TARGETS - 1)]


@pytest.mark.parametrize("name", NAMES)
def test_the_artifact_s_model_is_left_as_it_was(name: StrategyName) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    run_strategy(name, make_job(model, make_tokens(NUM_TARGETS, starts=STARTS), make_params()))
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_the_distribution_of_the_last_target_is_the_one_that_it_was_scored_with(name: StrategyName) -> None:
    tokens = make_tokens(NUM_TARGETS, starts=STARTS)
    outcome = run_strategy(name, make_job(make_model(), tokens, make_params(), wants_last=True))
    assert outcome.distribution is not None
    assert np.exp(outcome.distribution.astype(np.float64)).sum() == pytest.approx(1)
    assert -outcome.distribution[tokens[-1]] == pytest.approx(outcome.nats[-1], abs=1e-5)
    assert np.array_equal(outcome.nats, score(name, tokens))  # and asking for it changes nothing


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    (STARTS, {}),
    ((0, 40), {"score_first": {"batch_sequences": 1, "epochs": 1, "windows": "one_pass"}, "lora": {"batch_documents": 1, "warm_start": 2},
               "phased": {"documents": 1, "batch_sequences": 1}}),  # fewer documents, and fewer rows, than processes
    (STARTS, {"score_first": {"chunk_tokens": 24, "batch_sequences": 3, "optimizer": "sgd", "lr": 0.001, "grad_clip": 1000.0},
              "lora": {"batch_documents": 1, "steps": 2, "warm_start": 4},
              "phased": {"batch_sequences": 3, "optimizer": "sgd", "lr": 0.001, "grad_clip": 1000.0}}),
]


def evaluate_case(number: int, process: Process) -> dict[str, dict[str, Any]]:
    """Bits per byte, and losses and events, of every strategy."""
    starts, changes = CASES[number]
    text, params = make_text(make_tokens(NUM_TARGETS, starts=starts)), make_params(**changes)
    evaluation = evaluate(make_model(), text, params, process=process, limit=TimeLimit(600, process))
    return {name: {"bpb": evaluation.score(name).bpb, "nats": outcome.nats.tolist(), "context": outcome.context.tolist(),
                   "events": outcome.events} for name, outcome in evaluation.outcomes.items()}


def evaluate_in_process(process: Process, folder: Path) -> None:
    for number in range(len(CASES)):
        (folder / f"{number}-{process.rank}.json").write_text(json.dumps(evaluate_case(number, process)))


def count_events(events: list[list[Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(event)[1:] for event in events)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [3])
def test_any_number_of_processes_gives_the_scores_and_the_record_of_one(num_processes: int, tmp_path: Path) -> None:
    run_processes(evaluate_in_process, num_processes, tmp_path)
    for number in range(len(CASES)):
        expected = json.loads(json.dumps(evaluate_case(number, SINGLE_CPU)))
        found = [json.loads((tmp_path / f"{number}-{rank}.json").read_text()) for rank in range(num_processes)]
        assert all(each == found[0] for each in found)  # to the last bit
        for name in NAMES:
            assert found[0][name]["bpb"] == pytest.approx(expected[name]["bpb"], abs=1e-6), (number, name)
            assert found[0][name]["nats"] == pytest.approx(expected[name]["nats"], abs=1e-4), (number, name)
            assert found[0][name]["context"] == expected[name]["context"], (number, name)
            assert count_events(found[0][name]["events"]) == count_events(expected[name]["events"]), (number, name)
            for state in {event[2] for event in expected[name]["events"]}:  # what depends on each other is in the same order
                order = [[event[1:] for event in sorted(each[name]["events"]) if event[2] in (state, -1)] for each in (found[0], expected)]
                assert order[0] == order[1], (number, name)
