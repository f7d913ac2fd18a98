"""What the record of a run says of its order: the challenge's conditions C3, score before update, and C4, one pass from left to right.

A check is a dictionary with ``passed`` and the numbers that show it. Shapes: N targets.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lib.artifacts.files import read_csv
from lib.artifacts.scores import COLUMNS, LEDGER_FOLDER
from lib.evaluation.config import StrategyName
from lib.evaluation.ledger import SHARED, Event
from lib.evaluation.windows import Documents

Finding = dict[str, object]


def check_score_before_update(events: Sequence[Event], num_targets: int) -> Finding:
    """C3: whatever is trained on was scored before, and whatever is scored has seen only training on earlier targets.

    Args:
        events: ordered by step.
        num_targets: N.
    """
    scored = np.zeros(num_targets, np.bool_)
    trained_end = {SHARED: 0}  # state -> one past the last target that it was trained on
    trained = trained_after = total = past_only = 0
    for simultaneous in _by_step(events):
        of_kind = {kind: [event for event in simultaneous if event.kind == kind] for kind in ("scored", "trained")}
        for event in of_kind["trained"]:
            trained += event.last + 1 - event.first
            trained_after += int(np.count_nonzero(scored[event.first:event.last + 1]))
        for event in of_kind["scored"]:
            seen = max(trained_end[SHARED], trained_end.get(event.state, 0))
            total += event.last + 1 - event.first
            past_only += max(0, event.last + 1 - max(event.first, seen))
            scored[event.first:event.last + 1] = True
        for event in of_kind["trained"]:
            trained_end[event.state] = max(trained_end.get(event.state, 0), event.last + 1)
    return {"passed": trained == trained_after and total == past_only, "targets_trained": trained,
            "targets_trained_after_scoring": trained_after, "targets_scored": total, "targets_scored_from_the_past_only": past_only}


def check_single_pass(events: Sequence[Event], num_targets: int, documents: Documents, warm_start: int | None = None) -> Finding:
    """C4: every target is scored once, from left to right by each state; an adapter scores and sees only its documents.

    Args:
        events: ordered by step.
        num_targets: N.
        documents: where the stream's documents are.
        warm_start: ``evaluate.lora.warm_start``, after how many documents the next one of the same adapter comes; None for no other one.
    """
    scored = np.zeros(num_targets, np.bool_)
    ends: dict[int, int] = {}  # state -> one past the last target that it scored
    again = backwards = outside = 0
    starts, ends_of_documents = documents.start.tolist(), (documents.start + documents.length).tolist()
    for event in events:
        number = bisect_right(starts, event.first) - 1  # of the document
        is_own = event.state == SHARED or event.state == number % (warm_start or len(starts))
        end = num_targets if event.state == SHARED else ends_of_documents[number]
        outside += not (is_own and 0 <= event.first <= event.last < end)
        if event.kind == "scored":
            again += int(np.count_nonzero(scored[event.first:event.last + 1]))
            backwards += event.first < ends.get(event.state, 0)
            scored[event.first:event.last + 1] = True
            ends[event.state] = max(ends.get(event.state, 0), event.last + 1)
    missing = num_targets - int(np.count_nonzero(scored))
    return {"passed": not (again or backwards or outside or missing), "targets": num_targets, "targets_not_scored": missing,
            "targets_scored_again": again, "events": len(events), "events_backwards": backwards, "events_outside": outside}


def _by_step(events: Sequence[Event]) -> Iterator[Sequence[Event]]:
    """Runs of events with the same step, which did not see each other."""
    begin = 0
    for n in range(1, len(events) + 1):
        if n == len(events) or events[n].step != events[begin].step:
            yield events[begin:n]
            begin = n


def load_ledger(folder: Path, name: StrategyName) -> list[Event]:
    """The record of a strategy's run that evaluate wrote into its output `folder`.

    Raises:
        ArtifactError: missing, or without the columns of a record.
    """
    rows = read_csv(folder / LEDGER_FOLDER / f"{name}.csv", COLUMNS[LEDGER_FOLDER])
    return [Event(int(row["step"]), "scored" if row["kind"] == "scored" else "trained", int(row["state"]), int(row["first"]),
                  int(row["last"]), int(row["num_steps"]), float(row["lr"])) for row in rows]
