import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.reporting.config import RecordParams
from lib.reporting.statistics import RecordTest, compare_with_record
from lib.reporting.table import Row

RECORD = RecordParams(loss=1.125, margin=0.005, p_value=0.01)


def compare(*losses: float, record: RecordParams = RECORD) -> RecordTest:
    return compare_with_record(Row("loss", losses, 4), record)


def test_three_seeds_against_the_closed_form() -> None:
    """With 2 degrees of freedom P(T < t) = 1/2 + t / (2 sqrt(2 + t^2)), and its inverse is 2 a sqrt(2 / (4 q (1 - q))), a = q - 1/2."""
    losses = (1.1102, 1.1115, 1.1098)
    mean = sum(losses) / 3
    std = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 2)
    t = (mean - 1.12) / (std / math.sqrt(3))
    quantile = 2 * (0.99 - 0.5) * math.sqrt(2 / (4 * 0.99 * 0.01))
    found = compare(*losses)
    assert found.mean == pytest.approx(mean, rel=1e-12)
    assert found.std == pytest.approx(std, rel=1e-9)
    assert found.t == pytest.approx(t, rel=1e-9)
    assert found.p == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-6)
    assert found.bound == pytest.approx(mean + quantile * std / math.sqrt(3), rel=1e-9)
    assert found.verdict == "beats the record by at least 0.005 nats at p < 0.01"


def test_two_seeds_against_the_closed_form() -> None:
    """With 1 degree of freedom P(T < t) = 1/2 + atan(t) / pi; the margin alone decides here."""
    found = compare(1.119, 1.120)
    assert found.t == pytest.approx(-1)
    assert found.p == pytest.approx(0.25)
    assert found.bound == pytest.approx(1.1195 + 0.0005 * math.tan(0.49 * math.pi))
    assert found.verdict == "does not beat the record by at least 0.005 nats at p < 0.01"
    assert compare(1.119, 1.120, record=RecordParams(loss=1.125, margin=0.0, p_value=0.04)).verdict == "beats the record at p < 0.04"


@given(st.lists(st.floats(1.0, 1.3).map(lambda loss: round(loss, 8)), min_size=2, max_size=8, unique=True))
def test_the_record_is_beaten_where_the_bound_is_below_it_by_the_margin(losses: list[float]) -> None:
    found = compare(*losses)
    assert found.bound is not None
    if abs(found.bound - 1.12) > 1e-9:
        assert found.verdict.startswith("beats") == (found.bound < 1.12)


@pytest.mark.parametrize(("losses", "verdict"), [
    ((1.1,), "needs at least two seeds"),
    ((1.1, 1.1, 1.1), "cannot be tested, all seeds have the same loss"),
    ((1.2, 1.2), "cannot be tested, all seeds have the same loss"),
])
def test_without_a_deviation_there_is_no_test(losses: tuple[float, ...], verdict: str) -> None:
    found = compare(*losses)
    assert (found.verdict, found.mean, found.t, found.p, found.bound) == (verdict, losses[0], None, None, None)
    assert (found.headline, found.evidence) == (f"record of 1.1250 nats per token: {verdict}", "")


def test_without_a_record_there_is_nothing_to_say() -> None:
    found = compare(1.1, 1.2, record=RecordParams(loss=None, margin=0.005, p_value=0.01))
    assert (found.figures(), found.headline, found.evidence) == ({"verdict": "no record stated"}, "no record stated", "")


def test_figures_and_evidence_hold_the_same_numbers() -> None:
    found = compare(1.119, 1.120)
    assert found.figures() == {"verdict": found.verdict, "record": 1.125, "mean": 1.1195, "std": 0.00070710678, "t": -1.0, "p": 0.25,
                               "bound": 1.1354103}
    assert found.evidence == "mean 1.1195, std 0.0007, t = -1.00, p = 0.25, true mean below 1.1354 with 0.99 confidence"
