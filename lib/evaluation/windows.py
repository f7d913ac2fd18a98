"""Which windows of the validation tokens the model sees, and which targets each of them scores.

A stream of N+1 tokens has N targets: target i is token i+1, predicted at input i. A window is a run of inputs; it scores its
last targets, the others are context. N targets, W window, S stride, K windows.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]


class Windows(NamedTuple):
    """Windows in the order of their scored targets, each array (K,) int64.

    Attributes:
        start: first input.
        length: number of inputs.
        num_scored: number of targets scored, the last ones of the window.
    """

    start: Integers
    length: Integers
    num_scored: Integers

    @property
    def end(self) -> Integers:
        """One past the last input, and one past the last scored target, (K,)."""
        return self.start + self.length

    @property
    def first_scored(self) -> Integers:
        """First scored target, (K,)."""
        return self.end - self.num_scored

    def select(self, which: slice) -> "Windows":
        """A run of consecutive windows."""
        return Windows(self.start[which], self.length[which], self.num_scored[which])


def sliding_windows(num_targets: int, window_tokens: int, stride_tokens: int) -> Windows:
    """Windows of W inputs, one every S: the first scores all its targets, each later one those that no earlier one reached.

    Those are its last S targets; the last window ends with the stream, so it may be shorter and score fewer. Every target is
    scored exactly once and, beyond the first window, sees at least W - S inputs before its own.

    Raises:
        ValueError: no targets, or a stride outside 1 .. W.
    """
    if num_targets < 1:
        raise ValueError(f"expected at least one target to score, found {num_targets}")
    if not 1 <= stride_tokens <= window_tokens:
        raise ValueError(f"stride_tokens: expected 1 to window_tokens {window_tokens}, found {stride_tokens}")
    num_windows = 1 + -(-max(0, num_targets - window_tokens) // stride_tokens)
    start = np.arange(num_windows, dtype=np.int64) * stride_tokens
    end = np.minimum(start + window_tokens, num_targets)
    return Windows(start, end - start, np.diff(end, prepend=0))


def plain_windows(num_targets: int, window_tokens: int) -> Windows:
    """Windows of W inputs side by side, all targets scored; the last may be shorter.

    Raises:
        ValueError: no targets.
    """
    return sliding_windows(num_targets, window_tokens, window_tokens)


def split_batches(windows: Windows, batch_windows: int) -> list[Windows]:
    """Batches of at most `batch_windows` consecutive windows of one length and number of scored targets."""
    shape_changes = np.flatnonzero(np.diff(windows.length) | np.diff(windows.num_scored)) + 1
    runs = zip([0, *shape_changes.tolist()], [*shape_changes.tolist(), len(windows.start)], strict=True)
    return [windows.select(slice(first, min(first + batch_windows, end))) for run, end in runs for first in range(run, end, batch_windows)]
