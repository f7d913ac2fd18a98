"""How many training sequences shards hold."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def count_rows(shard_tokens: Sequence[int], sequence_tokens: int) -> npt.NDArray[np.int64]:
    """(n,) int64, rows of `sequence_tokens` inputs, and one more token, in each of n shards.

    One row less than fits at phase 0, so that every phase below `sequence_tokens` leaves the number of rows, and so the epoch's length,
    alone.
    """
    lengths = np.array(shard_tokens, np.int64)
    return np.where(lengths > sequence_tokens, np.maximum(lengths // sequence_tokens - 1, 1), 0)
