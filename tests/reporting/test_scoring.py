import math
import random
from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError
from lib.reporting.scoring import (
    context_curves,
    differences,
    document_bins,
    document_curves,
    join_bins,
    line_styles,
    running_curves,
)
from lib.reporting.strategy_table import StrategyRow, find_strategies
from tests.reporting.results import BPB, DOCUMENTS, make_metrics, write_evaluation

FOLDERS = [Path("artifacts/evaluate/seed1"), Path("artifacts/evaluate/seed2")]


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_evaluation(1, 0)
    write_evaluation(2, 4)


def strategies() -> list[StrategyRow]:
    return find_strategies([make_metrics(0)["evaluate"]], {})


def test_every_strategy_has_a_curve_that_is_the_mean_over_the_seeds() -> None:
    curves = running_curves(FOLDERS, strategies())
    assert list(curves) == ["plain", "sliding", "one_pass", "score_first", "lora", "two_phase (not legal)"]
    assert curves["lora"][9] == pytest.approx((20000, 1.64 + 0.04 / 2 + (math.sin(10) + math.sin(10 + 4)) / 2 / 10))


def test_differences_are_at_the_same_place() -> None:
    for name, curve in differences(running_curves(FOLDERS, strategies())).items():
        assert [y for _, y in curve] == pytest.approx([BPB[name.split(" ")[0]] - BPB["sliding"]] * 200, abs=1e-7)
    assert differences({"plain": [(1.0, 2.0)]}) == {}


def test_joined_bins_keep_every_loss_and_have_two_points_for_each_doubling() -> None:
    points = join_bins([{"context": n, "tokens": 10.0, "loss": float(n)} for n in range(64)])
    assert [x for x, _ in points] == [1, 2, 4, 5, 8, 11, 16, 22, 32, 45, 64]  # sqrt(2)^n, rounded down; 3 is in the bin up to 4
    assert points[-1][1] == pytest.approx(sum(range(45, 64)) / 19)
    assert points[2][1] == pytest.approx((2 + 3) / 2)


def test_bins_with_few_targets_wait_for_more() -> None:
    generator = random.Random(0)
    bins = [{"context": 8 * n + 7, "tokens": float(generator.choice([1, 1, 5000])), "loss": generator.uniform(2, 4)} for n in range(32)]
    bins[-1]["tokens"] = 5000.0  # nothing is left over
    points, total, start = join_bins(bins), 0.0, 0.0
    for x, y in points:
        members = [each for each in bins if start <= each["context"] < x]
        tokens = sum(each["tokens"] for each in members)
        assert tokens >= 0.01 * sum(each["tokens"] for each in bins)
        assert y == pytest.approx(sum(each["tokens"] * each["loss"] for each in members) / tokens)
        total, start = total + tokens, x
    assert total == sum(each["tokens"] for each in bins)
    assert join_bins([*bins, {"context": 10**6, "tokens": 1.0, "loss": 99.0}]) == points  # a few at the end tell nothing


def test_context_is_read_from_the_table_of_the_strategy() -> None:
    curves = context_curves(FOLDERS, strategies())
    assert curves["plain"][0] == pytest.approx((8, 2 + (1.72 + 1.76) / 2))


def test_lengths_of_documents_have_means_over_seeds() -> None:
    bins = document_bins(FOLDERS, strategies())
    assert [each[:3] for each in bins] == DOCUMENTS
    assert bins[1].bpb["sliding"] == pytest.approx(1.68 + 0.02 + 0.2)
    assert document_curves(bins)["sliding"] == [(256, bins[0].bpb["sliding"]), (4096, bins[1].bpb["sliding"])]


def test_line_styles_tell_what_a_score_is() -> None:
    styles = line_styles(strategies())
    assert {name: styles[name] for name in ("plain", "lora", "two_phase (not legal)")} == {
        "plain": ":", "lora": "-", "two_phase (not legal)": "--"}


@pytest.mark.parametrize(("text", "message"), [
    ("context,loss\n", "no column tokens"), ("context,tokens,loss\n7,many,2.5\n", r"expected numbers \(could not convert")])
def test_a_damaged_table_is_an_error_with_its_path(text: str, message: str) -> None:
    (FOLDERS[0] / "context/lora.csv").write_text(text)
    with pytest.raises(ArtifactError, match=rf"artifacts/evaluate/seed1/context/lora.csv: {message}"):
        context_curves(FOLDERS, strategies())
