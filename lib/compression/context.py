"""Codec ``range``: an adaptive range coder with tables by the magnitude that the row and the column of a code lead to expect.

R rows, C columns. Each row and each column has a level, in units of 1 / `OCTAVE_LEVELS` of a factor of 2; their sum is the context of a
code, and levels are stored before the codes, so that all codes of a context are read in one go.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from lib.compression.adaptive import INCREMENT, NUM_TOKENS, Counts, IntegerDecoder, IntegerEncoder, check_int16, new_counts

Codes = npt.NDArray[np.int16]
Levels = npt.NDArray[np.int64]

OCTAVE_LEVELS = 4
MIN_CONTEXT, MAX_CONTEXT = -48, 60  # expected magnitudes 2^-12 to 2^15
MAX_PIECE = 2**20  # codes that are coded at a time; bounds the memory
LEVEL_UNITS = (1, 2, 1024)  # resolutions to choose among; with the last, all levels are equal
NUM_ITERATIONS = 2
PRIOR = 128 * INCREMENT  # weight of what is known already about a context, when a matrix begins with it


def encode_range(matrices: Sequence[Codes], level: int) -> tuple[bytes, list[int]]:
    """For each matrix the levels of its rows and its columns, then its codes by context; `level` has no meaning."""
    encoder, statistics = IntegerEncoder(), _Statistics()
    ends = [0]
    for codes in matrices:
        row_levels, column_levels = _choose_levels(codes)
        for levels, counts in ((row_levels, statistics.rows), (column_levels, statistics.columns)):
            encoder.put_array(levels, counts, statistics.headers)
        flat = codes.ravel()
        for places, counts in statistics.by_context(row_levels, column_levels):
            encoder.put(flat[places], counts)
        ends.append(encoder.num_bytes())
    return encoder.finish(), [end - start for start, end in pairwise(ends)]


def decode_range(content: bytes, shapes: Sequence[tuple[int, int]]) -> list[Codes]:
    """The matrices of a stream that `encode_range` wrote.

    Raises:
        ValueError: damaged, or of other shapes, as far as that can be seen.
    """
    decoder, statistics = IntegerDecoder(content), _Statistics()
    matrices = []
    for num_rows, num_columns in shapes:
        row_levels = decoder.get_array(num_rows, statistics.rows, statistics.headers)
        column_levels = decoder.get_array(num_columns, statistics.columns, statistics.headers)
        flat = np.empty(num_rows * num_columns, np.int16)
        for places, counts in statistics.by_context(row_levels, column_levels):
            flat[places] = check_int16(decoder.get(len(places), counts))
        matrices.append(flat.reshape(num_rows, num_columns))
    decoder.finish()
    return matrices


class _Statistics:
    """What both sides know while they go through the matrices."""

    def __init__(self) -> None:
        self.headers, self.rows, self.columns = new_counts(), new_counts(), new_counts()
        self._contexts = np.zeros((MAX_CONTEXT - MIN_CONTEXT + 1, NUM_TOKENS), np.int64)  # counts of all matrices before

    def by_context(self, row_levels: Levels, column_levels: Levels) -> Iterator[tuple[npt.NDArray[np.int64], Counts]]:
        """For each context of a matrix the places of its codes in row-major order, in pieces, and counts, which the caller updates.

        Counts begin with those of the context in earlier matrices and of the context below in this one.
        """
        sums = row_levels.astype(np.int16)[:, None] + column_levels.astype(np.int16)
        contexts = (sums.clip(MIN_CONTEXT, MAX_CONTEXT) - MIN_CONTEXT).astype(np.uint8).ravel()
        places = np.argsort(contexts, kind="stable")
        counts = np.zeros(NUM_TOKENS, np.int64)
        start = 0
        for context, size in enumerate(np.bincount(contexts)):
            if size:
                known = new_counts() + _weigh(self._contexts[context]) + _weigh(counts)
                counts = known.copy()
                for piece in range(start, start + size, MAX_PIECE):
                    yield places[piece:min(piece + MAX_PIECE, start + size)], counts
                self._contexts[context] += counts - known
                start += size


def _weigh(counts: Counts) -> Counts:
    return counts * PRIOR // max(1, counts.sum())


def _choose_levels(codes: Codes) -> tuple[Levels, Levels]:
    """Levels of rows and columns whose sums fit log2 of the magnitudes of the codes: their means, each relative to the other's."""
    magnitudes = abs(codes.astype(np.float64))
    num_rows, num_columns = codes.shape
    mean = magnitudes.mean() if magnitudes.any() else 1.0
    rows, columns = np.full(num_rows, mean), np.ones(num_columns)
    for _ in range(NUM_ITERATIONS):  # half a code of the mean more, so that there are no zeros
        rows = ((magnitudes / columns).sum(1) + mean / 2) / (num_columns + 0.5)
        columns = ((magnitudes / rows[:, None]).sum(0) + 0.5) / (num_rows + 0.5)
    return _to_levels(rows, 1.0, num_columns), _to_levels(columns, mean, num_rows)


def _to_levels(scales: npt.NDArray[np.float64], mean: float, num_codes: int) -> Levels:
    """Levels of rows or columns with `num_codes` codes each, at the resolution that makes levels and codes together smallest.

    Codes are taken to have geometric magnitudes with means `scales` x `mean`.
    """
    def num_bits(levels: Levels) -> float:
        frequencies = np.unique_counts(levels).counts / len(levels)
        found, assumed = scales * mean, 2.0 ** (levels / OCTAVE_LEVELS) * mean
        excess = np.log2((1 + assumed) / (1 + found)) + found * np.log2((1 + 1 / assumed) / (1 + 1 / found))  # per code
        return float(num_codes * excess.sum() - len(levels) * (frequencies * np.log2(frequencies)).sum())

    candidates = [unit * np.rint(np.log2(scales) * (OCTAVE_LEVELS / unit)).astype(np.int64) for unit in LEVEL_UNITS]
    return min(candidates, key=num_bits)
