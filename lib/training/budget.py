"""How long a run goes on, and what fraction of it is done: a number of steps, given or planned from the time that steps take."""

from collections.abc import Sequence
from typing import Any

from lib.training.config import TrainParams

REVISIONS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Fractions of a budget in seconds after which the plan is revised."""
CAREFUL_STEPS = 20  # so many steps before the end of a budget in seconds the plan is revised after each


class Plan:
    """The number of steps that a run is to have, and when it was changed.

    The fraction done is 0 at step 0, 1 at the last planned end, and linear in between, bent where the plan was changed. It is
    a function of the changes alone, so that a run whose plan came from a clock can be repeated without one.

    Args:
        revisions: (step from which it holds, planned number of steps) pairs in order, the first from step 0.
    """

    def __init__(self, revisions: Sequence[tuple[int, int]]) -> None:
        self.revisions: list[tuple[int, int]] = []
        self._knots: list[tuple[int, float, int]] = []  # first step, fraction done before it, planned end
        for step, end in revisions:
            self.revise(step, end)

    @property
    def num_steps(self) -> int:
        """The planned number of steps."""
        return self.revisions[-1][1]

    def revise(self, step: int, end: int) -> None:
        """Before step number `step` (from 0), plan to end after `end` steps."""
        assert step <= end
        if self.revisions and self.num_steps == end:
            return
        self._knots.append((step, self.fraction(step) if step else 0.0, end))
        self.revisions.append((step, end))

    def fraction(self, step: int) -> float:
        """Fraction of the run that is done before step number `step`, 0 <= step < `num_steps`."""
        first, done, end = next(knot for knot in reversed(self._knots) if knot[0] <= step)
        return done + (1 - done) * (step - first) / (end - first)


class Budget:
    """When a run is finished: after given steps, or before given seconds of training are over.

    A budget in seconds is turned into steps by the time that steps have taken lately; the plan is revised as time goes by, at
    the same moments in every process because all of them are told the main process's clock.

    Args:
        params: section ``train`` of the run.
    """

    def __init__(self, params: TrainParams) -> None:
        self._seconds = None if params.budget_seconds is None else params.budget_seconds - params.reserved_seconds
        steps = params.budget_steps
        self.plan = Plan([] if steps is None else [(0, steps)] if isinstance(steps, int) else steps)
        self._timed_from, self._revised = (0, 0.0), (0, 0.0)  # steps and seconds: where timing begins, at the last of `REVISIONS`

    @property
    def has_plan(self) -> bool:
        """Whether the number of steps is planned; a budget in seconds first needs `start`."""
        return bool(self.plan.revisions)

    def start(self, seconds_per_step: float) -> None:
        """Plan a run that is limited in seconds from the time that a step is expected to take."""
        assert self._seconds is not None
        self.plan.revise(0, max(1, int(self._seconds / seconds_per_step)))

    def is_finished(self, num_steps: int) -> bool:
        """Whether no step is left after `num_steps`."""
        return num_steps >= self.plan.num_steps

    def is_near_the_end(self, num_steps: int) -> bool:
        """Whether the clock should be read after every step."""
        return self._seconds is not None and num_steps >= self.plan.num_steps - CAREFUL_STEPS

    def revise(self, num_steps: int, seconds: float) -> None:
        """Take in the clock after `num_steps` steps, which took `seconds`."""
        if self._seconds is None:
            return
        is_due = any(self._revised[1] < part * self._seconds <= seconds for part in REVISIONS)
        if is_due or self.is_near_the_end(num_steps):
            if num_steps - self._revised[0] >= CAREFUL_STEPS:  # fewer would not tell how long steps take
                self._timed_from = self._revised
            timed = [(seconds - before) / (num_steps - step) for step, before in (self._timed_from, self._revised) if step < num_steps]
            per_step = max(timed)  # steps may have become slower
            self.plan.revise(num_steps, num_steps + max(0, int((self._seconds - seconds) / per_step)))
        if is_due:
            self._revised = num_steps, seconds

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume."""
        return {"plan": self.plan.revisions, "timed_from": self._timed_from, "revised": self._revised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self.plan, self._timed_from, self._revised = Plan(state["plan"]), state["timed_from"], state["revised"]
