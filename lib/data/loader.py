"""Batches of training sequences as a pure function of (seed, step): resuming needs no state, and any step can be asked for.

B sequences of a global batch, T tokens of a sequence, N rows of an epoch.

A row is a window of T + 1 tokens of one shard: T inputs and T targets. In each epoch every shard is cut into rows from a
random phase on, neighbours sharing one token so that no target between them is left out. The N rows of all shards are visited
at a stride that is coprime to N, so that each comes once and any few steps are spread over all shards; the stride is close to
N times the golden ratio, which spreads them most evenly. The next epoch draws new phases and another row to start from.
"""

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from lib.artifacts.tokens import Split
from lib.data.rows import count_rows
from lib.distributed import SINGLE_CPU, Process
from lib.errors import UserError

Int64s = npt.NDArray[np.int64]


class _Rows:
    """The rows of a split for any phase: how many each shard has, and where each lies."""

    def __init__(self, split: Split, sequence_tokens: int) -> None:
        self._split, self._sequence_tokens = split, sequence_tokens
        lengths = [len(shard) for shard in split.shards]
        rows = count_rows(lengths, sequence_tokens)
        self.num_phases = np.clip(np.array(lengths, np.int64) - rows * sequence_tokens, 1, sequence_tokens)
        self.num_rows = int(rows.sum())
        self._ends = np.cumsum(rows)
        self._firsts = self._ends - rows
        self.width = sequence_tokens + 1

    def gather(self, rows: Int64s, phases: Int64s) -> torch.Tensor:
        """(len(rows), T + 1) int64 tokens of `rows`, with each shard cut from its phase."""
        tokens = np.empty((len(rows), self.width), np.int64)
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = phases[shards] + (rows - self._firsts[shards]) * self._sequence_tokens
        for row, shard, start in zip(tokens, shards, starts, strict=True):
            row[:] = self._split.shards[shard][start:start + self.width]
        return torch.from_numpy(tokens)


def coprime_stride(num_rows: int) -> int:
    """A number coprime to `num_rows`, as close to its golden section as can be."""
    golden = round((math.sqrt(5) - 1) / 2 * num_rows)
    return next(stride for distance in range(num_rows) for stride in (golden + distance, golden - distance)
                if stride > 0 and math.gcd(stride, num_rows) == 1)


class Loader:
    """Training batches from one split.

    Args:
        split: where the tokens come from.
        sequence_tokens: T.
        num_sequences: B, over all processes.
        seed: decides the phases and the first row of every epoch.

    Raises:
        ValueError: the split has too few tokens for one batch.
    """

    def __init__(self, split: Split, sequence_tokens: int, num_sequences: int, seed: int) -> None:
        self._rows = _Rows(split, sequence_tokens)
        self._num_sequences, self._seed = num_sequences, seed
        self._epochs: dict[int, tuple[Int64s, int]] = {}
        if self._rows.num_rows < num_sequences:
            longest = max(map(len, split.shards), default=0)
            raise UserError(f"{split.folder}: expected at least train.batch_sequences = {num_sequences} rows of {sequence_tokens} tokens "
                            f"(train.row_tokens, or train.sequence_tokens where that is null), found {self._rows.num_rows} in "
                            f"{split.num_tokens} tokens ({longest} in the longest shard); make the batch or the rows smaller, or the "
                            "corpus larger")
        self._stride = coprime_stride(self._rows.num_rows)

    @property
    def num_rows(self) -> int:
        """N, the sequences of one epoch."""
        return self._rows.num_rows

    def batch(self, step: int, process: Process = SINGLE_CPU) -> torch.Tensor:
        """This process's part of the global batch of a step: every `world_size`-th row from its rank on.

        The global batch does not depend on the number of processes, and one that reaches past the end of an epoch is
        filled from the next.

        Args:
            step: 0 or more.
            process: rank and world size.

        Returns:
            (b, T + 1) int64 on the CPU: inputs and, one further, targets; b is B / world_size, rounded up for the first ranks
            and down for the others.
        """
        first = step * self._num_sequences
        epochs, indices = np.divmod(np.arange(first + process.rank, first + self._num_sequences, process.world_size), self.num_rows)
        sequences = [torch.empty(0, self._rows.width, dtype=torch.int64)]
        for epoch in np.unique(epochs):
            phases, start = self._epoch(int(epoch))
            sequences.append(self._rows.gather((start + indices[epochs == epoch] * self._stride) % self.num_rows, phases))
        return torch.cat(sequences)

    def _epoch(self, epoch: int) -> tuple[Int64s, int]:
        if epoch not in self._epochs:
            self._epochs = {key: value for key, value in self._epochs.items() if key == epoch - 1}  # the one that a batch may begin in
            generator = np.random.default_rng([self._seed, epoch])
            self._epochs[epoch] = generator.integers(self._rows.num_phases), int(generator.integers(self.num_rows))
        return self._epochs[epoch]


class Batches(Protocol):
    """Training batches as a function of the step: of a `Loader`, or of a `lib.data.sequential.SequentialLoader`."""

    def batch(self, step: int, process: Process = SINGLE_CPU) -> torch.Tensor:
        """As `Loader.batch`."""


class Prefetch:
    """The batches of one process on its device, each made in the background while the one before is used."""

    def __init__(self, loader: Batches, process: Process) -> None:
        self._loader, self._process = loader, process
        self._thread = ThreadPoolExecutor(1, "batches")
        self._coming: tuple[int, Future[torch.Tensor]] | None = None

    def of_step(self, step: int) -> torch.Tensor:
        """(b, T + 1) int64, as `Loader.batch` gives it; cheap for the step after that of the last call."""
        known, future = self._coming or (None, None)
        if future is None or known != step:
            future = self._thread.submit(self._make, step)
        tokens = future.result()
        self._coming = step + 1, self._thread.submit(self._make, step + 1)
        return tokens.to(self._process.device, non_blocking=True)

    def _make(self, step: int) -> torch.Tensor:
        tokens = self._loader.batch(step, self._process)
        return tokens.pin_memory() if self._process.device.type == "cuda" else tokens


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
        raise UserError(f"{split.folder}: expected at least {num_sequences} distinct sequences of {sequence_tokens} tokens, found "
                        f"{rows.num_rows} in {split.num_tokens} tokens; lower calibrate.num_sequences, or enlarge the corpus")
    generator = np.random.default_rng(seed)
    phases = generator.integers(rows.num_phases)
    bounds = np.arange(num_sequences + 1) * rows.num_rows // num_sequences
    return rows.gather(generator.integers(bounds[:-1], bounds[1:]), phases)
