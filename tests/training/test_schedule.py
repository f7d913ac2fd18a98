"""Schedules at the published points."""

import pytest

from lib.training.schedule import lr_multiplier, muon_momentum, part_tokens


@pytest.mark.parametrize(("step", "expected"), [(0, 1.0), (2600, 1.0), (2601, 3499 / 3500), (4350, 0.5), (6099, 1 / 3500)])
def test_pr585_warmdown(step: int, expected: float) -> None:
    """3,500 of 6,100 steps."""
    assert lr_multiplier(step / 6100, 3500 / 6100, 0.0) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.92), (750, 0.955), (1500, 0.99), (6099, 0.99)])
def test_pr585_momentum(step: int, expected: float) -> None:
    """From 0.92 to 0.99 over 1,500 of 6,100 steps."""
    assert muon_momentum(step / 6100, 0.92, 0.99, 1500 / 6100) == pytest.approx(expected)


@pytest.mark.parametrize(("fraction", "expected"),
                         [(0.0, 1.0), (0.15, 1.0), (0.5, 0.5 / 0.85), (0.9, 0.1 / 0.85), (0.915, 0.1), (1.0, 0.1)])
def test_pr1855_warmdown_ends_at_a_floor(fraction: float, expected: float) -> None:
    """1 until 15 % of the time, then (1 - f) / .85, from .915 on .1."""
    assert lr_multiplier(fraction, 0.85, 0.1) == pytest.approx(expected)


def test_without_warmup_and_warmdown_all_is_constant() -> None:
    assert lr_multiplier(0.999, 0.0, 0.0) == 1.0
    assert muon_momentum(0.0, 0.5, 0.9, 0.0) == 0.9


def test_the_multiplier_never_leaves_its_range() -> None:
    assert all(0 < lr_multiplier(n / 1000, warmdown, 0.0) <= 1 for n in range(1000) for warmdown in (0.01, 0.5, 1.0))


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 1024), (0.0999, 1024), (0.1, 2048), (0.6999, 2048), (0.7, 3072), (1.0, 3072)])
def test_pr2014_context_grows(fraction: float, expected: int) -> None:
    """1024 until 10 % of the time, 2048 until 70 %, then 3072."""
    assert part_tokens(fraction, [(0.1, 1024), (0.7, 2048)], 3072) == expected
    assert part_tokens(fraction, [], 3072) == 3072
