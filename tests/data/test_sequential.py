from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.tokens import Split
from lib.data.loader import Prefetch
from lib.data.sequential import SequentialLoader
from lib.distributed import SINGLE_CPU, Process

BOS = 1
SHARDS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=90), min_size=1, max_size=5)


def make_split(shards: list[list[int]]) -> Split:
    return Split(Path("train"), tuple(np.array(shard, np.uint16) for shard in shards), 1, 1, 1, 10)


def read_by_rule(shards: list[list[int]], num_rows: int, row_tokens: int, num_steps: int) -> list[list[list[int]]]:
    """#1855, with a cursor: the rows of each step; none where no shard has enough tokens."""
    steps: list[list[list[int]]] = []
    span, number, idle = num_rows * (row_tokens + 1), 0, 0

    def first(shard: list[int]) -> int:
        return shard.index(BOS) if BOS in shard else len(shard)

    cursor = first(shards[0])
    while len(steps) < num_steps and idle <= len(shards):
        if len(shards[number]) - cursor < span:
            number, idle = (number + 1) % len(shards), idle + 1
            cursor = first(shards[number])
            continue
        taken, idle = shards[number][cursor:cursor + span], 0
        steps.append([taken[row * (row_tokens + 1):(row + 1) * (row_tokens + 1)] for row in range(num_rows)])
        cursor += span
    return steps


@given(shards=SHARDS, num_rows=st.integers(1, 4), row_tokens=st.integers(1, 9), world_size=st.integers(1, 5),
       search_tokens=st.integers(1, 50))
def test_batches_are_those_of_a_plain_loop(shards: list[list[int]], num_rows: int, row_tokens: int, world_size: int,
                                           search_tokens: int) -> None:
    expected = read_by_rule(shards, num_rows, row_tokens, 40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lib.data.sequential.SEARCH_TOKENS", search_tokens)
        if not expected:
            with pytest.raises(ValueError, match=rf"train: expected .* = {num_rows} rows of {row_tokens + 1} tokens .* found \d+ tok"):
                SequentialLoader(make_split(shards), row_tokens, num_rows, BOS)
            return
        loader = SequentialLoader(make_split(shards), row_tokens, num_rows, BOS)
    for step in np.random.default_rng(0).permutation(40).tolist():  # any step can be asked for, as a run that goes on does
        batch = loader.batch(step)
        assert batch.dtype == torch.int64
        assert batch.tolist() == expected[step]
        for rank in range(world_size):
            part = loader.batch(step, Process(rank, world_size, torch.device("cpu")))
            assert part.shape[1] == row_tokens + 1
            assert part.tolist() == expected[step][rank::world_size]


def test_batches_may_be_written_to_and_prefetched() -> None:
    shards: list[Any] = [[5, BOS, *range(2, 9)], [BOS, 3, 4, 5]]
    prefetch = Prefetch(SequentialLoader(make_split(shards), 1, 2, BOS), SINGLE_CPU)
    batches = [prefetch.of_step(step) for step in range(4)]
    assert [batch.tolist() for batch in batches] == [[[1, 2], [3, 4]], [[5, 6], [7, 8]], [[1, 3], [4, 5]], [[1, 2], [3, 4]]]
    batches[0].zero_()
    assert prefetch.of_step(0).tolist() == [[1, 2], [3, 4]]
