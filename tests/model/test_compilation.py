"""Compiled parts of a model: the results of eager ones, few graphs, and none that serves where it must not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from lib.data.rows import find_parts
from lib.model import compilation
from lib.model.attention import ALL_POSITIONS
from lib.model.compilation import compile_seconds
from lib.model.config import parse_model
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.linear import LowRank
from tests.model.test_gpt import FRONTIER, FULL, PLAIN

Result = tuple[Tensor, ...]


class Counting:
    """A compiler that makes nothing of a graph but counts it."""

    def __init__(self) -> None:
        self.num_graphs = 0

    def __call__(self, graph: GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        self.num_graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    compiler = Counting()
    monkeypatch.setattr(compilation, "BACKEND", compiler)
    yield compiler
    torch.compiler.reset()


def make_model(**changes: Any) -> GPT:
    model = GPT(parse_model(FULL | changes, "model."))
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def make_rows(model: GPT, num_rows: int = 2, num_tokens: int = 9) -> Tensor:
    return torch.randint(0, model.params.vocab_size, (num_rows, num_tokens + 1), generator=torch.Generator().manual_seed(2))


def losses(model: GPT, *, compiled: bool, positions: slice = ALL_POSITIONS, window: int | None = None) -> Tensor:
    rows = make_rows(model)
    found: Tensor = model(rows[:, :-1], rows[:, 1:][:, positions], positions, window, compiled=compiled)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("options", "positions", "window"), [
    (FULL, slice(5, 9), None), (FULL, ALL_POSITIONS, 3), (PLAIN, ALL_POSITIONS, None), (PLAIN, slice(0, 4), 3),
    (FRONTIER, slice(5, 9), None), (FRONTIER, ALL_POSITIONS, 3),
    ({"document_mask": True}, ALL_POSITIONS, None), ({"document_mask": True}, slice(0, 4), 3)])
def test_losses_and_gradients_are_those_of_the_eager_model(options: dict[str, Any], positions: slice, window: int | None,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    model, results = make_model(**options), list[Result]()
    for compiled in (False, True):
        found = losses(model, compiled=compiled, positions=positions, window=window)
        results.append((found, *torch.autograd.grad(found.mean(), list(model.parameters()))))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_layers", [7, 13])
def test_layers_share_graphs(num_layers: int, counting: Counting) -> None:
    """Start and losses; the first half of a block without and with a value embedding; the second half where its output is kept for a
    skip, where the next block adds it to itself, adds an earlier one or none, and where the head follows."""
    for _ in range(2):  # other weights need no other graphs
        model = make_model(num_layers=num_layers, num_xsa_layers=num_layers, value_embedding_layers=[num_layers - 2, num_layers - 1])
        losses(model, compiled=True)
        assert counting.num_graphs == 2 + 2 + 5


def test_repetitions_and_lanes_share_graphs(counting: Counting) -> None:
    """Start and losses; the first half of a block, and of a parallel one; the second half where its output is kept for a skip, where a gate
    mixes it with itself or with an earlier one, where none does, before the first parallel block, between two, and before the head. Before
    the loop begins skips are at other blocks, which differ in nothing that a graph is made for."""
    model = make_model(**{**FRONTIER, "num_layers": 11, "num_xsa_layers": 11, "value_embedding_dim": 0, "value_embedding_layers": [],
                          "parallel_from": 8, "loop": {"first": 3, "last": 5, "passes": 3}})
    rows = make_rows(model)
    for looped in (True, False):
        model(rows[:, :-1], rows[:, 1:], looped=looped, compiled=True)
    assert counting.num_graphs == 2 + 2 + 7


@pytest.mark.slow
@pytest.mark.parametrize("options", [FULL, FRONTIER], ids=["full", "frontier"])
def test_other_parts_of_a_length_need_no_new_graph_and_another_length_those_of_attention(options: dict[str, Any],
                                                                                         counting: Counting) -> None:
    model, found = make_model(**options), list[int]()
    for span in (3, 5, 3, 5):
        for seed in range(2):
            rows = torch.randint(0, 4, (2, 17), generator=torch.Generator().manual_seed(seed))
            starts = find_parts(rows[:, :-1], 1, span)
            model(rows[:, :-1], rows[:, 1:], attention_tokens=span, starts=starts, compiled=True)
            found.append(counting.num_graphs)
    assert len(set(found[:2])) == 1 and len(set(found[2:])) == 1
    assert found[2] - found[1] == 3, "the start, and two first halves of blocks"


def attach_adapters(model: GPT) -> Callable[[], None]:
    generator, width = torch.Generator().manual_seed(3), model.params.model_dim
    for layer in ("query", "attention", "mlp"):
        model.adapters[layer] = [LowRank(torch.randn(3, 2, width, generator=generator), torch.randn(3, width, 2, generator=generator))
                                 for _ in model.params.layer_order()]
    return model.adapters.clear


def attach_hooks(model: GPT) -> Callable[[], None]:
    handles = [module.register_forward_hook(lambda _, inputs, output: output * 1.5)
               for module in model.modules() if isinstance(module, nn.Linear)]

    def detach() -> None:
        for handle in handles:
            handle.remove()
    return detach


@pytest.mark.slow
@pytest.mark.parametrize("attach", [attach_adapters, attach_hooks])
@torch.no_grad()
def test_graphs_without_adapters_or_hooks_do_not_serve_with_them(attach: Callable[[GPT], Callable[[], None]]) -> None:
    """At the same shapes, which torch 2.11 does not look beyond by itself."""
    model = make_model()
    without = losses(model, compiled=True)
    detach = attach(model)
    eager, compiled = (losses(model, compiled=compiled) for compiled in (False, True))
    torch.testing.assert_close(compiled, eager)
    assert (compiled - without).abs().max() > 0.05
    detach()
    torch.testing.assert_close(losses(model, compiled=True), without)


def test_adapters_that_come_again_need_no_new_graph(counting: Counting) -> None:
    model = make_model()
    attach_adapters(model)()
    attach_adapters(model)
    losses(model, compiled=True)
    known = counting.num_graphs
    attach_adapters(model)
    losses(model, compiled=True)
    assert counting.num_graphs == known


def test_time_of_compilation_is_counted_and_nothing_else() -> None:
    model = make_model()
    before = compile_seconds()
    losses(model, compiled=True)
    after = compile_seconds()
    losses(model, compiled=True)
    losses(model, compiled=False)
    assert before < after == compile_seconds()
