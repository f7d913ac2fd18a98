"""A function applied to many items by several processes, with bounded memory and results in order."""

import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextvars import ContextVar
from multiprocessing import get_context, parent_process
from threading import Thread
from typing import Any, TypeVar

ITEMS_PER_PROCESS = 2  # underway: one that is worked on, one that waits

A = TypeVar("A")
B = TypeVar("B")

FUNCTION: ContextVar[Callable[[Any], Any]] = ContextVar("function")  # of this worker


def map_in_order(function: Callable[[A], B], items: Iterable[A], num_processes: int) -> Iterator[B]:
    """``map(function, items)`` by `num_processes` processes, or by this one if it is 1.

    `items` is read only so far ahead that every process has something to do. What the function raises is raised here, when its turn
    comes; function, items and results are pickled, the function once for each process.
    """
    if num_processes == 1:
        yield from map(function, items)
        return
    context = get_context("spawn")  # forking is unsafe beside the threads of numpy
    pool = ProcessPoolExecutor(num_processes, context, initializer=_start, initargs=(function,))
    underway: deque[Future[B]] = deque()
    try:
        for item in items:
            underway.append(pool.submit(_call, item))
            if len(underway) == ITEMS_PER_PROCESS * num_processes:
                yield underway.popleft().result()
        while underway:
            yield underway.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    FUNCTION.set(function)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and the parent ends its workers
    Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a worker of a killed parent would wait for work forever


def _call(item: Any) -> Any:
    return FUNCTION.get()(item)
