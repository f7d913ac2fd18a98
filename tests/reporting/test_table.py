import pytest

from lib.reporting.table import Row, align, column_names, difference, ratio


def test_cells_end_with_mean_and_deviation_where_there_are_several_seeds() -> None:
    assert Row("", (1.0, 2.0, 6.0), 1).cells() == ["1.0", "2.0", "6.0", "3.0", "2.6"]
    assert Row("", (1.0, None), 1).cells() == ["1.0", "-", "-", "-"]
    assert Row("", (1234.5,), 0).cells() == ["1,234"]
    assert len(column_names([1, 2, 3])) == len(Row("", (1.0, 2.0, 6.0), 1).cells())


def test_mean_and_deviation_are_those_of_a_sample() -> None:
    values = (1.5, 2.0, 6.25)
    row = Row("", values, 4)
    assert row.mean == pytest.approx(sum(values) / 3)
    assert row.std == pytest.approx((sum((value - sum(values) / 3) ** 2 for value in values) / 2) ** 0.5)
    assert row.statistics_cells() == ["3.2500", "2.6101"]
    assert Row("", (1.5,), 4).statistics_cells() == ["1.5000"]


def test_differences_and_ratios_are_of_means_and_empty_without_them() -> None:
    low, high, missing = Row("", (1.0, 2.0), 1), Row("", (2.0, 4.0), 1), Row("", (1.0, None), 1)
    assert (difference(low, high), difference(high, low)) == ("-1.5000", "+1.5000")
    assert ratio(low, high, "{:.0%} of it") == "50% of it"
    assert (difference(low, missing), difference(missing, low), ratio(low, missing, "{}"), ratio(missing, low, "{}")) == ("", "", "", "")


def test_columns_are_aligned_at_their_sides_and_lines_end_without_blanks() -> None:
    assert align([["a", "bb", "c"], ["aaa", "b", ""]], "lrl") == "a    bb  c\naaa   b"
