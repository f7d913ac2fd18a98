import time

import numpy as np
import pytest

from lib.distributed import SINGLE_CPU
from lib.evaluation.bpb import Score, make_score
from lib.evaluation.limit import TimeLimit, TimeLimitError
from lib.evaluation.score import score_plain
from lib.evaluation.strategies import STRATEGIES, Evaluation, evaluate
from lib.evaluation.ttt import score_first
from tests.evaluation.tiny import make_model, make_params, make_stream, make_tokens

NUM_TARGETS = 91
TARGET_BYTES = np.arange(NUM_TARGETS) % 4


def test_each_strategy_s_score_is_that_of_its_function() -> None:
    params, model, tokens = make_params(), make_model(), make_tokens(NUM_TARGETS)
    evaluation = evaluate(model, tokens, TARGET_BYTES, params, process=SINGLE_CPU, limit=TimeLimit(60, enabled=False))
    plain = score_plain(model, tokens, window_tokens=8, batch_windows=4, precision="fp32", process=SINGLE_CPU)
    adapted, log = score_first(model, make_stream(NUM_TARGETS), params, SINGLE_CPU)
    assert evaluation.scores["plain"] == make_score(plain, TARGET_BYTES)
    assert evaluation.scores["ttt"] == make_score(adapted, TARGET_BYTES)
    assert evaluation.adaptations == {"ttt": log}
    assert list(evaluation.scores) == list(evaluation.curves) == list(evaluation.seconds) == ["plain", "sliding", "ttt"]
    for name, curve in evaluation.curves.items():
        assert curve[-1][0] == NUM_TARGETS
        assert curve[-1][1] == pytest.approx(evaluation.scores[name].bpb)


def test_only_the_strategies_asked_for_run() -> None:
    evaluation = evaluate(make_model(), make_tokens(NUM_TARGETS), TARGET_BYTES, make_params(strategies=["sliding"]), process=SINGLE_CPU,
                          limit=TimeLimit(60, enabled=False))
    assert list(evaluation.scores) == ["sliding"]
    assert not evaluation.adaptations


@pytest.mark.parametrize("name", list(STRATEGIES))
@pytest.mark.parametrize("num_targets", [91, 96, 9])
def test_the_announced_work_is_the_work_done(name: str, num_targets: int) -> None:
    done = []

    class Recorder(TimeLimit):
        def advance(self, work: int) -> None:
            done.append(work)
            super().advance(work)

    params = make_params(strategies=[name])
    evaluate(make_model(), make_tokens(num_targets), np.ones(num_targets, np.int64), params,
             process=SINGLE_CPU, limit=Recorder(60, enabled=False))
    assert sum(done) == STRATEGIES[name].work(num_targets, params)


def test_passing_the_limit_fails_with_the_numbers_and_the_way_out() -> None:
    limit = TimeLimit(0.05, enabled=False)
    time.sleep(0.06)  # opening the artifact counts as well
    with pytest.raises(TimeLimitError, match=r"evaluate.limit_seconds: expected at most 0.05 s, found \d\.\d s .*projected.*stride_tokens"):
        evaluate(make_model(), make_tokens(NUM_TARGETS), TARGET_BYTES, make_params(), process=SINGLE_CPU, limit=limit)


def test_projection_counts_what_went_before_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("lib.evaluation.limit.time.monotonic", lambda: now)
    limit = TimeLimit(50, enabled=False)
    now = 110.0  # ten seconds to open the artifact
    with limit.plan(400):
        now = 115.0
        limit.advance(100)
        assert limit.projected_seconds == 10 + 4 * 5
        now = 149.0
        limit.advance(100)
        now = 151.0
        with pytest.raises(TimeLimitError, match=r"found 51.0 s with 75% of the work done \(projected: 65 s\)"):
            limit.advance(100)


def test_figures_have_eight_digits_and_belong_to_all_strategies() -> None:
    score = Score(1.123456789123, 2.123456789123, 10, 20)
    evaluation = Evaluation({"plain": score, "ttt": score}, {}, {}, {"plain": 2.0, "ttt": 4.0})
    assert evaluation.metrics() == {"plain_loss": 1.12345679, "plain_bpb": 2.12345679, "ttt_loss": 1.12345679, "ttt_bpb": 2.12345679,
                                    "num_tokens": 10, "num_bytes": 20}
    assert evaluation.timing(7.0) == {"seconds": 7.0, "plain_seconds": 2.0, "plain_tokens_per_second": 5.0, "ttt_seconds": 4.0,
                                      "ttt_tokens_per_second": 2.5}
