"""The benches of evaluate: what they measure is what they say, on shapes that take no time."""

import itertools
import math
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bench.evaluate
from bench.curve import COLORS, Point, Way, change, draw, find_front, list_ways, run_ways
from bench.evaluate import (
    Stopwatch,
    compare,
    make_stream,
    num_training_steps,
    project,
    run_once,
    run_protocol,
    score_straightforwardly,
    scoring_work,
    share_before_last_block,
)
from bench.tokenize import number
from lib.distributed import SINGLE_CPU
from lib.evaluation.adapter import training_work
from lib.evaluation.config import EvaluateParams, ScoreFirstParams
from lib.evaluation.evaluation import Outcome
from lib.evaluation.score import Forward
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.windows import Documents, sliding_windows
from lib.params import read_params
from lib.presets import load_settings
from tests.evaluation.tiny import EVALUATE, MODEL, make_model, make_params

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
WALL = Stopwatch(SINGLE_CPU, processor=False)


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.evaluate, "REPEATS", 1)


def one_document(num_targets: int) -> Documents:
    return Documents(np.array([0]), np.array([num_targets]))


def test_the_straightforward_scorer_gives_every_target_the_loss_in_its_own_window() -> None:
    model, params, stream = make_model(), make_params(), make_stream(41, MODEL["vocab_size"], CPU)
    expected = []
    for target in range(41):
        end = 8 if target < 8 else min(8 + 2 * math.ceil((target + 1 - 8) / 2), 41)
        start = 0 if target < 8 else 8 + 2 * math.ceil((target + 1 - 8) / 2) - 8
        logits = model.logits(stream[None, start:end].long())[0, target - start].detach()
        expected.append(-float(logits.double().log_softmax(-1)[stream[target + 1]]))
    for batch_tokens in (8, 32):
        found = score_straightforwardly(model, stream, sliding_windows(41, 8, 2), params, batch_tokens)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("stride", [4, 1])
def test_all_ways_to_score_agree(stride: int, capsys: pytest.CaptureFixture[str]) -> None:
    measured = compare(make_model(), make_params(stride_tokens=stride), WALL, 2, compiled=False)
    assert len(measured) == 3
    for each in measured.values():
        assert len(each.nats) == 8 + 2 * 4 * stride
        np.testing.assert_allclose(each.nats, next(iter(measured.values())).nats, atol=1e-5)
    assert capsys.readouterr().out.count("targets/s") == 3


def test_a_scorer_that_disagrees_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    score = bench.evaluate.score_with_lib
    monkeypatch.setattr(bench.evaluate, "score_with_lib", lambda *arguments: score(*arguments) * np.float32(1.00001))
    with pytest.raises(AssertionError, match="bpb differs by"):
        compare(make_model(), make_params(), WALL, 2, compiled=False)


def test_the_share_before_the_last_block_counts_every_batch_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(Stopwatch, "now", lambda _: float(next(ticks)))
    model, params, stream = make_model(), make_params(), make_stream(8 + 6 * 2, MODEL["vocab_size"], CPU)
    share = share_before_last_block(model, lambda: score_straightforwardly(model, stream, sliding_windows(20, 8, 2), params, 8), WALL)
    assert share == 7 / 15  # 7 windows with two looks at the clock each, and one more interval at either end
    next(ticks)
    model(stream[None, :8].long(), stream[None, 1:9].long())
    assert next(ticks) == 17, "the hooks are gone"


@pytest.mark.parametrize("kind", ["sliding", "one_pass"])
@pytest.mark.parametrize("num_targets", [16, 37, 96])
def test_one_process_scores_all_the_work(kind: str, num_targets: int) -> None:
    params = make_params(score_first={"windows": kind})
    num_trained = (math.ceil(num_targets / 16) - 1) * 16
    expected = STRATEGIES["score_first"].work(one_document(num_targets), params) - 2 * training_work(num_trained)
    assert scoring_work(num_targets, params, 1) == expected


def test_the_process_with_most_to_do_counts() -> None:
    params = make_params(stride_tokens=4, batch_tokens=16, score_first={"chunk_tokens": 24})  # batches of 2 windows
    assert scoring_work(24, params, 1) == 8 + 2 * 16
    assert scoring_work(24, params, 2) == 8 + 16
    assert scoring_work(24, params, 8) == 8  # fewer windows in a batch, so that each process has some
    assert scoring_work(48, params, 2) == 24 + 2 * 16  # 3 batches in the second chunk


def test_steps_are_those_of_the_record_and_of_the_entry() -> None:
    params = make_params(score_first={"epochs": 3, "batch_sequences": 2, "chunk_tokens": 24})
    stream = make_stream(100, MODEL["vocab_size"], CPU)
    outcome = run_once("score_first", Forward(make_model(), "fp32"), stream, one_document(100), params=params, process=SINGLE_CPU)
    assert num_training_steps(100, params) == sum(event.num_steps for event in outcome.events) == 4 * 3 * 2
    entry = load_settings("pr585", ROOT / "presets").evaluate
    assert num_training_steps(bench.evaluate.ENTRY_TOKENS, entry) == 473 * 3


