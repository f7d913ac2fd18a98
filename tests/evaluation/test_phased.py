import copy
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Outcome, run_strategy
from lib.model.gpt import GPT
from tests.evaluation.test_adapter import TrainerByHand, is_last_block_or_scale
from tests.evaluation.test_lora import LENGTHS, NUM_TARGETS, STARTS
from tests.evaluation.test_lora import adapt_by_hand as adapt_document_by_hand
from tests.evaluation.tiny import make_job, make_model, make_params, make_tokens


def adapt_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams, *,
                  longest_first: bool = False) -> npt.NDArray[np.float32]:
    """Documents one by one, each with an adapter; then the model is trained on whole rows scored by then, or on all steps but one."""
    settings, window, model = params.phased, params.window_tokens, copy.deepcopy(model)
    stream, nats = torch.from_numpy(tokens.astype(np.int64)), np.empty(len(tokens) - 1, np.float32)
    documents = list(itertools.pairwise([*np.flatnonzero(tokens[:-1] == 1).tolist(), len(tokens) - 1]))
    if longest_first:
        documents.sort(key=lambda document: document[0] - document[1])
    text = torch.cat([*(stream[begin:end] for begin, end in documents), stream[documents[-1][1], None]])
    boundaries = [n for n in settings.boundaries or range(0, 99, settings.documents) if 0 < n < len(documents)]
    trainer, trained = TrainerByHand(model, settings, is_last_block_or_scale), 0
    chains: list[dict[tuple[str, int], torch.Tensor]] = [{} for _ in documents]

    def train(starts: range, part: int, num_parts: int) -> None:
        lr = settings.lr * (1 + math.cos(math.pi * part / num_parts)) / 2 if settings.lr_schedule == "cosine" else settings.lr
        trainer.train(text, starts, window, lr, settings.epochs)

    for number, (begin, end) in enumerate(documents):
        scored = sum(end - begin for begin, end in documents[:number])
        if number in boundaries and settings.boundaries is None:
            train(range(trained, trained + (scored - trained) // window * window, window), boundaries.index(number), len(boundaries))
            trained += (scored - trained) // window * window
        elif number in boundaries:
            trainer, step = TrainerByHand(model, settings, is_last_block_or_scale), window * settings.batch_sequences
            num_steps = math.ceil(scored / step)
            for place in range(num_steps - 1):
                train(range(place * step, (place + 1) * step, window), place, num_steps - 1)
        chain = chains[number % (params.lora.warm_start or len(documents))]
        nats[begin:end] = adapt_document_by_hand(model, stream[begin : end + 1], params.lora, chain)
    return nats


def run(tokens: npt.NDArray[np.uint16] | None = None, name: StrategyName = "phased", **changes: Any) -> Outcome:
    tokens = make_tokens(NUM_TARGETS, starts=STARTS) if tokens is None else tokens
    return run_strategy(name, make_job(make_model(), tokens, make_params(**changes)))


@pytest.mark.parametrize(("settings", "others"), [
    ({}, {}),
    ({"documents": 1}, {}),  # the second document is one token: a phase without a row of its own
    ({"documents": 3, "epochs": 1, "batch_sequences": 3, "lr_schedule": "constant"}, {"lora": {"batch_documents": 5, "steps": 2}}),
    ({"documents": 3}, {"lora": {"warm_start": 2}}),  # across phases
    ({"boundaries": [2, 5, 6], "batch_sequences": 1}, {}),
    ({"boundaries": [1, 4, 20], "optimizer": "sgd", "lr_schedule": "constant", "epochs": 1}, {"lora": {"warm_start": 1}}),
    ({"boundaries": [2, 4], "batch_sequences": 1}, {"lora": {"warm_start": 2}}),
    ({"documents": 3, "optimizer": "sgd"}, {"window_tokens": 5, "stride_tokens": 5, "score_first": {"chunk_tokens": 20}}),
])
@pytest.mark.parametrize("name", ["phased", "longest_first"])
def test_scores_are_those_of_an_independent_implementation(name: StrategyName, settings: dict[str, Any], others: dict[str, Any]) -> None:
    tokens, changes = make_tokens(NUM_TARGETS, starts=STARTS), {"phased": settings} | others
    nats, expected = run(tokens, name, **changes).nats, adapt_by_hand(
        make_model(), tokens, make_params(**changes), longest_first=name == "longest_first")
    assert nats == pytest.approx(expected, abs=5e-4)
    assert np.abs(nats - run(tokens, name, **changes | {"phased": settings | {"lr": 0.0}}).nats).max() > 0.01  # the model itself did change


@pytest.mark.parametrize("documents", [2, 100])
def test_without_learning_rate_or_with_one_phase_it_is_lora(documents: int) -> None:
    lora = run_strategy("lora", make_job(make_model(), make_tokens(NUM_TARGETS, starts=STARTS), make_params())).nats
    phased = run(phased={"lr": 0.0 if documents == 2 else 0.1, "documents": documents})
    assert phased.nats == pytest.approx(lora, abs=1e-5)
    assert any(event.state == -1 for event in phased.events) == (documents == 2)


def trained_rows(outcome: Outcome) -> Sequence[tuple[int, int, int]]:
    return [(event.first, event.last, event.num_steps) for event in outcome.events if event.state == -1]


def test_rows_lie_side_by_side_across_phases_and_end_where_the_scored_text_ends() -> None:
    # Phases end at targets 14, 47 and 83 of 91: whole rows of 8 reach to 8, 40 and 80; the rest is trained on in the next phase.
    assert trained_rows(run()) == [(0, 7, 2 * 1), (8, 39, 2 * 2), (40, 79, 2 * 3)]


def test_a_row_that_ends_with_the_scored_text_is_trained_on() -> None:
    outcome = run(window_tokens=5, stride_tokens=5, score_first={"chunk_tokens": 20}, phased={"documents": 3})
    assert trained_rows(outcome) == [(0, 29, 2 * 3), (30, 79, 2 * 5)]  # phases end at targets 30 and 83


def test_with_boundaries_every_step_from_the_beginning_of_the_text_is_trained_on_but_the_last() -> None:
    events = [event for event in run(phased={"boundaries": [1, 3, 5]}).events if event.state == -1]  # at targets 13, 30 and 60; steps of 16
    assert [(event.first, event.last, event.num_steps) for event in events] == [
        (16 * place, 16 * place + 15, 2) for num_steps in (0, 1, 3) for place in range(num_steps)]
    assert [event.lr for event in events] == pytest.approx([0.01, 0.01, 0.0075, 0.0025])


def test_a_phase_without_a_whole_row_trains_nothing() -> None:
    assert trained_rows(run(phased={"documents": 1})) == [(0, 7, 2), (8, 23, 2), (24, 39, 2), (40, 55, 2), (56, 79, 4)]


def test_the_record_has_a_phase_scored_before_it_is_trained_on_and_a_cosine_over_phases() -> None:
    events = run().events
    phase_of = np.repeat(np.arange(len(LENGTHS)) // 2, LENGTHS)
    order = ["train" if event.state == -1 else f"phase {phase_of[event.first]}" for event in events]
    assert [what for what, _ in itertools.groupby(order)] == ["phase 0", "train", "phase 1", "train", "phase 2", "train", "phase 3"]
    assert all(event.kind == "trained" for event in events if event.state == -1)
    assert [event.lr for event in events if event.state == -1] == pytest.approx([0.01, 0.0075, 0.0025])
    assert [event.step for event in events] == list(range(len(events)))


def test_the_record_of_the_longest_documents_first_has_the_targets_that_were_trained_on() -> None:
    events = run(name="longest_first", phased={"boundaries": [2]}).events  # documents of 23 and 17 targets, from 60 and 30: two steps of 16
    assert [event[1:6] for event in events if event.state == -1] == [
        ("trained", -1, 60, 75, 2), ("trained", -1, 76, 82, 2), ("trained", -1, 30, 38, 2)]


def test_training_on_earlier_documents_lowers_the_loss_of_later_ones_like_them() -> None:
    document = make_tokens(15)
    tokens = np.concatenate([*[document] * 12, document[:1]])
    changes: dict[str, Any] = {"lora": {"lr": 0.0}, "phased": {"documents": 1, "epochs": 3, "lr": 0.03, "trainable": ["all"]}}
    nats = run(tokens, **changes).nats.reshape(12, 16)
    assert nats[-1].mean() < 0.5 * nats[0].mean()
