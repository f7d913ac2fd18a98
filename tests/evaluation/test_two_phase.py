import copy
import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lib.evaluation.config import EvaluateParams
from lib.evaluation.evaluation import Outcome, run_strategy
from lib.evaluation.strategies import STRATEGIES
from lib.model.gpt import GPT
from tests.evaluation.test_adapter import TrainerByHand, is_last_block_or_scale
from tests.evaluation.test_score_first import slide_by_hand
from tests.evaluation.tiny import make_job, make_model, make_params, make_tokens

NUM_TARGETS = 45


def is_recalibrated(name: str) -> bool:
    return re.fullmatch(r"blocks\.\d+\.(attention_scale|mlp_scale|residual_mix)", name) is not None


def adapt_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams) -> npt.NDArray[np.float64]:
    """pr410: all whole rows of the text, epoch after epoch, with two optimizers one after the other; then the text is scored."""
    model, num_targets, window = copy.deepcopy(model), len(tokens) - 1, params.window_tokens
    for settings, is_trained in ((params.two_phase.recalibration, is_recalibrated), (params.two_phase.selective, is_last_block_or_scale)):
        trainer = TrainerByHand(model, settings, is_trained)
        for epoch in range(settings.epochs):
            lr = settings.lr * (1 + math.cos(math.pi * epoch / settings.epochs)) / 2
            num_rows = num_targets // window
            if settings.drop_last:
                num_rows -= num_rows % settings.batch_sequences
            trainer.train(torch.from_numpy(tokens.astype(np.int64)), range(0, num_rows * window, window), window, lr, 1)
    return slide_by_hand(model, tokens, params, 0, num_targets)


def run(num_targets: int = NUM_TARGETS, **changes: Any) -> Outcome:
    return run_strategy("two_phase", make_job(make_model(), make_tokens(num_targets), make_params(**changes)))


@pytest.mark.parametrize("changes", [
    {}, {"recalibration": {"epochs": 3, "batch_sequences": 4}, "selective": {"epochs": 1, "momentum": 0.5}},
    {"recalibration": {"optimizer": "sgd", "epochs": 1}, "selective": {"optimizer": "adamw", "epochs": 3}},
    {"recalibration": {"grad_clip": None}, "selective": {"grad_clip": None, "lr": 1e-3}},
    {"recalibration": {"drop_last": True, "batch_sequences": 4}, "selective": {"drop_last": True}}])
@pytest.mark.parametrize("num_targets", [NUM_TARGETS, 40])  # with and without targets that no whole row holds
def test_scores_are_those_of_an_independent_implementation(changes: dict[str, Any], num_targets: int) -> None:
    nats = run(num_targets, two_phase=changes).nats
    assert nats == pytest.approx(adapt_by_hand(make_model(), make_tokens(num_targets), make_params(two_phase=changes)), abs=5e-4)


def test_the_record_shows_that_everything_is_trained_on_before_it_is_scored() -> None:
    events = run(two_phase={"recalibration": {"epochs": 3}}).events
    assert [event[1:6] for event in events] == [("trained", -1, 0, 39, 3)] * 5 + [("scored", -1, 0, 44, 0)]
    assert [event.lr for event in events] == pytest.approx([0.01, 0.0075, 0.0025, 0.01, 0.005, 0])


def test_steps_that_are_not_full_are_left_out_if_asked() -> None:
    """The text has 5 rows of 8 targets."""
    events = run(two_phase={"recalibration": {"drop_last": True, "batch_sequences": 3}, "selective": {"drop_last": True}}).events
    assert [event[3:6] for event in events] == [(0, 23, 1)] * 2 + [(0, 31, 2)] * 2 + [(0, 44, 0)]


def test_a_text_shorter_than_a_step_is_one_step() -> None:
    """So that short texts, such as those of the audit, are trained on too."""
    dropped, kept = (run(two_phase={"recalibration": {"drop_last": drop, "batch_sequences": 6}}).nats for drop in (True, False))
    assert np.array_equal(dropped, kept)


def test_it_is_the_only_strategy_whose_score_is_not_legal() -> None:
    assert [name for name, strategy in STRATEGIES.items() if strategy.transductive] == ["longest_first", "two_phase"]


def test_knowing_the_text_beats_not_knowing_it() -> None:
    sliding = run_strategy("sliding", make_job(make_model(), make_tokens(NUM_TARGETS), make_params())).nats
    assert run(two_phase={"recalibration": {"epochs": 20}}).nats.mean() < 0.8 * sliding.mean()


def test_a_text_shorter_than_a_row_is_scored_and_not_trained_on() -> None:
    sliding = run_strategy("sliding", make_job(make_model(), make_tokens(7), make_params())).nats
    assert np.array_equal(run(7).nats, sliding)
