"""Batches of training sequences as a pure function of (seed, step): resuming needs no state, and any step can be asked for.

B sequences of a global batch, T tokens of a sequence, N rows of an epoch.

A row is a window of T + 1 tokens of one shard: T inputs and T targets. In each epoch every shard is cut into rows from a
random phase on, neighbours sharing one token so that no target between them is left out, and the rows of all shards are
visited in one random order. The next epoch draws new phases and a new order.
"""

import numpy as np
import numpy.typing as npt
import torch

from lib.artifacts.tokens import Split
from lib.distributed import SINGLE_CPU, Process

Int64s = npt.NDArray[np.int64]


class _Rows:
    """The rows of a split for any phase: how many each shard has, and where each lies."""

    def __init__(self, split: Split, sequence_tokens: int) -> None:
        self._split, self._sequence_tokens = split, sequence_tokens
        lengths = np.array([len(shard) for shard in split.shards], np.int64)
        # One row less than fits at phase 0, so that every phase below T leaves the number of rows, and so the epoch's length, alone.
        rows = np.where(lengths > sequence_tokens, np.maximum(lengths // sequence_tokens - 1, 1), 0)
        self.num_phases = np.clip(lengths - rows * sequence_tokens, 1, sequence_tokens)
        self.num_rows = int(rows.sum())
        self._ends = np.cumsum(rows)
        self._firsts = self._ends - rows

    def gather(self, rows: Int64s, phases: Int64s) -> torch.Tensor:
        """(len(rows), T + 1) int64 tokens of `rows`, with each shard cut from its phase."""
        width = self._sequence_tokens + 1
        tokens = np.empty((len(rows), width), np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = phases[shards] + (rows - self._firsts[shards]) * self._sequence_tokens
        for row, shard, start in zip(tokens, shards, starts, strict=True):
            row[:] = self._split.shards[shard][start:start + width]
        return torch.from_numpy(tokens)


class Loader:
    """Training batches from one split.

    Args:
        split: where the tokens come from.
        sequence_tokens: T.
        num_sequences: B, over all processes.
        seed: decides phases and order of every epoch.

    Raises:
        ValueError: no shard of the split has T + 1 tokens.
    """

    def __init__(self, split: Split, sequence_tokens: int, num_sequences: int, seed: int) -> None:
        self._rows = _Rows(split, sequence_tokens)
        self._num_sequences, self._seed = num_sequences, seed
        self._epochs: dict[int, tuple[Int64s, Int64s]] = {}
        if self._rows.num_rows == 0:
            longest = max(map(len, split.shards), default=0)
            raise ValueError(f"{split.folder}: expected a shard with more than sequence_tokens = {sequence_tokens} tokens, found at most "
                             f"{longest}; shorten the sequences, or enlarge the corpus or its shards")

    @property
    def num_rows(self) -> int:
        """N, the sequences of one epoch."""
        return self._rows.num_rows

    def batch(self, step: int, process: Process = SINGLE_CPU) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's part of the global batch of a step: every `world_size`-th row from its rank on.

        The global batch does not depend on the number of processes, and one that reaches past the end of an epoch is
        filled from the next.

        Args:
            step: 0 or more.
            process: rank and world size; the world size must divide B.

        Returns:
            Inputs and targets, (B / world_size, T) int64 each, on the CPU.

        Raises:
            ValueError: B is no multiple of the world size.
        """
        if self._num_sequences % process.world_size:
            raise ValueError(f"train.batch_sequences: expected a multiple of the {process.world_size} processes, found "
                             f"{self._num_sequences}; change it or the number of processes (NPROC)")
        first = step * self._num_sequences
        epochs, indices = np.divmod(np.arange(first + process.rank, first + self._num_sequences, process.world_size), self.num_rows)
        sequences = []
        for epoch in np.unique(epochs):
            phases, order = self._epoch(int(epoch))
            sequences.append(self._rows.gather(order[indices[epochs == epoch]], phases))
        tokens = torch.cat(sequences)  # (B / world_size, T + 1)
        return tokens[:, :-1], tokens[:, 1:]

    def _epoch(self, epoch: int) -> tuple[Int64s, Int64s]:
        if epoch not in self._epochs:
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}  # the one that a batch may begin in
            generator = np.random.default_rng([self._seed, epoch])
            self._epochs[epoch] = generator.integers(self._rows.num_phases), generator.permutation(self.num_rows)
        return self._epochs[epoch]


def sample_sequences(split: Split, num_sequences: int, sequence_tokens: int, seed: int) -> torch.Tensor:
    """Distinct rows spread evenly over all shards: one at random from each of `num_sequences` equal parts of the split.

    Args:
        split: where the tokens come from.
        num_sequences: rows to draw.
        sequence_tokens: T.
        seed: decides the phase of each shard and the row in each part.

    Returns:
        (num_sequences, T + 1) int64, on the CPU, in the order of the split.

    Raises:
        ValueError: the split has too few tokens for that many rows.
    """
    rows = _Rows(split, sequence_tokens)
    if rows.num_rows < num_sequences:
        raise ValueError(f"{split.folder}: expected at least {num_sequences} distinct sequences of {sequence_tokens} tokens, found "
                         f"{rows.num_rows} in {split.num_tokens} tokens; ask for fewer, or enlarge the corpus")
    generator = np.random.default_rng(seed)
    phases = generator.integers(rows.num_phases)
    bounds = np.arange(num_sequences + 1) * rows.num_rows // num_sequences
    return rows.gather(generator.integers(bounds[:-1], bounds[1:]), phases)
