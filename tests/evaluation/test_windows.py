import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.evaluation.windows import (
    Windows,
    batch_size,
    find_documents,
    one_pass_windows,
    plain_windows,
    sliding_windows,
    split_batches,
)

BOS = 1


def as_tuples(windows: Windows) -> list[tuple[int, int, int]]:
    return list(zip(windows.start.tolist(), windows.length.tolist(), windows.num_scored.tolist(), strict=True))


def starts_by_target(windows: Windows) -> list[tuple[int, int]]:
    """(target, first input of the window that scores it), in the order of scoring."""
    return [(target, start) for start, length, num_scored in as_tuples(windows)
            for target in range(start + length - num_scored, start + length)]


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
    assert as_tuples(windows) == slide_by_hand(num_targets, window, stride)
    assert windows.work == sum(length for _, length, _ in as_tuples(windows))
    assert windows.length.max() <= window
    assert windows.attention_tokens is None
    assert all(array.dtype == np.int64 for array in windows[:3])


@given(st.integers(0, 100), st.integers(1, 100), st.integers(1, 40), st.data())
def test_targets_from_any_on_are_scored_once_in_order_by_the_window_of_their_stride(
        first: int, num_targets: int, window: int, data: st.DataObject) -> None:
    stride, end = data.draw(st.integers(1, window)), first + num_targets
    expected = []
    for target in range(first, end):
        begin = first + (target - first) // stride * stride  # of the S targets scored together
        expected.append((target, 0 if first == 0 and target < window else max(0, begin + stride - window)))
    if first == 0:  # the strides begin after the first window
        expected[window:] = [(target, (target - window) // stride * stride + stride) for target in range(window, end)]
    assert starts_by_target(sliding_windows(end, window, stride, first=first)) == expected


@given(st.integers(0, 60), st.integers(1, 80), st.integers(0, 80), st.integers(1, 40), st.data())
def test_what_a_target_sees_does_not_depend_on_the_end(first: int, num_targets: int, more: int, window: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, window))
    make: Callable[[int], Windows] = data.draw(st.sampled_from([
        lambda end: sliding_windows(end, window, stride, first=first), lambda end: one_pass_windows(end, window, stride, first=first)]))
    short, long = make(first + num_targets), make(first + num_targets + more)
    assert starts_by_target(short) == starts_by_target(long)[:num_targets]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(1, 150))
def test_chunks_of_whole_strides_give_each_target_the_context_of_one_sweep(
        stride: int, strides_per_window: int, strides_per_chunk: int, num_targets: int) -> None:
    window, chunk = stride * strides_per_window, stride * strides_per_chunk
    parts = [sliding_windows(min(first + chunk, num_targets), window, stride, first=first) for first in range(0, num_targets, chunk)]
    sweep = sliding_windows(num_targets, window, stride)
    assert [pair for part in parts for pair in starts_by_target(part)] == starts_by_target(sweep)
    if chunk % window == 0:  # then they are even the same windows
        assert [each for part in parts for each in as_tuples(part)] == as_tuples(sweep)


@given(st.integers(1, 200), st.integers(1, 40))
def test_plain_windows_lie_side_by_side(num_targets: int, window: int) -> None:
    windows = plain_windows(num_targets, window)
    assert windows.start.tolist() == list(range(0, num_targets, window))
    assert (windows.num_scored == windows.length).all()
    assert windows.work == num_targets


@given(st.integers(0, 60), st.integers(1, 150), st.integers(1, 30), st.integers(1, 60))
def test_segments_of_one_pass_start_with_what_their_first_target_attends_to(
        first: int, num_targets: int, attention: int, segment: int) -> None:
    end = first + num_targets
    windows = one_pass_windows(end, attention, segment, first=first)
    expected, done = [], first
    while done < end:
        until = min(end, done + segment + (attention if done == 0 else 0))  # before the first one there is nothing to see
        start = max(0, done - attention)
        expected.append((start, until - start, until - done))
        done = until
    assert as_tuples(windows) == expected
    assert windows.attention_tokens == attention
    for target, start in starts_by_target(windows):
        assert target - start >= min(target, attention - 1)  # it and the inputs before it that it attends to


