from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.tokens import Split
from lib.data.loader import Loader, sample_sequences
from lib.distributed import Process

SHARD_LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=5)


def make_split(lengths: list[int]) -> Split:
    """Shards whose tokens are their own positions in the split."""
    ends = np.cumsum(lengths)
    shards = tuple(np.arange(end - length, end).astype(np.uint16) for length, end in zip(lengths, ends, strict=True))
    return Split(Path("train"), shards, 1, 1, 1, 65536)


def starts_of(inputs: torch.Tensor, targets: torch.Tensor, split: Split) -> list[int]:
    """First positions of the rows, after checking that each is a window of one shard."""
    assert inputs.dtype == targets.dtype == torch.int64
    width = inputs.shape[1]
    assert torch.equal(inputs, inputs[:, :1] + torch.arange(width))
    assert torch.equal(targets, inputs + 1)
    bounds = np.cumsum([len(shard) for shard in split.shards])
    for row in range(len(inputs)):
        assert np.searchsorted(bounds, int(inputs[row, 0]), "right") == np.searchsorted(bounds, int(targets[row, -1]), "right")
    return [int(start) for start in inputs[:, 0]]


def rank(number: int, world_size: int) -> Process:
    return Process(number, world_size, torch.device("cpu"))


@given(lengths=SHARD_LENGTHS, sequence_tokens=st.integers(1, 20), num_sequences=st.integers(1, 7), seed=st.integers(0, 5))
def test_each_row_once_per_epoch(lengths: list[int], sequence_tokens: int, num_sequences: int, seed: int) -> None:
    split = make_split(lengths)
    if max(lengths) <= sequence_tokens:
        with pytest.raises(ValueError, match=f"train: .* sequence_tokens = {sequence_tokens} tokens, found at most {max(lengths)};"):
            Loader(split, sequence_tokens, num_sequences, seed)
        return
    loader = Loader(split, sequence_tokens, num_sequences, seed)
    num_epochs = 3
    starts: list[int] = []
    step = 0
    while len(starts) < num_epochs * loader.num_rows:
        starts += starts_of(*loader.batch(step), split)
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
    epochs = [starts_of(*loader.batch(step), split) for step in range(4)]
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert len({min(epoch) for epoch in epochs}) > 1
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert len(loader._epochs) <= 2  # the orders of past epochs do not pile up in memory


def test_phases_reach_every_position() -> None:
    split = make_split([47])
    loader = Loader(split, 5, 8, seed=0)
    assert {min(starts_of(*loader.batch(step), split)) for step in range(200)} == set(range(5))


def test_batch_is_a_function_of_seed_and_step() -> None:
    split = make_split([300, 211])
    loader = Loader(split, 8, 6, seed=1)
    batches = [loader.batch(step) for step in range(30)]
    for step in (29, 3, 17, 0):
        resumed = Loader(split, 8, 6, seed=1).batch(step)
        again = loader.batch(step)
        for inputs, targets in (resumed, again):
            assert torch.equal(inputs, batches[step][0])
            assert torch.equal(targets, batches[step][1])
    assert not torch.equal(Loader(split, 8, 6, seed=2).batch(0)[0], batches[0][0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_processes_share_the_global_batch(world_size: int) -> None:
    split = make_split([150, 100])
    loader = Loader(split, 8, 12, seed=1)
    for step in range(8):  # several epochs, and batches across their borders
        whole = loader.batch(step)
        for number in range(world_size):
            part = Loader(split, 8, 12, seed=1).batch(step, rank(number, world_size))
            for part_tokens, whole_tokens in zip(part, whole, strict=True):
                assert torch.equal(part_tokens, whole_tokens[number::world_size])


def test_batch_that_processes_cannot_share_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"train\.batch_sequences: expected a multiple of the 3 processes, found 8; .*NPROC"):
        Loader(make_split([100]), 8, 8, seed=1).batch(0, rank(2, 3))


def test_step_far_beyond_int32() -> None:
    split = make_split([100])
    inputs, targets = Loader(split, 8, 8, seed=1).batch(10**15)
    assert len(starts_of(inputs, targets, split)) == 8


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
    starts = starts_of(sequences[:, :-1], sequences[:, 1:], split)
    assert all(later - earlier >= sequence_tokens for earlier, later in pairwise(starts))
    assert torch.equal(sequences, sample_sequences(split, num_sequences, sequence_tokens, seed))


def test_samples_come_from_every_shard_and_depend_on_the_seed() -> None:
    split = make_split([500] * 6)
    samples = [sample_sequences(split, 12, 10, seed)[:, 0] for seed in range(3)]
    for sample in samples:
        assert np.bincount(sample.numpy() // 500, minlength=6).tolist() == [2] * 6
    assert not torch.equal(samples[0], samples[1])
