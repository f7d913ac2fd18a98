"""What a stage shows while it works: a bar on a terminal, one line every ten seconds elsewhere. Nothing here reaches a file."""

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from tqdm import tqdm

LINE_INTERVAL_SECONDS = 10.0

T = TypeVar("T")


class Progress:
    """Progress of one long piece of work, with rate and estimated time left.

    Args:
        description: what is being done, a word or two.
        total: the amount of work, in `unit`.
        unit: name of one unit of work.
        enabled: pass ``process.is_main`` so that only one process prints.
        initial: what was done before, at another time.
    """

    def __init__(self, description: str, total: float, unit: str, *, enabled: bool = True, initial: float = 0.0) -> None:
        self._tty = sys.stderr.isatty()
        self._enabled = enabled
        self._bar = tqdm(desc=description, total=total, unit=unit, unit_scale=True, disable=not (enabled and self._tty), initial=initial)
        self._description, self._total, self._unit, self._initial = description, total, unit, initial
        self._done = initial
        self._status = ""
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.close()
        if self._enabled and not self._tty:
            self._print_line()

    def update(self, amount: float, *, total: float | None = None, **status: float | str) -> None:
        """`amount` more units are done, of `total` if that has changed; `status`: figures to show (floats with four significant digits)."""
        self._done += amount
        if total is not None:
            self._total = self._bar.total = total
        self._status = " ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in status.items())
        if self._tty:
            self._bar.set_postfix_str(self._status, refresh=False)
            self._bar.update(amount)
        elif self._enabled and time.monotonic() - self._last_line >= LINE_INTERVAL_SECONDS:
            self._print_line()

    def _print_line(self) -> None:
        self._last_line = time.monotonic()
        line = tqdm.format_meter(self._done, self._total, self._last_line - self._start, prefix=self._description, unit=self._unit,
                                 initial=self._initial, unit_scale=True, postfix=self._status, bar_format="{desc}: {percentage:3.0f}% "
                                 "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]")
        print(line, file=sys.stderr, flush=True)


def track(items: Iterable[T], description: str, total: int, unit: str, *, enabled: bool = True) -> Iterator[T]:
    """Iterate over `items` and show the progress, one unit an item."""
    with Progress(description, total, unit, enabled=enabled) as progress:
        for item in items:
            yield item
            progress.update(1)


def say(message: str, *, enabled: bool = True) -> None:
    """Print one line for the person who runs the stage."""
    if enabled:
        print(message, file=sys.stderr, flush=True)
