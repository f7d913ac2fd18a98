import copy
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from lib.distributed import SINGLE_CPU
from lib.evaluation.config import LoraParams
from lib.evaluation.evaluation import Outcome, run_strategy
from lib.evaluation.lora import LowRankAdapters, adapted_layers, document_work
from lib.evaluation.windows import Documents
from lib.model import compilation
from lib.model.attention import Attention
from lib.model.blocks import MLP
from lib.model.gpt import GPT
from tests.evaluation.tiny import FRONTIER, make_job, make_model, make_params, make_tokens

STARTS = (0, 13, 14, 30, 47, 60, 83)
NUM_TARGETS = 91
LENGTHS = np.diff([*STARTS, NUM_TARGETS]).tolist()  # 13, 1, 16, 17, 13, 23, 8
PATHS = {"query": "attention.query", "key": "attention.key", "value": "attention.value", "output": "attention.output",
         "attention": "attention", "up": "mlp.up", "down": "mlp.down", "mlp": "mlp"}
LAYERS = [*PATHS, "head"]


class AdamByHand:
    """arXiv:1412.6980, algorithm 1; the weights decay apart from the gradient (arXiv:1711.05101)."""

    def __init__(self, parameters: list[Tensor], settings: LoraParams) -> None:
        self.parameters, self.settings, self.num_steps = parameters, settings, 0
        self.moments = [(torch.zeros_like(parameter), torch.zeros_like(parameter)) for parameter in parameters]

    def step(self, gradients: tuple[Tensor, ...]) -> None:
        self.num_steps += 1
        (beta1, beta2), lr, n = self.settings.adam_betas, self.settings.lr, self.num_steps
        for parameter, gradient, (first, second) in zip(self.parameters, gradients, self.moments, strict=True):
            first.copy_(beta1 * first + (1 - beta1) * gradient)
            second.copy_(beta2 * second + (1 - beta2) * gradient**2)
            parameter.data *= 1 - lr * self.settings.weight_decay
            parameter.data -= lr * (first / (1 - beta1**n)) / ((second / (1 - beta2**n)).sqrt() + self.settings.adam_eps)


def attach_by_hand(model: GPT, adapters: dict[tuple[str, int], tuple[Tensor, Tensor]], factor: float) -> None:
    """Hooks that add the products of adapters, by layer and number of the pass: a module counts the passes of its block by itself."""
    def add(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any], outputs: Tensor, of_passes: Iterator[Any]) -> Tensor:
        x, scale, (a, b) = inputs[0], options.get("row_scale"), next(of_passes)
        if isinstance(module, Attention):
            x, scale = x[:, inputs[2].first : inputs[2].last], inputs[3]
        elif isinstance(module, MLP):
            scale = inputs[1]
        change = factor * (x @ a.T @ b.T)
        return outputs + (change if scale is None else scale * change)

    order = model.params.layer_order()
    for layer in {layer for layer, _ in adapters}:
        for block in set(order):
            module = model.head if layer == "head" else model.get_submodule(f"blocks.{block}.{PATHS[layer]}")
            numbers = [0] if layer == "head" else [number for number, its_block in enumerate(order) if its_block == block]
            if layer != "head" or block == 0:
                module.register_forward_hook(partial(add, of_passes=itertools.cycle([adapters[layer, number] for number in numbers])),
                                             with_kwargs=True)


def adapt_by_hand(model: GPT, document: Tensor, settings: LoraParams, chain: dict[tuple[str, int], Tensor]) -> npt.NDArray[np.float32]:
    """One document alone: low-rank products are added to outputs; an Adam step on each chunk but the last.

    Args:
        model: without adapters.
        document: (N+1,) its tokens and the one after them.
        settings: of lora.
        chain: the A that an earlier document has left, if one has; this one leaves its own.
    """
    model, num_targets, adapters = copy.deepcopy(model), len(document) - 1, dict[tuple[str, int], tuple[Tensor, Tensor]]()
    generator = torch.Generator().manual_seed(0)
    for layer in settings.layers:
        weight = model.token_embedding.weight if layer == "head" else getattr(model.blocks[0].get_submodule(PATHS[layer]), "weight", None)
        num_outputs, num_inputs = (model.params.model_dim,) * 2 if weight is None else weight.shape
        for number in range(1 if layer == "head" else len(model.params.layer_order())):
            a = (torch.rand(settings.rank, num_inputs, generator=generator) * 2 - 1) / math.sqrt(num_inputs)
            a, b = chain.get((layer, number), a), torch.zeros(num_outputs, settings.rank)
            adapters[layer, number] = a.requires_grad_(), b.requires_grad_()
    attach_by_hand(model, adapters, (settings.alpha or settings.rank) / settings.rank)
    trained = [matrix for pair in adapters.values() for matrix in pair]
    optimizer, nats = AdamByHand(trained, settings), np.empty(num_targets, np.float32)
    for first in range(0, num_targets, settings.chunk_tokens):
        end = min(first + settings.chunk_tokens, num_targets)
        start = max(0, first + settings.chunk_tokens - settings.window_tokens)

        def score(start: int = start, first: int = first, end: int = end) -> Tensor:
            return model(document[None, start:end], document[None, start + 1 : end + 1])[0, first - start :]

        nats[first:end] = score().detach()
        for _ in range(settings.steps if end < num_targets else 0):
            optimizer.step(torch.autograd.grad(score().mean(), trained))
    chain.update({place: a.detach() for place, (a, _) in adapters.items()})
    return nats


