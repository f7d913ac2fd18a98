
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evaluation.windows import plain_windows, sliding_windows, split_batches


def slide_by_hand(num_targets: int, window: int, stride: int) -> list[tuple[int, int, int]]:
    """The definition of the reference systems, one window after the other."""
    windows, done = [], 0
    for start in range(0, num_targets, stride):
        end = min(start + window, num_targets)
        windows.append((start, end - start, end - done))
        done = end
        if end == num_targets:
            break
    return windows


@given(st.integers(1, 200), st.integers(1, 40), st.data())
def test_sliding_windows_are_those_of_the_definition(num_targets: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    windows = sliding_windows(num_targets, window, stride)
    assert list(zip(*(array.tolist() for array in windows), strict=True)) == slide_by_hand(num_targets, window, stride)
    scored = [t for first, end in zip(windows.first_scored, windows.end, strict=True) for t in range(first, end)]
    assert scored == list(range(num_targets))  # each once, in order, the tail included
    for start, first in zip(windows.start, windows.first_scored, strict=True):
        assert first - start >= min(first, window - stride)  # context of the first scored target
    assert windows.length.max() <= window


@given(st.integers(1, 200), st.integers(1, 40))
def test_plain_windows_lie_side_by_side(num_targets: int, window: int) -> None:
    windows = plain_windows(num_targets, window)
    assert windows.start.tolist() == list(range(0, num_targets, window))
    assert (windows.num_scored == windows.length).all()
    assert windows.length.sum() == num_targets


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 9), st.data())
def test_batches_hold_all_windows_in_order_and_one_shape_each(num_targets: int, window: int, batch: int, data: st.DataObject) -> None:
    windows = sliding_windows(num_targets, window, data.draw(st.integers(1, window)))
    batches = split_batches(windows, batch)
    for n in range(3):
        assert np.array_equal(np.concatenate([part[n] for part in batches]), windows[n])
    for part in batches:
        assert 1 <= len(part.start) <= batch
        assert len(set(part.length.tolist())) == len(set(part.num_scored.tolist())) == 1
    num_shapes = len(set(zip(windows.length.tolist(), windows.num_scored.tolist(), strict=True)))
    assert len(batches) <= len(windows.start) // batch + num_shapes  # full wherever possible


def test_the_challenge_s_62_million_tokens_at_stride_32() -> None:
    windows = sliding_windows(62_021_845, 2048, 32)
    assert len(windows.start) == 1 + -(-(62_021_845 - 2048) // 32)
    assert windows.num_scored.sum() == 62_021_845


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_outside_the_window_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to window_tokens 8"):
        sliding_windows(20, 8, stride)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        plain_windows(0, 8)
