"""Rows of training tokens: how many shards hold, and where the parts of packed rows begin."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def count_rows(shard_tokens: Sequence[int], sequence_tokens: int) -> npt.NDArray[np.int64]:
    """(n,) int64, rows of `sequence_tokens` inputs, and one more token, in each of n shards.

    One row less than fits at phase 0, so that every phase below `sequence_tokens` leaves the number of rows, and so the epoch's length,
    alone.
    """
    lengths = np.array(shard_tokens, np.int64)
    return np.where(lengths > sequence_tokens, np.maximum(lengths // sequence_tokens - 1, 1), 0)


def find_parts(tokens: Tensor, bos_id: int, part_tokens: int) -> Tensor:
    """Where the parts of packed rows begin: at the start of a row, at every BOS, and every `part_tokens` tokens after each (#1855).

    Nothing waits for the device.

    Args:
        tokens: (B, T) int64.
        bos_id: the token that starts a document.
        part_tokens: tokens of a part, at most.

    Returns:
        (B, T) bool, for `GPT.forward` with `part_tokens` as its `attention_tokens`.
    """
    starts = tokens == bos_id
    starts[:, 0] = True
    flat = starts.flatten()
    firsts = torch.nonzero_static(flat, size=len(flat))[:, 0]  # of documents, padded
    places = torch.arange(len(flat), device=tokens.device) - firsts[flat.cumsum(0) - 1]
    return (places % part_tokens == 0).view(tokens.shape)