def adapt_all_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], settings: LoraParams) -> npt.NDArray[np.float32]:
    stream = torch.from_numpy(tokens.astype(np.int64))
    bounds = [*np.flatnonzero(tokens[:-1] == 1).tolist(), len(tokens) - 1]
    chains: list[dict[tuple[str, int], Tensor]] = [{} for _ in bounds]
    return np.concatenate([adapt_by_hand(model, stream[begin : end + 1], settings, chains[number % (settings.warm_start or len(bounds))])
                           for number, (begin, end) in enumerate(itertools.pairwise(bounds))])


def run(tokens: npt.NDArray[np.uint16] | None = None, model: GPT | None = None, **settings: Any) -> Outcome:
    tokens = make_tokens(NUM_TARGETS, starts=STARTS) if tokens is None else tokens
    return run_strategy("lora", make_job(model or make_model(), tokens, make_params(lora=settings)))


@pytest.mark.parametrize(("settings", "model"), [
    ({}, {}),
    ({"batch_documents": 1, "steps": 2}, {"tied_head": False}),
    ({"batch_documents": 4, "steps": 2, "chunk_tokens": 8, "rank": 1}, {}),
    ({"chunk_tokens": 5, "window_tokens": 13, "batch_documents": 3}, {"rope_trained_tokens": 16}),
    # Without attention: an input that attends to nothing but itself has gradients of rounding errors, which Adam makes as large as lr.
    ({"chunk_tokens": 1, "window_tokens": 3, "lr": 0.05, "batch_documents": 9, "layers": ["up", "head"]}, {}),
    ({"layers": LAYERS, "adam_betas": [0.5, 0.99]}, {}),
    ({"layers": LAYERS[::-1], "batch_documents": 3}, {"tied_head": False, "num_kv_heads": 2}),
    ({"layers": ["head"], "lr": 0.03}, {"tied_head": False}),
    ({"layers": LAYERS}, FRONTIER),  # one for every pass of the loop
    ({"layers": ["key", "attention", "mlp", "head"], "alpha": 3, "adam_betas": [0, 0.99], "adam_eps": 1e-4, "weight_decay": 5.0}, FRONTIER),
    ({"weight_decay": 20.0, "steps": 2}, {}),
    ({"warm_start": 1, "lr": 0.03}, {}),
    ({"warm_start": 2, "weight_decay": 5.0, "lr": 0.03}, FRONTIER),
    ({"warm_start": 3, "batch_documents": 2, "steps": 2}, {}),
    ({"warm_start": 4, "batch_documents": 9}, {}),
    *(({"layers": [layer], "lr": 0.03}, {}) for layer in LAYERS)])
def test_scores_are_those_of_products_added_to_outputs_for_one_document_after_the_other(settings: dict[str, Any],
                                                                                            model: dict[str, Any]) -> None:
    tokens = make_tokens(NUM_TARGETS, starts=STARTS)
    nats = run(tokens, make_model(**model), **settings).nats
    assert nats == pytest.approx(adapt_all_by_hand(make_model(**model), tokens, make_params(lora=settings).lora), abs=3e-4)
    assert np.abs(nats - run(tokens, make_model(**model), **settings | {"lr": 0.0}).nats).max() > 0.01  # it did adapt


def test_the_record_names_the_chain_whose_adapter_carries_earlier_documents() -> None:
    events = run(make_tokens(26, starts=(0, 9, 14)), warm_start=2).events
    assert {(event.state, bisect_right((0, 9, 14), event.first) - 1) for event in events} == {(0, 0), (1, 1), (0, 2)}


