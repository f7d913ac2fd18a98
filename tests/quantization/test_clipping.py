from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lib.quantization.clipping import CLIP_RULES, clip_max, clip_mse, clip_percentile, clip_std
from tests.quantization.power_law import make_clip, make_weight

Array = npt.NDArray[Any]


def rounding_error(row: Array, clip: float, clip_range: int) -> float:
    """Squared distance of each weight to the nearest of all grid points, by comparing it with every one."""
    grid = np.arange(-clip_range, clip_range + 1) * (clip / clip_range)
    return float(np.square(row[:, None] - grid).min(axis=1).sum())


def best_clip(row: Array, candidates: Iterable[float], clip_range: int) -> float:
    return min(candidates, key=lambda clip: rounding_error(row, clip, clip_range))


def heavy_tailed(num_rows: int, num_columns: int) -> torch.Tensor:
    return make_weight(num_rows, num_columns) ** 3 * 1000


def test_max_is_the_largest_magnitude_of_each_row() -> None:
    assert clip_max(torch.tensor([[0.5, -3.0], [0.0, 0.0]]), 15, make_clip()).tolist() == [3.0, 0.0]


def test_std_is_a_multiple_of_the_deviation_about_the_mean() -> None:
    weight = make_weight(6, 100) + 0.02
    values = weight.double().numpy()
    expected = 2.5 * np.sqrt(np.square(values - values.mean(axis=1, keepdims=True)).sum(axis=1) / 99)
    assert clip_std(weight[:, :1], 15, make_clip()).tolist() == [0.0] * 6
    np.testing.assert_allclose(clip_std(weight, 15, make_clip(num_std=2.5)), expected, rtol=1e-5)


@pytest.mark.parametrize("clip_range", [1, 15, 127])
def test_mse_is_the_best_fraction_of_the_maximum(clip_range: int) -> None:
    weight = heavy_tailed(12, 40)
    found = clip_mse(weight, clip_range, make_clip(num_candidates=20))
    for row, clip in zip(weight.double().numpy(), found.tolist(), strict=True):
        candidates = [np.abs(row).max() * k / 20 for k in range(1, 21)]
        assert clip == pytest.approx(best_clip(row, candidates, clip_range), rel=1e-5)
    assert clip_range > 1 or len({round(c / m, 2) for c, m in zip(found.tolist(), weight.abs().amax(1).tolist(), strict=True)}) > 2


@pytest.mark.parametrize("num_columns", [1, 2, 97])
def test_percentile_is_the_best_quantile(num_columns: int) -> None:
    weight, percentiles = heavy_tailed(12, num_columns), (0.3, 0.9, 0.95, 1.0)
    found = clip_percentile(weight, 7, make_clip(percentiles=percentiles))
    for row, clip in zip(weight.double().numpy(), found.tolist(), strict=True):
        assert clip == pytest.approx(best_clip(row, np.quantile(np.abs(row), percentiles).tolist(), 7), rel=1e-5)


@pytest.mark.parametrize("rule", CLIP_RULES)
def test_rules_scale_with_the_row_and_keep_rows_apart(rule: str) -> None:
    weight, factors = make_weight(4, 64), torch.tensor([1.0, 2.0, 1 / 1024, 64.0])
    clips = CLIP_RULES[rule](weight, 15, make_clip())
    assert torch.equal(CLIP_RULES[rule](weight * factors[:, None], 15, make_clip()), clips * factors)
    assert torch.equal(CLIP_RULES[rule](weight[[2]], 15, make_clip()), clips[[2]])


@pytest.mark.parametrize("rule", CLIP_RULES)
def test_rows_of_zeros_have_the_clip_zero(rule: str) -> None:
    assert CLIP_RULES[rule](torch.zeros(2, 8), 15, make_clip()).tolist() == [0.0, 0.0]
