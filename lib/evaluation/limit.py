"""The time that an evaluation may take, how much of it is used and by what."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lib.distributed import Process
from lib.errors import UserError
from lib.model.compilation import compile_seconds
from lib.progress import Progress, say

CHECKS = 200  # of the time, evenly spread over the work: each of them waits for the device and for the other processes
WARNING_FROM = 0.02  # fraction of the work from which on a projection is worth a warning
RESERVE = 0.03  # fraction of the limit that `affordable` leaves unused


class TimeLimitError(UserError):
    """The evaluation took longer than ``evaluate.limit_seconds``."""


class TimeLimit:
    """Clock that runs from construction on; the work that is reported to it gives the projected total.

    All processes report the same work and agree on the time at each check, so that they stop at the same place.

    Args:
        limit_seconds: ``evaluate.limit_seconds``.
        process: only the main one shows the progress.
    """

    def __init__(self, limit_seconds: float, process: Process) -> None:
        self._limit_seconds, self._process = limit_seconds, process
        self._start, self._compiled_before = time.monotonic(), compile_seconds()
        self._work_start = self._checked_seconds = self._checked_compile_seconds = 0.0
        self._total = self._done = self._checked = 0
        self._warned = False
        self._phases: dict[str, float] = {}

    @property
    def open_seconds(self) -> float:
        """Time from construction until the work was planned."""
        return self._work_start

    @property
    def seconds(self) -> float:
        """Time since construction."""
        return time.monotonic() - self._start

    @property
    def compile_seconds(self) -> float:
        """Part of `seconds` that this process has spent in ``torch.compile``."""
        return compile_seconds() - self._compiled_before

    @property
    def projected_seconds(self) -> float:
        """Time that all the work will have taken if it goes on as it did until the last check, with nothing more to compile."""
        return self._work_start + self._checked_compile_seconds + self._seconds_of_work * self._total / max(self._checked, 1)

    @property
    def _seconds_of_work(self) -> float:
        """Time of the work until the last check, without compilation."""
        return self._checked_seconds - self._work_start - self._checked_compile_seconds

    def plan(self, total_work: int) -> Progress:
        """Announce all the work that will be reported with `advance`; the caller closes the progress that is returned."""
        self._work_start, = self._process.max(self.seconds)
        self._checked_seconds = self._work_start
        self._total = total_work
        self._progress = Progress("evaluate", total_work, "tok", enabled=self._process.is_main)
        return self._progress

    def advance(self, work: int) -> None:
        """Work has been done, in inputs scored.

        Raises:
            TimeLimitError: the limit has passed.
        """
        before, self._done = self._done, self._done + work
        if self._done * CHECKS // max(self._total, 1) > before * CHECKS // max(self._total, 1):
            self.check()
        self._progress.update(work, projected=f"{self.projected_seconds:.0f} s of {self._limit_seconds:g} s")

    def leave_out(self, work: int) -> None:
        """Work that was announced will not be done."""
        self._total -= work

    def check(self) -> None:
        """Compare the time with the limit, in all processes together; say so once if the projection is above it.

        Raises:
            TimeLimitError: the limit has passed.
        """
        self._process.synchronize()
        self._checked = self._done
        self._checked_seconds, self._checked_compile_seconds = self._process.max(self.seconds, self.compile_seconds)
        if self._checked_seconds > self._limit_seconds:
            raise TimeLimitError(
                f"evaluate.limit_seconds: expected at most {self._limit_seconds:g} s, found {self._checked_seconds:.1f} s with "
                f"{self._done / max(self._total, 1):.0%} of the work done (projected: {self.projected_seconds:.0f} s); "
                "raise evaluate.stride_tokens, score with one_pass, lower epochs, leave out a strategy, use more processes "
                "(NPROC=8 dvc repro), set evaluate.when_late: fewer_epochs, or raise the limit")
        if not self._warned and self._done >= WARNING_FROM * self._total and self.projected_seconds > self._limit_seconds:
            self._warned = True
            say(f"evaluate is on its way to {self.projected_seconds:.0f} s, above evaluate.limit_seconds: {self._limit_seconds:g} s",
                enabled=self._process.is_main)

    def affordable(self, optional_work: int) -> float:
        """How much of some of the work that is left can be done within the limit if all other work is done.

        Args:
            optional_work: in inputs scored.

        Returns:
            A fraction from 0 to 1, the same in all processes.
        """
        if not self._checked or not optional_work:
            return 1.0
        seconds_per_work = self._seconds_of_work / self._checked
        left = ((1 - RESERVE) * self._limit_seconds - self._checked_seconds) / seconds_per_work - (self._done - self._checked)
        return min(1.0, max(0.0, (left - (self._total - self._done - optional_work)) / optional_work))

    @contextmanager
    def timed(self) -> Iterator[dict[str, float]]:
        """A dictionary that gets the ``seconds`` of the block and the ``<name>_seconds`` of each `phase` in it."""
        self._phases = {}
        seconds: dict[str, float] = {}
        with self._measured(seconds, "seconds"):
            yield seconds
        if len(self._phases) > 1:
            seconds |= self._phases

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Part of what `timed` measures; phases of the same name add up."""
        with self._measured(self._phases, f"{name}_seconds"):
            yield

    @contextmanager
    def _measured(self, seconds: dict[str, float], key: str) -> Iterator[None]:
        self._process.synchronize()
        start = self.seconds
        yield
        self._process.synchronize()
        seconds[key] = seconds.get(key, 0.0) + self.seconds - start
