"""Training batches in the order of the text, as entry #1855 reads it: a pure function of the step, the same for every seed.

Shards follow in the order of their names. In each, a cursor starts at the first BOS. A step of B rows takes B (T + 1) tokens at the cursor;
where fewer are left, the rest of the shard is not used, and the step takes those of the next. After the last shard comes the first again.
The rows of a step follow each other and share no token: T inputs of each row predict its last T tokens, so that one target of every T + 1
is lost.
"""

import numpy as np
import torch

from lib.artifacts.tokens import Split, Tokens
from lib.distributed import SINGLE_CPU, Process
from lib.errors import UserError

SEARCH_TOKENS = 1 << 16


class SequentialLoader:
    """Training batches from one split, in its order; B rows of T inputs.

    Args:
        split: where the tokens come from.
        row_tokens: T.
        num_rows: B, over all processes.
        bos_id: the token that starts a document.

    Raises:
        ValueError: no shard has tokens for one batch after its first BOS.
    """

    def __init__(self, split: Split, row_tokens: int, num_rows: int, bos_id: int) -> None:
        self._shards, self._shape = split.shards, (num_rows, row_tokens + 1)
        self._step_tokens = num_rows * (row_tokens + 1)
        self._starts = [_find_first(shard, bos_id) for shard in split.shards]
        steps = [(len(shard) - start) // self._step_tokens for shard, start in zip(split.shards, self._starts, strict=True)]
        self._ends = np.cumsum(steps)
        if not any(steps):
            longest = max(map(len, split.shards), default=0)
            raise UserError(f"{split.folder}: expected a shard with train.batch_sequences = {num_rows} rows of {row_tokens + 1} tokens "
                            f"after its first BOS, for train.data_order: sequential, found {longest} tokens in the longest; make the batch "
                            "or the rows smaller, or the corpus or tokenize.shard_tokens larger")

    def batch(self, step: int, process: Process = SINGLE_CPU) -> torch.Tensor:
        """This process's part of the global batch of a step; arguments and shape as of `lib.data.loader.Loader.batch`."""
        step %= int(self._ends[-1])
        shard = int(np.searchsorted(self._ends, step, side="right"))
        first = step - int(self._ends[shard - 1]) if shard else step
        start = self._starts[shard] + first * self._step_tokens
        rows = self._shards[shard][start:start + self._step_tokens].reshape(self._shape)
        return torch.from_numpy(rows[process.rank::process.world_size].astype(np.int64))


def _find_first(tokens: Tokens, token: int) -> int:
    """Position of the first `token`; the number of tokens if there is none."""
    for start in range(0, len(tokens), SEARCH_TOKENS):
        found = np.flatnonzero(tokens[start:start + SEARCH_TOKENS] == token)
        if len(found):
            return start + int(found[0])
    return len(tokens)
