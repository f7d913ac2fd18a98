import math

import numpy as np
import pytest

from lib.forecast.operating_point import Direction, Point, fit_direction

N0, LOSS, VALUE, SCALE, RATE, DILUTION = 1_000_000, 3.0, 0.15, 1.5, 2.2, 0.4


def make_points(num_weights: int, noise: float = 0.0) -> list[Point]:
    """A model at five sizes, as the formulas have it."""
    growth, signs = num_weights / N0, (1, -1, 1, -1, 1)
    return [Point(num_weights, num_bytes, LOSS - VALUE * math.log(growth),
                  SCALE * 2 ** (-RATE * 8 * num_bytes / num_weights) / growth**DILUTION * math.exp(sign * noise))
            for num_bytes, sign in zip((200_000, 250_000, 300_000, 350_000, 400_000), signs, strict=True)]


def test_the_fit_recovers_what_the_points_were_made_with() -> None:
    found = fit_direction(make_points(N0), make_points(1_700_000))
    assert found == pytest.approx((N0, LOSS, VALUE, SCALE, RATE, DILUTION, 0.0), rel=1e-9, abs=1e-9)


def test_the_residual_is_that_of_the_logarithm() -> None:
    found = fit_direction(make_points(N0, noise=0.1), make_points(1_700_000, noise=0.1))
    assert 0.09 < found.residual <= 0.1
    assert found.rate == pytest.approx(RATE, rel=0.05)


@pytest.mark.parametrize("num_bytes", [250_000, 400_000, 600_000])
def test_the_best_size_is_that_of_a_search_by_brute_force_and_costs_what_it_is_worth(num_bytes: int) -> None:
    direction = fit_direction(make_points(N0), make_points(1_700_000))
    sizes = np.arange(500_000, 4_000_000, 1000)
    losses = [LOSS - VALUE * math.log(n / N0) + SCALE * 2 ** (-RATE * 8 * num_bytes / n) * (n / N0) ** -DILUTION for n in sizes]
    best = min((direction.predict(int(n), num_bytes) for n in sizes), key=lambda point: point.loss)
    assert best.num_weights == sizes[np.argmin(losses)]
    assert sizes[0] < best.num_weights < sizes[-1]
    assert best.loss == pytest.approx(min(losses))
    assert best.kl * (RATE * best.bits * math.log(2) - DILUTION) == pytest.approx(VALUE, rel=0.01)


def test_more_weights_that_are_worth_nothing_never_pay() -> None:
    direction = Direction(N0, LOSS, 0.0, SCALE, RATE, 0.0, 0.0)
    losses = [direction.predict(size, 400_000).loss for size in (500_000, N0, 2_000_000)]
    assert losses == sorted(losses)
