"""Compilation of a model's parts by ``torch.compile``: one block and not a whole model, so that all layers share its graph.

Each part has a graph for every shape that it is called with. What is compiled when, and how long it takes, is the same for training,
scoring and test-time training.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch._dynamo.callback import on_compile_end, on_compile_start

Backend = str | Callable[..., Any]

BACKEND: Backend = "inductor"
MAX_GRAPHS = 128  # of one part: more than torch expects of one function

T = TypeVar("T")


class _Clock:
    """Seconds that this process has spent compiling."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start: float | None = None
        on_compile_start(self._begin)
        on_compile_end(self._end)

    def _begin(self, *_: Any) -> None:
        self._start = time.monotonic()

    def _end(self, *_: Any) -> None:
        if self._start is not None:
            self.seconds += time.monotonic() - self._start
        self._start = None


@cache
def _clock() -> _Clock:
    return _Clock()


def compile_seconds() -> float:
    """Seconds that this process has spent in ``torch.compile`` so far, backward passes included."""
    return _clock().seconds


@cache
def _compiled(part: Callable[..., T], backend: Backend) -> Callable[..., T]:
    _clock()
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # a graph that was traced without hooks must not serve with them
    return torch.compile(part, fullgraph=True, dynamic=False, backend=backend)


def call(part: Callable[..., T], *arguments: Any, compiled: bool) -> T:
    """``part(*arguments)``, of a function that exists once (it is what a graph belongs to), compiled or not."""
    return (_compiled(part, BACKEND) if compiled else part)(*arguments)
