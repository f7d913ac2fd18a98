import pytest

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.ledger import SHARED, Event, Ledger
from tests.processes import run_processes


def test_events_are_numbered_in_the_order_in_which_they_happen() -> None:
    ledger = Ledger()
    ledger.scored(0, 9)
    ledger.trained(0, 7, 3, 0.01)
    ledger.scored(10, 19, 4)
    ledger.trained(10, 15, 2, 0.5, 4)
    assert ledger.events == [
        Event(step=0, kind="scored", state=SHARED, first=0, last=9, num_steps=0, lr=0.0),
        Event(step=1, kind="trained", state=SHARED, first=0, last=7, num_steps=3, lr=0.01),
        Event(step=2, kind="scored", state=4, first=10, last=19, num_steps=0, lr=0.0),
        Event(step=3, kind="trained", state=4, first=10, last=15, num_steps=2, lr=0.5)]
    assert SHARED not in range(1000)  # no document has this number


@pytest.mark.parametrize("first", [0, 1])
def test_one_process_has_nothing_to_join(first: int) -> None:
    ledger = Ledger()
    ledger.scored(5, 9, 1)
    ledger.scored(0, 4, 0)
    before = list(ledger.events)
    ledger.synchronize(SINGLE_CPU, first)
    ledger.scored(10, 19)
    assert ledger.events == [*before, Event(2, "scored", SHARED, 10, 19)]


def _join(process: Process) -> None:
    """All score and train together, then rank 0 scores documents 0 and 2, rank 1 document 1, and does not train on it."""
    ledger = Ledger()
    ledger.scored(0, 9)
    ledger.trained(0, 9, 1, 0.1)
    for document in (0, 2) if process.rank == 0 else (1,):
        ledger.scored(10 + document, 10 + document, document)
        if process.rank == 0:
            ledger.trained(10 + document, 10 + document, 1, 0.2, document)
    ledger.synchronize(process, 2)
    joined = [
        Event(0, "scored", SHARED, 0, 9), Event(1, "trained", SHARED, 0, 9, 1, 0.1), Event(2, "scored", 0, 10, 10),
        Event(2, "scored", 1, 11, 11), Event(3, "trained", 0, 10, 10, 1, 0.2), Event(4, "scored", 2, 12, 12),
        Event(5, "trained", 2, 12, 12, 1, 0.2)]
    assert ledger.events == joined
    ledger.trained(0, 19, 1, 0.3)  # after all of it, in both
    assert ledger.events[-1] == Event(6, "trained", SHARED, 0, 19, 1, 0.3)
    ledger.synchronize(process, len(ledger.events))  # nothing new in either
    assert ledger.events[:-1] == joined and len(ledger.events) == 8
    ledger.scored(20, 29)
    assert ledger.events[-1].step == 7
    empty = Ledger()
    empty.synchronize(process, 0)
    empty.scored(0, 0)
    assert empty.events == [Event(0, "scored", SHARED, 0, 0)]


@pytest.mark.slow
def test_two_processes_get_the_record_of_both_in_order() -> None:
    run_processes(_join, 2)