@pytest.mark.parametrize("kind", ["sliding", "one_pass"])
def test_what_was_measured_is_projected_to_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = make_model(), make_params(score_first={"windows": kind})
    stream = make_stream(64, MODEL["vocab_size"], CPU)
    outcome = run_once("score_first", Forward(model, "fp32"), stream, one_document(64), params=params, process=SINGLE_CPU)
    monkeypatch.setattr(bench.evaluate, "ENTRY_TOKENS", 64)
    monkeypatch.setattr(bench.evaluate, "ENTRY_PROCESSES", 1)
    projection = project(outcome, model, params, params)
    assert projection.scoring == pytest.approx(outcome.seconds["scoring_seconds"])
    assert projection.training == pytest.approx(outcome.seconds["adaptation_seconds"])
    assert projection.all_reduce == 0
    monkeypatch.setattr(bench.evaluate, "ENTRY_PROCESSES", 2)
    trained = sum(parameter.numel() for name, parameter in model.named_parameters() if name.startswith("blocks.2.") or "scale" in name)
    projection, share = project(outcome, model, params, params), scoring_work(64, params, 2) / scoring_work(64, params, 1)
    assert projection.all_reduce == pytest.approx(6 * 4 * trained / 100e9)  # 3 chunks, 2 epochs, 1 step
    assert projection.training == pytest.approx(outcome.seconds["adaptation_seconds"])  # the steps are those of one process already
    assert projection.scoring == pytest.approx(share * outcome.seconds["scoring_seconds"])


def test_the_entry_is_projected_from_the_speed_of_the_slice() -> None:
    """8 times the tokens/s, where nothing waits: 4,096 windows in 128 batches on 8 processes."""
    entry = load_settings("pr585", ROOT / "presets").evaluate
    tokens = bench.evaluate.ENTRY_TOKENS
    assert scoring_work(tokens, entry, 8) == pytest.approx(scoring_work(tokens, entry, 1) / 8, rel=2e-4)
    assert scoring_work(tokens, entry, 1) == pytest.approx(tokens / 32 * 2048, rel=2e-4)


def test_the_protocol_prints_both_kinds_of_windows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench.evaluate, "ENTRY_TOKENS", 1_000_000)
    run_protocol(make_model(), make_params(), SINGLE_CPU, num_chunks=3, chunk_tokens=16)
    rows = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith(("sliding", "one_pass"))}
    assert rows.keys() == {"sliding", "one_pass"}
    for row in rows.values():
        scored, trained, peak, scoring, training, all_reduce, _, _ = (float(figure.replace(",", "")) for figure in row)
        assert min(scored, trained, peak, scoring, training) > 0
        assert training > all_reduce


def test_the_protocol_measures_the_share_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ScoreFirstParams] = []

    def record(*arguments: Any, params: EvaluateParams, **others: Any) -> Outcome:
        seen.append(params.score_first)
        return run_once(*arguments, params=params, **others)

    monkeypatch.setattr(bench.evaluate, "ENTRY_TOKENS", 1000)
    monkeypatch.setattr(bench.evaluate, "run_once", record)
    params = make_params(score_first={"batch_sequences": 16, "chunk_tokens": 128})
    run_protocol(make_model(), params, SINGLE_CPU, num_chunks=2, chunk_tokens=32)
    assert [settings.windows for settings in seen] == ["sliding", "sliding", "one_pass", "one_pass"]
    assert {(settings.chunk_tokens, settings.batch_sequences) for settings in seen} == {(32, 2)}


def test_a_slice_without_training_is_refused() -> None:
    with pytest.raises(ValueError, match="--chunks: expected at least 2, for the last one is not trained on, found 1"):
        run_protocol(make_model(), make_params(), SINGLE_CPU, num_chunks=1, chunk_tokens=16)


def test_every_way_changes_what_it_says() -> None:
    section = read_params(ROOT / "params.yaml")["evaluate"]
    ways = list_ways()
    assert len({(way.strategy, way.settings) for way in ways}) == len(ways)
    for way in ways:
        params = change(section, way)
        assert params.strategies == (way.strategy,)
        values: dict[str, Any] = params.model_dump()
        for key, value in way.changes.items():
            assert values[key] == (values[key] | value if isinstance(value, dict) else value)
            numbers = value.values() if isinstance(value, dict) else (value,)
            assert all(str(number) in way.settings for number in numbers)


def test_the_front_is_what_nothing_beats() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        points = [Point(Way("plain", str(n), {}), *map(float, generator.integers(0, 6, 2))) for n in range(12)]
        beaten = {p for p in range(12) for q in range(12) if points[q].seconds <= points[p].seconds and points[q].bpb <= points[p].bpb
                  and points[q][1:] != points[p][1:]}
        front = find_front(points)
        assert {point[1:] for point in front} == {points[n][1:] for n in set(range(12)) - beaten}
        assert [point.seconds for point in front] == sorted(point.seconds for point in front)


def test_ways_run_and_are_drawn(tmp_path: Path) -> None:
    model, stream = make_model(), make_stream(60, MODEL["vocab_size"], CPU)
    ways = [Way(name, name, {}) for name in ("plain", "sliding", "one_pass", "score_first", "lora", "phased")]
    points = run_ways(ways, lambda way: run_once(way.strategy, Forward(model, "fp32"), stream, one_document(60),
                                                 params=change(EVALUATE, way), process=SINGLE_CPU), np.full(60, 2), WALL, 2)
    assert [point.way for point in points] == ways
    assert all(point.seconds > 0 and point.bpb > 0 for point in points)
    draw(points, tmp_path / "curve.svg")
    text = (tmp_path / "curve.svg").read_text()
    styles = [element.get("style", "") for element in xml.etree.ElementTree.fromstring(text).iter() if element.tag.endswith("}use")]
    assert all(sum(f"fill: {color}" in style for style in styles) == 2 for color in COLORS.values())  # a point, and one in the legend
    assert all(f">{way.strategy}<" in text for way in ways)


def test_numbered_documents_are_all_different_and_as_long_as_asked_for() -> None:
    documents = list(number(["one", "two\n0", "two"], 30))
    assert len(set(documents)) == len(documents) == 8
    assert documents[:4] == ["one\n0", "two\n0\n0", "two\n0", "one\n1"]
