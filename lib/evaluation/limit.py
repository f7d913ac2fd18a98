"""The time that an evaluation may take, and how much of it is used."""

import time

from lib.progress import Progress


class TimeLimitError(RuntimeError):
    """The evaluation took longer than ``evaluate.limit_seconds``."""


class TimeLimit:
    """Clock that runs from construction on; the work that is reported to it gives the projected total.

    Args:
        limit_seconds: ``evaluate.limit_seconds``.
        enabled: whether this process shows the progress.
    """

    def __init__(self, limit_seconds: float, *, enabled: bool) -> None:
        self._limit_seconds, self._enabled = limit_seconds, enabled
        self._start = time.monotonic()
        self._work_start, self._total, self._done = 0.0, 0, 0

    @property
    def seconds(self) -> float:
        """Time since construction."""
        return time.monotonic() - self._start

    @property
    def projected_seconds(self) -> float:
        """Time that all the work will have taken if it goes on as until now."""
        return self._work_start + (self.seconds - self._work_start) * self._total / max(self._done, 1)

    def plan(self, total_work: int) -> Progress:
        """Announce all the work that will be reported with `advance`; the caller closes the progress that is returned."""
        self._work_start, self._total = self.seconds, total_work
        self._progress = Progress("evaluate", total_work, "tok", enabled=self._enabled)
        return self._progress

    def advance(self, work: int) -> None:
        """Work has been done, in inputs scored.

        Raises:
            TimeLimitError: the limit has passed.
        """
        self._done += work
        self._progress.update(work, projected=f"{self.projected_seconds:.0f} s of {self._limit_seconds:g} s")
        self.check()

    def check(self) -> None:
        """Raise if the limit has passed.

        Raises:
            TimeLimitError: the limit has passed.
        """
        if self.seconds > self._limit_seconds:
            raise TimeLimitError(
                f"evaluate.limit_seconds: expected at most {self._limit_seconds:g} s, found {self.seconds:.1f} s with "
                f"{self._done / max(self._total, 1):.0%} of the work done (projected: {self.projected_seconds:.0f} s); "
                "raise evaluate.stride_tokens, lower evaluate.score_first.epochs, leave out a strategy, use more processes "
                "(NPROC=8 dvc repro), or raise the limit")
