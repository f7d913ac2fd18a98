from typing import Any, get_args

import pytest

from lib.evaluation.adapter import OPTIMIZERS
from lib.evaluation.config import AdaptationParams, EvaluateParams, LayerName, ScoreFirstParams, StrategyName
from lib.evaluation.lora import adapted_layers
from lib.evaluation.strategies import CHUNK_WINDOWS, STRATEGIES
from lib.params import ParamsError, parse_params
from tests.evaluation.tiny import EVALUATE, make_model, make_params


def test_every_name_that_the_file_may_hold_is_registered() -> None:
    assert set(get_args(StrategyName)) == set(STRATEGIES)
    assert set(get_args(AdaptationParams.model_fields["optimizer"].annotation)) == set(OPTIMIZERS)
    assert set(get_args(ScoreFirstParams.model_fields["windows"].annotation)) == CHUNK_WINDOWS.keys() <= STRATEGIES.keys()
    assert adapted_layers(make_model(), get_args(LayerName))


def test_what_works_is_accepted() -> None:
    assert make_params(stride_tokens=8).stride_tokens == 8
    assert make_params(stride_tokens=3).stride_tokens == 3  # no divisor of window_tokens
    assert make_params(score_first={"lr": 0.0, "trainable": ["last_12_blocks", "all"]}).score_first.trainable == ("last_12_blocks", "all")
    assert make_params(lora={"chunk_tokens": 8, "adam_betas": [0.0, 0.0]}).lora.chunk_tokens == 8


SECTIONS = ("score_first", "phased", "two_phase.recalibration", "two_phase.selective")


def nested(section: str, changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` of a section with a dotted name, as changes of ``evaluate``."""
    for key in reversed(section.split(".")):
        changes = {key: changes}
    return changes


@pytest.mark.parametrize(("changes", "message"), [
    ({"stride_tokens": 9}, r"evaluate.stride_tokens: expected at most window_tokens 8, found 9"),
    ({"stride_tokens": 0}, r"evaluate.stride_tokens: .*found 0"),
    ({"window_tokens": 0}, r"evaluate.window_tokens: .*found 0"),
    ({"segment_tokens": 0}, r"evaluate.segment_tokens: .*found 0"),
    ({"batch_tokens": 0}, r"evaluate.batch_tokens: .*found 0"),
    ({"precision": "fp16"}, r"evaluate.precision: .*found \"fp16\""),
    ({"compile": 1}, r"evaluate.compile: .*found 1"),
    ({"limit_seconds": 0}, r"evaluate.limit_seconds: .*found 0"),
    ({"when_late": "stop"}, r"evaluate.when_late: .*found \"stop\""),
    ({"audit": "yes"}, r"evaluate.audit: .*found \"yes\""),
    ({"stride": 3}, r"evaluate.stride: unknown key"),
    ({"strategies": []}, r"evaluate.strategies: .*found \[\]"),
    ({"strategies": ["plain", "plain"], "strategy": "plain"}, r"evaluate.strategies: expected each name once, found plain, plain"),
    ({"strategies": ["ttt"]}, r"evaluate.strategies.0: .*found \"ttt\""),
    ({"strategy": "ttt"}, r"evaluate.strategy: .*found \"ttt\""),
    ({"strategies": ["plain", "lora"]}, r"evaluate.strategy: expected one of strategies plain, lora, found score_first"),
    *[({"strategy": name}, rf"evaluate.strategy: expected one that scores text before it trains on later text, found {name}")
      for name in ("longest_first", "two_phase")],
    ({"score_first": {"chunk_tokens": 20}}, r"evaluate.score_first.chunk_tokens: expected a multiple of window_tokens 8, found 20"),
    ({"score_first": {"chunk_tokens": 4}}, r"evaluate.score_first.chunk_tokens: expected a multiple of window_tokens 8, found 4"),
    ({"score_first": {"windows": "plain"}}, r"evaluate.score_first.windows: .*found \"plain\""),
    ({"phased": {"documents": 0}}, r"evaluate.phased.documents: .*found 0"),
    *[({"phased": {"boundaries": found}}, r"evaluate.phased.boundaries: expected ascending numbers of documents, .*found \[")
      for found in ([], [2, 2], [3, 1])],
    ({"phased": {"boundaries": [0, 2]}}, r"evaluate.phased.boundaries.0: .*found 0"),
    ({"phased": {"chunk_tokens": 16}}, r"evaluate.phased.chunk_tokens: unknown key"),
    ({"two_phase": {"selective": {"drop_last": 1}}}, r"evaluate.two_phase.selective.drop_last: .*found 1"),
    ({"lora": {"chunk_tokens": 9}}, r"evaluate.lora.chunk_tokens: expected at most window_tokens 8, found 9"),
    ({"lora": {"layers": ["query", "value", "query"]}}, r"evaluate.lora.layers: expected each name once, found query, value, query"),
    ({"lora": {"layers": []}}, r"evaluate.lora.layers: .*found \[\]"),
    ({"lora": {"layers": ["q"]}}, r"evaluate.lora.layers.0: .*found \"q\""),
    ({"lora": {"adam_betas": [0.9]}}, r"evaluate.lora.adam_betas.1: missing"),
    ({"lora": {"adam_betas": [0.9, 1.0]}}, r"evaluate.lora.adam_betas.1: .*found 1.0"),
    ({"lora": {"adam_betas": [-0.1, 0.5]}}, r"evaluate.lora.adam_betas.0: .*found -0.1"),
    ({"lora": {"lr": -0.1}}, r"evaluate.lora.lr: .*found -0.1"),
    *[({"lora": {key: 0}}, rf"evaluate.lora.{key}: .*found 0")
      for key in ("rank", "alpha", "window_tokens", "chunk_tokens", "steps", "adam_eps", "warm_start", "batch_documents")],
    *[(nested(section, {key: value}), rf"evaluate.{section}.{key}: .*found {found}") for section in SECTIONS for key, value, found in [
        ("epochs", 0, "0"), ("lr", -1e-4, "-0.0001"), ("lr_schedule", "linear", '"linear"'), ("optimizer", "adam", '"adam"'),
        ("momentum", 1.0, "1.0"), ("weight_decay", -0.1, "-0.1"), ("grad_clip", 0.0, "0.0"), ("batch_sequences", 0, "0"),
        ("trainable", [], r"\[\]")]],
    *[(nested(section, {"trainable": ["scales", "norm"]}),
       rf"evaluate.{section}.trainable: expected names among scales, .*last_N_blocks, found norm") for section in SECTIONS],
])
def test_what_cannot_work_is_refused_with_the_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match="^" + message):
        make_params(**changes)


@pytest.mark.parametrize("key", ["strategy", "segment_tokens", "batch_tokens", "when_late", "audit", "lora", "phased", "two_phase"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ParamsError, match=f"^evaluate.{key}: missing"):
        parse_params({name: value for name, value in EVALUATE.items() if name != key}, EvaluateParams, "evaluate.")
