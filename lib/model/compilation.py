"""Compilation of a model's parts by ``torch.compile``: one block and not a whole model, so that all layers share its graph.

Each part has a graph for every shape that it is called with. What is compiled when, and how long it takes, is the same for training,
scoring and test-time training.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch

Backend = str | Callable[..., Any]

BACKEND: Backend = "inductor"
MAX_GRAPHS = 128  # of one part: more than torch expects of one function

T = TypeVar("T")


class _Clock:
    """Seconds that this process has spent compiling."""

    def __init__(self) -> None:
        self.seconds = self._start = 0.0

    def watch(self) -> None:
        """See to it that compilation is noticed; ``torch.compiler.reset`` forgets who wants to know."""
        from torch._dynamo.callback import callback_handler  # noqa: PLC0415 (takes seconds, and most runs compile nothing)
        if self._begin not in callback_handler.start_callbacks:
            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def _begin(self, _: object) -> None:
        self._start = time.monotonic()

    def _end(self, _: object) -> None:
        self.seconds += time.monotonic() - self._start


_CLOCK = _Clock()


def compile_seconds() -> float:
    """Seconds that this process has spent in ``torch.compile`` so far, backward passes included."""
    return _CLOCK.seconds


@cache
def _compiled(part: Callable[..., T], backend: Backend) -> Callable[..., T]:
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    torch._dynamo.config.skip_nnmodule_hook_guards = False  # a graph that was traced without hooks must not serve with them
    return torch.compile(part, fullgraph=True, dynamic=False, backend=backend)


def call(part: Callable[..., T], *arguments: Any, compiled: bool, **options: Any) -> T:
    """``part(*arguments, **options)``, of a function that exists once (it is what a graph belongs to), compiled or not."""
    if not compiled:
        return part(*arguments, **options)
    _CLOCK.watch()
    return _compiled(part, BACKEND)(*arguments, **options)
