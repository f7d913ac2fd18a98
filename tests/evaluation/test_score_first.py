import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import Outcome, run_strategy
from lib.evaluation.ledger import Event
from lib.model.gpt import GPT
from tests.evaluation.test_adapter import TrainerByHand, is_last_block_or_scale
from tests.evaluation.tiny import make_job, make_model, make_params, make_tokens

NUM_TARGETS = 5 * 16 + 11  # five chunks and a part of one

Nats = npt.NDArray[np.float64]


def score_window(model: GPT, stream: torch.Tensor, start: int, end: int, attention_tokens: int | None = None) -> Nats:
    """Full logits of one window alone; the loss of each of its targets."""
    with torch.no_grad():
        logits = model.logits(stream[None, start:end], attention_tokens=attention_tokens)[0].double()
    return F.cross_entropy(logits, stream[start + 1 : end + 1], reduction="none").numpy()


def slide_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams, begin: int, stop: int) -> Nats:
    """Targets `begin` .. `stop` - 1: as many as a window holds at the start of the stream, else a stride at the end of each window."""
    stream, nats, first = torch.from_numpy(tokens.astype(np.int64)), np.empty(stop - begin), begin
    while first < stop:
        start = 0 if first == 0 else first - (params.window_tokens - params.stride_tokens)
        end = min(start + params.window_tokens, stop)
        nats[first - begin : end - begin] = score_window(model, stream, start, end)[first - start :]
        first = end
    return nats


def pass_once_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams, begin: int, stop: int) -> Nats:
    """Targets `begin` .. `stop` - 1 in segments, each after the inputs that its first target attends to, but not before the stream."""
    stream, nats, first = torch.from_numpy(tokens.astype(np.int64)), np.empty(stop - begin), begin
    while first < stop:
        end = min(first + params.segment_tokens + (params.window_tokens if first == 0 else 0), stop)  # nothing is before the first one
        start = max(0, first - params.window_tokens)
        nats[first - begin : end - begin] = score_window(model, stream, start, end, params.window_tokens)[first - start :]
        first = end
    return nats


def adapt_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams) -> Nats:
    """pr585's procedure as its description reads: score a chunk with the present weights, then train on its rows, but not on the last."""
    settings, model = params.score_first, copy.deepcopy(model)
    num_targets, size = len(tokens) - 1, settings.chunk_tokens
    num_chunks = math.ceil(num_targets / size)
    trainer = TrainerByHand(model, settings, is_last_block_or_scale)
    nats = np.empty(num_targets)
    for chunk in range(num_chunks):
        begin, end = chunk * size, min((chunk + 1) * size, num_targets)
        score = pass_once_by_hand if settings.windows == "one_pass" else slide_by_hand
        nats[begin:end] = score(model, tokens, params, begin, end)
        if chunk < num_chunks - 1:
            lr = settings.lr * (1 + math.cos(math.pi * chunk / (num_chunks - 1))) / 2
            trainer.train(torch.from_numpy(tokens.astype(np.int64)), range(begin, end, params.window_tokens), params.window_tokens, lr,
                          settings.epochs)
    return nats


def run(name: Any = "score_first", num_targets: int = NUM_TARGETS, tokens: npt.NDArray[np.uint16] | None = None,
        **changes: Any) -> Outcome:
    return run_strategy(name, make_job(make_model(), make_tokens(num_targets) if tokens is None else tokens, make_params(**changes)))


@pytest.mark.parametrize("windows", ["sliding", "one_pass"])
@pytest.mark.parametrize(("settings", "others"), [
    ({}, {}), ({"batch_sequences": 1, "epochs": 1, "grad_clip": 0.1}, {"stride_tokens": 8}),
    ({"chunk_tokens": 24, "batch_sequences": 8}, {"stride_tokens": 3, "segment_tokens": 5}),
    ({"chunk_tokens": 32, "optimizer": "sgd", "weight_decay": 0.1}, {"segment_tokens": 10})])
