"""Which windows of a token stream the model sees, and which targets each of them scores.

A stream of N+1 tokens has N targets: target i is token i+1, predicted at input i. A window is a run of inputs; it scores its
last targets, the others are context. N targets, W window, S stride, K windows, D documents.
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lib.errors import UserError

Integers = npt.NDArray[np.int64]


class Windows(NamedTuple):
    """Windows in the order of their scored targets; the arrays are (K,) int64.

    Attributes:
        start: first input.
        length: number of inputs.
        num_scored: number of targets scored, the last ones of the window.
        attention_tokens: how many tokens a position attends to at most; None for all of the window before it.
    """

    start: Integers
    length: Integers
    num_scored: Integers
    attention_tokens: int | None = None

    @property
    def end(self) -> Integers:
        """One past the last input, and one past the last scored target, (K,)."""
        return self.start + self.length

    @property
    def first_scored(self) -> Integers:
        """First scored target, (K,)."""
        return self.end - self.num_scored

    @property
    def work(self) -> int:
        """Inputs of all windows together."""
        return int(self.length.sum())

    def select(self, which: slice | npt.NDArray[np.bool_]) -> "Windows":
        """Some of the windows."""
        return Windows(self.start[which], self.length[which], self.num_scored[which], self.attention_tokens)


def sliding_windows(end: int, window_tokens: int, stride_tokens: int, *, first: int = 0) -> Windows:
    """Windows of W inputs, one every S, that score the targets `first` .. `end` - 1.

    A window that starts with the stream scores all its targets, each other one the S targets that no earlier one reached; the
    last one may be shorter and score fewer. Every target is scored exactly once and sees W - S inputs before its own, or all that
    there are. How much it sees does not depend on `end`.

    Raises:
        ValueError: no targets, or a stride outside 1 .. W.
    """
    if not 0 <= first < end:
        raise UserError(f"expected at least one target to score, found {first} to {end - 1}")
    if not 1 <= stride_tokens <= window_tokens:
        raise UserError(f"stride_tokens: expected 1 to window_tokens {window_tokens}, found {stride_tokens}")
    head = [0] if first == 0 else []
    begin = first or min(window_tokens, end)  # of what windows of S targets score
    first_scored = np.concatenate([np.array(head, np.int64), np.arange(begin, end, stride_tokens, dtype=np.int64)])
    last = np.concatenate([np.array(head, np.int64) + begin, np.minimum(first_scored[len(head):] + stride_tokens, end)])
    start = np.maximum(0, first_scored + stride_tokens - window_tokens)
    return Windows(start, last - start, last - first_scored)


def plain_windows(num_targets: int, window_tokens: int) -> Windows:
    """Windows of W inputs side by side, all targets scored; the last may be shorter.

    Raises:
        ValueError: no targets.
    """
    return sliding_windows(num_targets, window_tokens, window_tokens)


def one_pass_windows(end: int, attention_tokens: int, segment_tokens: int, *, first: int = 0) -> Windows:
    """Segments of targets, each after the inputs that its first target attends to, with attention to the latest inputs only.

    Each input is computed once, apart from the `attention_tokens` before each segment, and every target attends to exactly
    `attention_tokens` inputs, or all that there are.

    Raises:
        ValueError: no targets.
    """
    return sliding_windows(end, attention_tokens + segment_tokens, segment_tokens, first=first)._replace(attention_tokens=attention_tokens)


def batch_size(length: int, batch_tokens: int) -> int:
    """Rows of `length` inputs in a batch of at most `batch_tokens` inputs; at least one."""
    return max(1, batch_tokens // length)


def split_batches(windows: Windows, batch_tokens: int, num_shares: int = 1) -> list[Windows]:
    """Batches of consecutive windows of one length and number of scored targets, at most `batch_tokens` inputs or one window each.

    Where there are several windows of a kind they make at least `num_shares` batches, so that each process gets some.
    """
    if not len(windows.start):
        return []
    shape_changes = np.flatnonzero(np.diff(windows.length) | np.diff(windows.num_scored)) + 1
    bounds = [0, *shape_changes.tolist(), len(windows.start)]
    batches = []
    for run, end in itertools.pairwise(bounds):
        size = min(batch_size(int(windows.length[run]), batch_tokens), -(-(end - run) // num_shares))
        batches += [windows.select(slice(first, min(first + size, end))) for first in range(run, end, size)]
    return batches


class Documents(NamedTuple):
    """The documents of a stream, in its order; the arrays are (D,) int64.

    Attributes:
        start: first input, the BOS token.
        length: number of inputs, which is the number of targets: the last one is the BOS token of the next document.
    """

    start: Integers
    length: Integers

    def select(self, which: slice | Integers | npt.NDArray[np.bool_]) -> "Documents":
        """Some of the documents."""
        return Documents(self.start[which], self.length[which])


def find_documents(tokens: npt.NDArray[np.uint16], bos_id: int) -> Documents:
    """The documents of a stream of N+1 tokens, each from its BOS token to the next; together they have all N targets.

    Raises:
        ValueError: fewer than two tokens, or a stream that does not start with BOS.
    """
    if len(tokens) < 2 or tokens[0] != bos_id:
        raise UserError(f"expected at least two tokens, the first of them BOS {bos_id}, found {tokens[:2].tolist()}")
    start = np.flatnonzero(tokens[:-1] == bos_id).astype(np.int64)
    return Documents(start, np.diff(start, append=len(tokens) - 1))