@pytest.mark.parametrize("settings", [{}, {"window_tokens": 9, "chunk_tokens": 6}])
def test_without_learning_rate_every_document_is_scored_alone_and_as_if_nothing_was_attached(settings: dict[str, Any]) -> None:
    tokens, model = make_tokens(NUM_TARGETS, starts=STARTS), make_model(rope_trained_tokens=16)
    expected = np.empty(NUM_TARGETS, np.float32)
    chunk, window = settings.get("chunk_tokens", 4), settings.get("window_tokens", 8)
    for begin, length in zip(STARTS, LENGTHS, strict=True):
        document = torch.from_numpy(tokens[begin : begin + length + 1].astype(np.int64))
        for first in range(0, length, chunk):
            end, start = min(first + chunk, length), max(0, first + chunk - window)
            with torch.no_grad():
                nats = model(document[None, start:end], document[None, start + 1 : end + 1])
            expected[begin + first : begin + end] = nats[0, first - start :]
    assert run(tokens, model, lr=0.0, **settings).nats == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("warm_start", [None, 1, 3, 5])
@pytest.mark.parametrize("batch_documents", [1, 3, 7, 20])
def test_scores_do_not_depend_on_how_many_documents_share_a_batch(batch_documents: int, warm_start: int | None) -> None:
    nats = run(batch_documents=batch_documents, warm_start=warm_start, weight_decay=5.0).nats
    assert nats == pytest.approx(run(warm_start=warm_start, weight_decay=5.0).nats, abs=1e-5)


def test_with_a_warm_start_documents_change_later_ones_of_their_chain_alone() -> None:
    tokens, changed = make_tokens(NUM_TARGETS, starts=STARTS), make_tokens(NUM_TARGETS, starts=STARTS)
    changed[1:13] = changed[1:13][::-1]  # of document 0
    differs = run(tokens, warm_start=3).nats != run(changed, warm_start=3).nats
    assert [differs[first : first + length].any() for first, length in zip(STARTS, LENGTHS, strict=True)] == [
        number % 3 == 0 for number in range(len(STARTS))]


def test_scores_do_not_depend_on_the_order_of_documents() -> None:
    tokens = make_tokens(NUM_TARGETS, starts=(*STARTS, NUM_TARGETS))  # so that BOS follows every document
    documents = np.split(tokens[:-1], STARTS[1:])
    order = [4, 2, 6, 0, 1, 5, 3]
    permuted = np.concatenate([*(documents[number] for number in order), tokens[-1:]])
    expected = np.split(run(tokens).nats, STARTS[1:])
    assert run(permuted).nats == pytest.approx(np.concatenate([expected[number] for number in order]), abs=1e-5)


@pytest.mark.parametrize("kept", range(len(STARTS)))
def test_no_document_changes_the_scores_of_another_by_a_single_bit(kept: int) -> None:
    tokens = make_tokens(NUM_TARGETS, starts=STARTS)
    others = make_tokens(NUM_TARGETS, seed=1, starts=STARTS)
    place = slice(STARTS[kept], STARTS[kept] + LENGTHS[kept])
    others[place.start : place.stop + 1] = tokens[place.start : place.stop + 1]
    nats, changed = run(tokens).nats, run(others).nats
    assert np.array_equal(nats[place], changed[place])
    assert not np.array_equal(nats, changed)


def test_the_model_sees_nothing_of_another_document() -> None:
    model, rows = make_model(), list[list[int]]()
    model.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs[0].tolist()))
    run(model=model)
    after_documents = [row[place + 1 :] for row in rows for place in range(1, len(row)) if row[place] == 1]  # 1: BOS of the next one
    assert sum(map(len, after_documents)) > 0
    assert not any(any(tokens) for tokens in after_documents)


def test_adaptation_lowers_the_loss_of_a_document_that_repeats_itself_but_not_of_the_next_one() -> None:
    document = make_tokens(7)
    tokens = np.concatenate([document, np.tile(document[1:], 12), document, np.tile(document[1:], 12), document[:1]])
    nats = np.split(run(tokens, layers=LAYERS, lr=0.03, steps=3).nats, 2)
    assert nats[0][-16:].mean() < 0.5 * nats[0][8:24].mean()
    assert nats[1] == pytest.approx(nats[0], abs=1e-4)


def test_the_record_has_each_document_s_chunks_scored_and_then_trained_on_but_the_last() -> None:
    outcome = run(make_tokens(26, starts=(0, 9, 14)), steps=3)  # 9, 5 and 12 targets in chunks of 4: document 2 and 0 first, then 1

    def scored(state: int, first: int, last: int) -> tuple[Any, ...]:
        return "scored", state, first, last, 0, 0.0

    def trained(state: int, first: int, last: int) -> tuple[Any, ...]:
        return "trained", state, first, last, 3, 0.01

    assert [event[1:] for event in outcome.events] == [
        scored(2, 14, 17), scored(0, 0, 3), trained(2, 14, 17), trained(0, 0, 3), scored(2, 18, 21), scored(0, 4, 7), trained(2, 18, 21),
        trained(0, 4, 7), scored(2, 22, 25), scored(0, 8, 8), scored(1, 9, 12), trained(1, 9, 12), scored(1, 13, 13)]
    assert [event.step for event in outcome.events] == list(range(13))


