import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.tokens import Split
from lib.data.loader import Loader, Prefetch, coprime_stride, sample_sequences
from lib.data.rows import find_parts
from lib.distributed import SINGLE_CPU, Process

SHARD_LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def make_split(lengths: list[int]) -> Split:
    """Shards whose tokens are their own positions in the split."""
    ends = np.cumsum(lengths)
    shards = tuple(np.arange(end - length, end).astype(np.uint16) for length, end in zip(lengths, ends, strict=True))
    return Split(Path("train"), shards, 1, 1, 1, 65536)


def starts_of(tokens: torch.Tensor, split: Split) -> list[int]:
    """First positions of the rows, after checking that each is a window of one shard."""
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(tokens.shape[1]))
    bounds = np.cumsum([len(shard) for shard in split.shards])
    for row in tokens:
        assert np.searchsorted(bounds, int(row[0]), "right") == np.searchsorted(bounds, int(row[-1]), "right")
    return [int(start) for start in tokens[:, 0]]


def rank(number: int, world_size: int) -> Process:
    return Process(number, world_size, torch.device("cpu"))


@given(lengths=SHARD_LENGTHS, sequence_tokens=st.integers(1, 20), num_sequences=st.integers(1, 7), seed=st.integers(0, 5))
def test_each_row_once_per_epoch(lengths: list[int], sequence_tokens: int, num_sequences: int, seed: int) -> None:
    split = make_split(lengths)
    num_rows = sum(max(length // sequence_tokens - 1, int(length > sequence_tokens)) for length in lengths)
    if num_rows < num_sequences:
        with pytest.raises(ValueError, match=rf"train: .* {num_sequences} rows of {sequence_tokens} tokens \(train.row_tokens, .*\), "
                                             rf"found {num_rows} in {sum(lengths)} tokens \({max(lengths)} in the longest shard\);"):
            Loader(split, sequence_tokens, num_sequences, seed)
        return
    loader = Loader(split, sequence_tokens, num_sequences, seed)
    num_epochs = 3
    starts: list[int] = []
    step = 0
    while len(starts) < num_epochs * loader.num_rows:
        starts += starts_of(loader.batch(step), split)
        step += 1
    bounds = np.cumsum(lengths)
    for epoch in range(num_epochs):
        rows = sorted(starts[epoch * loader.num_rows:(epoch + 1) * loader.num_rows])
        shards = np.searchsorted(bounds, rows, "right")
        for (start, shard), (next_start, next_shard) in pairwise(zip(rows, shards, strict=True)):  # neighbours share one token
            assert shard != next_shard or next_start - start == sequence_tokens
        for shard, length in enumerate(lengths):  # as many rows as fit, less one that the phase may cost
            count = int((shards == shard).sum())
            assert max(length // sequence_tokens - 1, int(length > sequence_tokens)) == count


def test_epochs_differ_in_order_and_phase() -> None:
    split = make_split([1000, 1000])
    loader = Loader(split, 10, loader_rows := 198, seed=3)
    assert loader.num_rows == loader_rows
    epochs = [starts_of(loader.batch(step), split) for step in range(4)]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert len({min(epoch) for epoch in epochs}) > 1
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(loader._epochs) <= 2  # the orders of past epochs do not pile up in memory


def test_phases_reach_every_position() -> None:
    split = make_split([47])
    loader = Loader(split, 5, 8, seed=0)
    assert {min(starts_of(loader.batch(step), split)) for step in range(200)} == set(range(5))


def test_batch_is_a_function_of_seed_and_step() -> None:
    split = make_split([300, 211])
    loader = Loader(split, 8, 6, seed=1)
    batches = [loader.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        resumed = Loader(split, 8, 6, seed=1).batch(step)
        again = loader.batch(step)
        assert torch.equal(resumed, batches[step])
        assert torch.equal(again, batches[step])
    assert not torch.equal(Loader(split, 8, 6, seed=2).batch(0), batches[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 12, 13])  # 5 do not divide the batch of 12; of 13 one gets nothing
def test_processes_share_the_global_batch(world_size: int) -> None:
    split = make_split([150, 100])
    loader = Loader(split, 8, 12, seed=1)
    for step in range(8):  # several epochs, and batches across their borders
        whole = loader.batch(step)
        for number in range(world_size):
            part = Loader(split, 8, 12, seed=1).batch(step, rank(number, world_size))
            assert torch.equal(part, whole[number::world_size])


@given(st.integers(1, 10**12))
def test_the_stride_is_coprime_and_close_to_the_golden_section(num_rows: int) -> None:
    stride = coprime_stride(num_rows)
    assert 0 < stride <= num_rows
    assert math.gcd(stride, num_rows) == 1
    assert abs(stride - num_rows * 0.6180339887498949) <= max(1, min(100, num_rows / 4))


def test_every_batch_is_spread_evenly_over_all_shards() -> None:
    split = make_split([1000] * 8)
    loader = Loader(split, 10, 24, seed=0)
    for step in range(3 * loader.num_rows // 24):
        shards = np.array(starts_of(loader.batch(step), split)) // 1000
        counts = np.bincount(shards, minlength=8)
        assert counts.min() >= 1 and counts.max() <= 5, "3 of each, give or take 2"


@pytest.mark.parametrize("steps", [range(12), [0, 1, 5, 6, 3, 3, 4]])
def test_prefetched_batches_are_those_of_the_loader(steps: range | list[int]) -> None:
    loader = Loader(make_split([150, 100]), 8, 5, seed=1)
    prefetch = Prefetch(loader, SINGLE_CPU)
    for step in steps:
        assert torch.equal(prefetch.of_step(step), loader.batch(step))


def test_step_far_beyond_int32() -> None:
    split = make_split([100])
    assert len(starts_of(Loader(split, 8, 8, seed=1).batch(10**15), split)) == 8


@given(lengths=SHARD_LENGTHS, sequence_tokens=st.integers(1, 20), num_sequences=st.integers(1, 30), seed=st.integers(0, 5))
def test_samples_are_distinct_and_spread(lengths: list[int], sequence_tokens: int, num_sequences: int, seed: int) -> None:
    split = make_split(lengths)
    num_rows = sum(max(length // sequence_tokens - 1, int(length > sequence_tokens)) for length in lengths)
    if num_rows < num_sequences:
        with pytest.raises(ValueError, match=f"at least {num_sequences} distinct .* found {num_rows} in {sum(lengths)} tokens"):
            sample_sequences(split, num_sequences, sequence_tokens, seed)
        return
    sequences = sample_sequences(split, num_sequences, sequence_tokens, seed)
    assert sequences.shape == (num_sequences, sequence_tokens + 1)
    starts = starts_of(sequences, split)
    assert all(later - earlier >= sequence_tokens for earlier, later in pairwise(starts))
    assert torch.equal(sequences, sample_sequences(split, num_sequences, sequence_tokens, seed))


def test_samples_come_from_every_shard_and_depend_on_the_seed() -> None:
    split = make_split([500] * 6)
    samples = [sample_sequences(split, 12, 10, seed)[:, 0] for seed in range(3)]
    for sample in samples:
        assert np.bincount(sample.numpy() // 500, minlength=6).tolist() == [2] * 6
    assert not torch.equal(samples[0], samples[1])


BOS = 1


def list_parts(row: list[int], part_tokens: int) -> list[bool]:
    """One token after the other."""
    starts, since = [], 0
    for place, token in enumerate(row):
        since = 0 if place == 0 or token == BOS else since + 1
        if since == part_tokens:
            since = 0
        starts.append(since == 0)
    return starts


@given(seed=st.integers(0, 10**6), num_tokens=st.integers(1, 40), num_ids=st.integers(2, 20), part_tokens=st.integers(1, 45))
def test_parts_begin_where_a_plain_loop_says(seed: int, num_tokens: int, num_ids: int, part_tokens: int) -> None:
    rows = torch.from_numpy(np.random.default_rng(seed).integers(0, num_ids, (3, num_tokens)))
    assert find_parts(rows, BOS, part_tokens).tolist() == [list_parts(row, part_tokens) for row in rows.tolist()]


@pytest.mark.parametrize(("row", "expected"), [
    ([BOS, 5, 5, 5, 5, 5, 5], [0, 3, 6]), ([5, 5, 5, 5], [0, 3]), ([5, BOS, BOS, BOS, 5], [0, 1, 2, 3]),
    ([BOS, 5, 5, BOS, 5, 5, BOS], [0, 3, 6]), ([5, 5, BOS, 5, 5, 5, 5], [0, 2, 5]), ([5, 5], [0])],
    ids=["BOS first", "no BOS", "adjacent", "at multiples", "late", "short"])
def test_parts_of_three_tokens(row: list[int], expected: list[int]) -> None:
    other = [BOS] + [5] * (len(row) - 1)  # rows before and after it change nothing
    assert find_parts(torch.tensor([other, row, other]), BOS, 3)[1].nonzero()[:, 0].tolist() == expected
