from typing import Any, get_args

import pytest

from lib.evaluation.config import ScoreFirstParams, StrategyName
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.ttt import OPTIMIZERS
from lib.params import ParamsError
from tests.evaluation.tiny import make_params


def test_every_name_that_the_file_may_hold_is_registered() -> None:
    assert set(get_args(StrategyName)) == set(STRATEGIES)
    assert set(get_args(ScoreFirstParams.model_fields["optimizer"].annotation)) == set(OPTIMIZERS)


@pytest.mark.parametrize(("changes", "message"), [
    ({"stride_tokens": 3}, r"evaluate.stride_tokens: expected a divisor of window_tokens 8, found 3"),
    ({"score_first": {"chunk_tokens": 20}}, r"evaluate.score_first.chunk_tokens: expected a multiple of window_tokens 8, found 20"),
    ({"score_first": {"chunk_tokens": 4}}, r"expected a multiple of window_tokens 8, found 4"),
    ({"score_first": {"trainable": ["norm"]}}, r"evaluate.score_first.trainable: expected names among scales, .*last_N_blocks, found norm"),
    ({"score_first": {"trainable": []}}, r"evaluate.score_first.trainable: "),
    ({"strategies": ["plain", "plain"]}, r"evaluate.strategies: expected each name once"),
    ({"strategies": ["two_phase"]}, r"evaluate.strategies.0: .*found \"two_phase\""),
    ({"limit_seconds": 0}, r"evaluate.limit_seconds: "),
])
def test_what_cannot_work_is_refused_with_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_params(**changes)