def test_the_context_of_every_target_lies_in_its_document() -> None:
    expected = [place if place < 8 else 4 + place % 4 for length in LENGTHS for place in range(length)]
    assert run().context.tolist() == expected


def test_every_adapter_starts_uniform_and_equal_and_adds_nothing() -> None:
    model, settings = make_model(), make_params(lora={"rank": 5, "layers": LAYERS, "batch_documents": 3}).lora
    adapters = LowRankAdapters(model, settings, SINGLE_CPU.device)
    with torch.no_grad():
        for parameter in adapters.parameters:
            parameter.add_(1.0)
    adapters.reset(None)
    down, up = adapters.parameters[0::2], adapters.parameters[1::2]
    assert all((parameter == 0).all() for parameter in up)
    assert all(torch.equal(parameter[0], parameter[n]) for parameter in down for n in range(3))
    uniform = torch.cat([(parameter[0] * math.sqrt(parameter.shape[2])).flatten() for parameter in down]).sort().values
    assert (uniform - torch.linspace(-1, 1, len(uniform))).abs().max() < 0.1  # distance of Kolmogorov and Smirnov, times 2
    assert len(uniform.unique()) == len(uniform)


@pytest.mark.parametrize("tied", [True, False])
def test_the_number_of_parameters_is_that_of_one_document_s_matrices(tied: bool) -> None:
    adapters = LowRankAdapters(make_model(tied_head=tied), make_params(lora={"layers": ["key", "up", "head"]}).lora, SINGLE_CPU.device)
    assert adapters.num_parameters == 2 * (3 * (16 + 8) + 3 * (16 + 24) + (16 + 32))


def test_a_layer_that_the_model_has_not_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"evaluate.lora.layers: gate: the model has no such layer"):
        adapted_layers(make_model(), ("query", "gate"))


def test_no_hook_and_no_gradient_is_left_and_the_mode_is_that_of_scoring() -> None:
    model = make_model()
    seen = set()
    watch = model.register_forward_pre_hook(lambda module, _: seen.add((module.training, any(p.requires_grad for p in model.parameters()))))
    run(model=model)
    watch.remove()
    assert seen == {(False, False)}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("lengths", "steps", "expected"), [
    ([3], 1, 4), ([4], 1, 4), ([5], 1, 4 * 3 + 8), ([5], 2, 4 * 6 + 8), ([12], 1, 4 * 3 + 8 * 3 + 8), ([3, 5], 1, 4 * (3 + 1) + 8)])
def test_work_is_three_times_the_inputs_of_trained_chunks_for_each_step(lengths: list[int], steps: int, expected: int) -> None:
    documents = Documents(np.cumsum([0, *lengths[:-1]]), np.array(lengths))
    assert document_work(documents, make_params(lora={"steps": steps}).lora) == expected


@pytest.mark.slow
@pytest.mark.parametrize(("window_tokens", "rope_trained_tokens", "lengths"), [(16, 16, {4, 8, 12, 16}), (12, 8, {4, 8, 10, 12})])
def test_compiled_documents_have_the_scores_of_eager_ones(window_tokens: int, rope_trained_tokens: int, lengths: set[int],
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """All forward passes run compiled, on few shapes up to the length from which on the rotation changes with it."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")  # traced, and then run as it is
    params = make_params(lora={"batch_documents": 5, "window_tokens": window_tokens, "chunk_tokens": 2})
    scores = []
    for compiled in (False, True):
        model, shapes = make_model(rope_trained_tokens=rope_trained_tokens), set[tuple[int, ...]]()
        model.register_forward_pre_hook(
            lambda _, inputs, options: shapes.add((*inputs[0].shape, options["compiled"])), with_kwargs=True)  # noqa: B023
        job = make_job(model, make_tokens(NUM_TARGETS, starts=STARTS), params)
        job.forward.compiled = compiled
        scores.append(run_strategy("lora", job).nats)
        assert {shape[2] for shape in shapes} == {compiled}
        if compiled:
            assert {shape[0] for shape in shapes} == {2, 5}
            assert {shape[1] for shape in shapes} == lengths
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-4)
    torch.compiler.reset()
