"""What was scored and what was trained on, in the order in which it happened: the evidence that no score knew its target.

Every loss is written through a `ScoreSheet` and every optimizer step is taken by an `Adapter` or by a `DocumentScorer`, which
keep this record themselves, so that a strategy cannot forget to. `lib.audit.verdict` judges it.
"""

from typing import Literal, NamedTuple

from lib.distributed import Process

SHARED = -1
"""The state of what all documents share: the model's own weights."""


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        step: events with a smaller step happened before; equal steps did not see each other.
        kind: ``scored``, or ``trained`` after it.
        state: `SHARED`, or the number of the adapter that was used or trained: that of its document in the order of scoring, or with
            ``lora.warm_start`` the number of its chain, the remainder of that, whose adapter carries the text of the documents before.
        first: first target.
        last: last target.
        num_steps: optimizer steps.
        lr: learning rate of the last of them.
    """

    step: int
    kind: Literal["scored", "trained"]
    state: int
    first: int
    last: int
    num_steps: int = 0
    lr: float = 0.0


class Ledger:
    """Events of one strategy's run; `step` counts what this process did."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._step = 0

    def scored(self, first: int, last: int, state: int = SHARED) -> None:
        """Targets `first` .. `last` were scored with the shared weights and, if it is one, the adapter `state`."""
        self._add(Event(self._step, "scored", state, first, last))

    def trained(self, first: int, last: int, num_steps: int, lr: float, state: int = SHARED) -> None:
        """`state` was trained on targets `first` .. `last`."""
        self._add(Event(self._step, "trained", state, first, last, num_steps, lr))

    def synchronize(self, process: Process, first: int) -> None:
        """Join what the processes did each on its own documents since the event number `first`; all get the same record."""
        if process.world_size == 1:
            return
        parts = process.merge({process.rank: self.events[first:]})
        self.events[first:] = sorted(event for part in parts.values() for event in part)
        self._step = 1 + max((event.step for event in self.events), default=-1)

    def _add(self, event: Event) -> None:
        self.events.append(event)
        self._step += 1