def test_scores_are_those_of_an_independent_implementation(windows: str, settings: dict[str, Any], others: dict[str, Any]) -> None:
    changes = {"score_first": settings | {"windows": windows}} | others
    nats = run(**changes).nats
    assert nats == pytest.approx(adapt_by_hand(make_model(), make_tokens(NUM_TARGETS), make_params(**changes)), abs=2e-4)
    assert np.abs(nats - run(windows, **changes).nats).max() > 0.05  # it did adapt


def test_without_learning_rate_it_is_sliding_bit_for_bit() -> None:
    # The same windows share a batch of 4 in both: the first is alone, 4 more are in chunk 0, 8 in every other chunk.
    assert np.array_equal(run(score_first={"lr": 0.0}).nats, run("sliding").nats)


def test_without_learning_rate_segments_that_agree_are_those_of_one_pass_bit_for_bit() -> None:
    # The first segment of one_pass has 8 + 16 targets, as chunk 0; then both have segments of 16, 3 and 4 of which share a batch.
    changes: dict[str, Any] = {"batch_tokens": 24, "score_first": {"lr": 0.0, "windows": "one_pass", "chunk_tokens": 24}}
    assert np.array_equal(run(num_targets=64, **changes).nats[:40], run("one_pass", num_targets=64, **changes).nats[:40])


@pytest.mark.parametrize("windows", ["sliding", "one_pass"])
def test_the_first_chunk_is_scored_with_the_artifact_s_weights(windows: str) -> None:
    first = {strategy: run(strategy, num_targets, score_first={"windows": windows}).nats[:16]
             for strategy, num_targets in (("score_first", NUM_TARGETS), (windows, 16))}
    assert np.array_equal(first["score_first"], first[windows])


@pytest.mark.parametrize("windows", ["sliding", "one_pass"])
def test_adaptation_lowers_the_loss_of_text_that_repeats_itself(windows: str) -> None:
    tokens = np.append(np.tile(make_tokens(15), 8), 1).astype(np.uint16)
    settings = {"windows": windows, "epochs": 4, "lr": 0.05, "lr_schedule": "constant", "weight_decay": 1.0, "trainable": ["all"]}
    assert run(tokens=tokens, score_first=settings).nats[-16:].mean() < 0.5 * run(windows, tokens=tokens).nats[-16:].mean()


def test_the_record_shows_each_chunk_scored_and_then_trained_on_with_a_cosine_over_the_trained_ones() -> None:
    events = run(score_first={"batch_sequences": 1}).events
    expected = [event for chunk in range(5) for event in (
        Event(2 * chunk, "scored", -1, 16 * chunk, 16 * chunk + 15), Event(2 * chunk + 1, "trained", -1, 16 * chunk, 16 * chunk + 15, 4))]
    assert [event._replace(lr=0.0) for event in events] == [*expected, Event(10, "scored", -1, 80, 90)]
    assert [event.lr for event in events[1::2]] == pytest.approx([0.01 * (1 + math.cos(math.pi * chunk / 5)) / 2 for chunk in range(5)])


@pytest.mark.parametrize(("num_targets", "num_trained"), [(9, 0), (16, 0), (17, 1), (48, 2)])
def test_the_last_chunk_is_not_trained_on(num_targets: int, num_trained: int) -> None:
    outcome = run(num_targets=num_targets)
    assert len(outcome.nats) == num_targets
    assert [event.first for event in outcome.events if event.kind == "trained"] == [16 * chunk for chunk in range(num_trained)]


@pytest.mark.parametrize(("windows", "expected"), [
    ("sliding", [*range(8), *[6, 7] * 41, 6]), ("one_pass", [*range(16), *[*range(8, 24)] * 4, *range(8, 19)])])
def test_the_context_of_every_target_is_known(windows: str, expected: Sequence[int]) -> None:
    assert run(score_first={"windows": windows}).context.tolist() == expected


def test_scoring_and_training_each_set_their_mode() -> None:
    seen, model = set(), make_model()
    model.register_forward_pre_hook(lambda module, _: seen.add((torch.is_grad_enabled(), module.training)))
    run_strategy("score_first", make_job(model, make_tokens(NUM_TARGETS), make_params()))
    assert seen == {(False, False), (True, True)}
