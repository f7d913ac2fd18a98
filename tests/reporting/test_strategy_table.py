from typing import Any

import pytest

from lib.reporting.strategy_table import find_strategies, format_strategies
from tests.reporting.results import BPB, STRATEGY_SECONDS, make_metrics

LEGAL = dict.fromkeys(BPB, True)


def test_several_seeds_have_mean_and_deviation_and_differences_of_means() -> None:
    metrics = [make_metrics(number)["evaluate"] for number in (0, 1, 5)]
    assert format_strategies(metrics, LEGAL) == """\
strategy        bpb     std  to sliding  legal
plain        1.7400  0.0265     +0.0400  yes
sliding      1.7000  0.0265              yes
one_pass     1.6900  0.0265     -0.0100  yes
score_first  1.6700  0.0265     -0.0300  yes
lora         1.6600  0.0265     -0.0400  yes
two_phase    1.6200  0.0265     -0.0800  no: trains before scoring"""


def test_times_stand_to_the_right_of_lines_that_they_do_not_change() -> None:
    metrics = [make_metrics(number)["evaluate"] for number in (0, 1)]
    slower = {key: 2 * value for key, value in STRATEGY_SECONDS.items()}
    without, with_times = (format_strategies(metrics, LEGAL, timings).splitlines() for timings in (None, [STRATEGY_SECONDS, slower]))
    assert all(line.startswith(start) for start, line in zip(without, with_times, strict=True))
    assert [line[len(without[-1]):].split() for line in with_times[4:]] == [
        ["31.5", "scoring", "9.0,", "adaptation", "22.5"], ["13.5"], ["45.0"]]  # means of both seeds


def test_a_seed_from_the_cache_has_no_times() -> None:
    metrics = [make_metrics(number)["evaluate"] for number in (0, 1)]
    for line in format_strategies(metrics, LEGAL, [STRATEGY_SECONDS, None]).splitlines()[1:]:
        assert line.endswith("-  from cache")


@pytest.mark.parametrize(("name", "legal", "adapts", "label"), [
    ("sliding", True, False, "sliding"), ("score_first", True, True, "score_first"), ("two_phase", False, True, "two_phase (not legal)")])
def test_what_a_strategy_is(name: str, legal: bool, adapts: bool, label: str) -> None:
    strategy = next(each for each in find_strategies([make_metrics(0)["evaluate"]], LEGAL) if each.name == name)
    assert (strategy.legal, strategy.adapts, strategy.label) == (legal, adapts, label)


@pytest.mark.parametrize(("verdicts", "expected"), [
    ({}, ["not checked", "not checked"]), ({"plain": True, "lora": None}, ["yes", "not checked"]),
    ({"plain": None, "lora": False, "two_phase": True}, ["not checked", "no"])])
def test_a_score_that_was_not_checked_is_neither_legal_nor_not(verdicts: dict[str, Any], expected: list[str]) -> None:
    lines = format_strategies([make_metrics(0, ("plain", "lora", "two_phase"))["evaluate"]], verdicts).splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [*expected, "no: trains before scoring"]


def test_epochs_that_were_left_out_are_told() -> None:
    metrics = [make_metrics(0)["evaluate"] | {"score_first_epochs": epochs} for epochs in (1.0, 2.0)]
    line = next(line for line in format_strategies(metrics, LEGAL).splitlines() if line.startswith("score_first"))
    assert line.endswith("yes: 1.5 epochs, as the time allowed")


def test_what_a_tilt_saves_is_told() -> None:
    metrics = [make_metrics(0)["evaluate"] | {"score_first_tilt_gain": gain, "score_first_tilted_targets": 9} for gain in (0.01, 0.02)]
    line = next(line for line in format_strategies(metrics, LEGAL).splitlines() if line.startswith("score_first"))
    assert line.endswith("yes: tilt -0.0150 nats")
