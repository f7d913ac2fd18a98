"""What ``torch.compile`` makes of a training step: graphs, passes over memory, bytes per token, and seconds of the first call.

``python -m bench.compile [--preset NAME] [--tokens T]`` compiles forward and backward pass in bf16 both ways: the parts of the model, as
train and evaluate do, and the whole model unrolled. A pass is a kernel or a product that inductor calls; bytes are what it counts that
they read and write. Bytes per token are a difference of batches of two and of one sequence, so that weights do not count.
"""

import argparse
import logging
import os
import platform
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, inductor_metrics_log
from torch._inductor.virtualized import V
from torch.fx import GraphModule

from lib.model import compilation
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.params import PARAMS_FILE
from lib.presets import load_settings

Losses = Callable[[Tensor, Tensor], Tensor]


class Step(NamedTuple):
    """One compiled step, forward and backward.

    Attributes:
        num_graphs: number of compiled graphs; forward and backward are one.
        num_passes: over memory, of a graph as often as it serves in a step.
        num_bytes: read and written by them.
        first_seconds: duration of the first step, which compiles.
        seconds: duration of the second.
    """

    num_graphs: int
    num_passes: int
    num_bytes: int
    first_seconds: float
    seconds: float


class Graphs(logging.Handler):
    """A compiler, inductor, that counts how often each of its graphs serves; and a listener to inductor's figures of them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self._figures: dict[int, list[tuple[int, int]]] = defaultdict(list)  # passes and bytes, forward and backward, by graph

    def compile(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """What ``torch.compile`` takes as a backend."""
        compiled: Any = compile_fx(graph, inputs)
        number = len(self.calls)
        self.calls.append(0)

        def run(*arguments: Any) -> Any:
            self.calls[number] += 1
            return compiled(*arguments)

        return run

    def emit(self, record: logging.LogRecord) -> None:
        """Note the figures of a graph."""
        arguments: Any = record.args
        figures = arguments if isinstance(arguments, dict) else arguments[0]
        graph: Any = V.graph
        self._figures[graph.graph_id].append((len(figures["nodes_num_elem"]), figures["num_bytes_accessed"]))

    def totals(self) -> tuple[int, int]:
        """Passes and bytes of all graphs, as often as each has served."""
        of_graphs = [figures for _, figures in sorted(self._figures.items())]
        passes, num_bytes = (sum(calls * sum(figure[n] for figure in figures) for calls, figures in zip(self.calls, of_graphs, strict=True))
                             for n in (0, 1))
        return passes, num_bytes


@contextmanager
def watched() -> Iterator[Graphs]:
    """Within the context nothing is taken from a cache, and what is compiled is noted."""
    graphs, level, propagate = Graphs(), inductor_metrics_log.level, inductor_metrics_log.propagate
    torch.compiler.reset()
    inductor_metrics_log.setLevel(logging.INFO)
    inductor_metrics_log.propagate = False
    inductor_metrics_log.addHandler(graphs)
    try:
        # Concatenations are fused with what reads them, as on GPUs.
        with (tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
              config.patch(force_disable_caches=True, force_pointwise_cat=True), patch.object(compilation, "BACKEND", graphs.compile)):
            yield graphs
    finally:
        inductor_metrics_log.removeHandler(graphs)
        inductor_metrics_log.setLevel(level)
        inductor_metrics_log.propagate = propagate
        torch.compiler.reset()


def measure(model: GPT, rows: Tensor, *, whole: bool) -> Step:
    """Compile and make two steps on `rows` (B, T+1), with graphs of the `whole` model or of its parts."""
    with watched() as graphs:
        losses_of: Losses = torch.compile(model, fullgraph=True, backend=graphs.compile) if whole else partial(model, compiled=True)
        seconds = []
        for _ in range(2):
            graphs.calls[:] = [0] * len(graphs.calls)
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16):
                losses = losses_of(rows[:, :-1], rows[:, 1:])
            losses.mean().backward()
            seconds.append(time.perf_counter() - start)
        return Step(len(graphs.calls), *graphs.totals(), *seconds)


def main(arguments: list[str] | None = None) -> None:
    """Measure both ways and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default=str(PARAMS_FILE), help="name of a preset, or a complete parameter file (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence (default: %(default)s)")
    parser.add_argument("--parts-only", action="store_true", help="leave out the whole model, which torch 2.11 cannot trace")
    options = parser.parse_args(arguments)
    params = load_settings(options.preset).model.architecture
    model = GPT(params)
    initialize(model, 0)
    rows = torch.randint(0, params.vocab_size, (2, options.tokens + 1), generator=torch.Generator().manual_seed(0))
    print(f"torch {torch.__version__}, cpu {platform.machine()}, {torch.get_num_threads()} threads; {options.preset}, {params.num_layers} "
          f"layers, forward and backward in bf16, {options.tokens} tokens a sequence")
    print(f"{'':14}{'graphs':>8}{'passes':>8}{'KB/token':>10}{'first call, s':>15}{'second, s':>11}")
    for name, whole in [("parts", False)] if options.parts_only else [("whole model", True), ("parts", False)]:
        one, two = (measure(model, rows[:size], whole=whole) for size in (1, 2))
        per_token = (two.num_bytes - one.num_bytes) / options.tokens / 1000
        print(f"{name:14}{one.num_graphs:8}{one.num_passes:8}{per_token:10.0f}{one.first_seconds:15.1f}{one.seconds:11.2f}", flush=True)


if __name__ == "__main__":
    main()