@given(st.lists(st.tuples(st.sampled_from([(2, 1), (8, 1), (8, 8), (30, 8)]), st.integers(1, 9)), min_size=1, max_size=6),
       st.none() | st.just(5), st.integers(1, 70))
def test_batches_hold_all_windows_in_order_and_one_shape_each(
        shapes: list[tuple[tuple[int, int], int]], attention_tokens: int | None, tokens: int) -> None:
    length, num_scored = np.array([shape for shape, count in shapes for _ in range(count)]).T
    windows = Windows(np.arange(len(length)), length, num_scored, attention_tokens)
    batches = split_batches(windows, tokens)
    assert [each for part in batches for each in as_tuples(part)] == as_tuples(windows)
    for part in batches:
        assert part.attention_tokens == windows.attention_tokens
        assert part.work <= tokens or len(part.start) == 1
        assert len({each[1:] for each in as_tuples(part)}) == 1
    for part, following in itertools.pairwise(batches):  # full wherever possible
        same_shape = as_tuples(part)[0][1:] == as_tuples(following)[0][1:]
        assert not same_shape or part.work + part.length[0] > tokens
        assert not same_shape or len(part.start) == batch_size(int(part.length[0]), tokens)


def test_nothing_makes_no_batches() -> None:
    assert split_batches(plain_windows(20, 8).select(slice(0, 0)), 100) == []


def test_the_challenge_s_62_million_tokens_at_stride_32() -> None:
    windows = sliding_windows(62_021_845, 2048, 32)
    assert len(windows.start) == 1 + -(-(62_021_845 - 2048) // 32)
    assert windows.num_scored.sum() == 62_021_845
    assert windows.work == 2048 * (len(windows.start) - 1) + 2048 - 32 + (62_021_845 - 2048) % 32
    assert len(split_batches(windows, 64 * 2048)) == 1 + -(-(len(windows.start) - 2) // 64) + 1


@pytest.mark.parametrize("stride", [0, 9])
def test_stride_outside_the_window_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride_tokens: expected 1 to window_tokens 8, found {stride}"):
        sliding_windows(20, 8, stride)


@pytest.mark.parametrize(("first", "end"), [(0, 0), (5, 5), (6, 5), (-1, 5)])
def test_nothing_to_score_is_an_error(first: int, end: int) -> None:
    for make in (sliding_windows, one_pass_windows):
        with pytest.raises(ValueError, match=f"expected at least one target to score, found {first} to {end - 1}"):
            make(end, 8, 2, first=first)
    with pytest.raises(ValueError, match="at least one target"):
        plain_windows(0, 8)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_documents_go_from_one_bos_to_the_next(tail: list[int]) -> None:
    tokens = np.array([BOS, *tail], np.uint16)
    documents = find_documents(tokens, BOS)
    expected: list[list[int]] = []  # the inputs of each; the last token is only predicted
    for n, token in enumerate(tokens[:-1]):
        if token == BOS:
            expected.append([])
        expected[-1].append(n)
    assert documents.start.tolist() == [inputs[0] for inputs in expected]
    assert documents.length.tolist() == [len(inputs) for inputs in expected]
    assert documents.start.dtype == documents.length.dtype == np.int64


def test_some_documents_can_be_selected() -> None:
    documents = find_documents(np.array([BOS, 5, BOS, 5, 5, BOS, 5], np.uint16), BOS)
    for which in (slice(1, 3), np.array([1, 2]), documents.length > 0):
        part = documents.select(which)
        expected = [(0, 2), (2, 3), (5, 1)] if isinstance(which, np.ndarray) and which.dtype == bool else [(2, 3), (5, 1)]
        assert list(zip(part.start.tolist(), part.length.tolist(), strict=True)) == expected


@pytest.mark.parametrize("tokens", [[], [BOS], [5, BOS, 5]])
def test_a_stream_that_does_not_start_with_bos_is_an_error(tokens: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"expected at least two tokens, the first of them BOS 1, found \[{str(tokens[:2])[1:-1]}\]"):
        find_documents(np.array(tokens, np.uint16), BOS)
