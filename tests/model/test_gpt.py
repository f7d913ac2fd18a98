"""The forward pass against a plain reimplementation of the published description, one token and one head at a time."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from lib.errors import UserError
from lib.model.attention import rms_norm
from lib.model.blocks import Block
from lib.model.config import parse_model
from lib.model.gpt import GPT, TiedHead, build_model
from lib.model.initialization import initialize
from lib.model.sdpa import SDPA, Attend, Kernel, Sight
from lib.params import ParamsError

Array = npt.NDArray[np.float64]

FULL: dict[str, Any] = {
    "vocab_size": 40, "bos_id": 1, "document_mask": False, "num_layers": 5, "model_dim": 24, "num_heads": 4, "num_kv_heads": 2,
    "mlp_hidden_dim": 20, "rope_dims": 4, "rope_base": 10000.0, "rope_trained_tokens": 6, "q_gain_init": 1.5, "num_xsa_layers": 2,
    "smear_gate": True, "bigram_rows": 17, "bigram_dim": 8, "value_embedding_dim": 8, "value_embedding_layers": [3, 4],
    "unet_skips": True, "residual_mix": True, "ln_scale": True, "tied_head": True, "logit_softcap": 30.0, "embedding_init_std": 0.5,
    "mlp_negative_slope": 0.0, "smear_per_token": False, "skip_gates": False, "attention_gate": False, "parallel_from": None, "loop": None,
}
PLAIN = {**FULL, "num_kv_heads": 4, "rope_dims": 6, "num_xsa_layers": 0, "smear_gate": False, "bigram_rows": 0, "value_embedding_dim": 0,
         "value_embedding_layers": [], "unet_skips": False, "residual_mix": False, "ln_scale": False, "tied_head": False}
FRONTIER = {**FULL, "mlp_negative_slope": 0.5, "smear_per_token": True, "skip_gates": True, "attention_gate": True, "parallel_from": 3,
            "loop": {"first": 1, "last": 2, "passes": 3}}


def make_model(options: dict[str, Any], seed: int = 0) -> GPT:
    """A model whose every parameter is random, so that no option hides behind a zero or a one."""
    model = GPT(parse_model(options, ""))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def sigmoid(x: Array) -> Array:
    gate: Array = 1 / (1 + np.exp(-x))
    return gate


def rms(x: Array) -> Array:
    normalised: Array = x / math.sqrt(float(np.mean(x * x)) + np.finfo(np.float32).eps)
    return normalised


def rotated(x: Array, position: int, options: dict[str, Any], span: int) -> Array:
    dims, base, trained = options["rope_dims"], options["rope_base"], options["rope_trained_tokens"]
    if span > trained:
        base *= (span / trained) ** (dims / (dims - 2))
    y = x.copy()
    for i in range(dims // 2):
        angle = position / base ** (2 * i / dims)
        y[i] = x[i] * math.cos(angle) - x[i + dims // 2] * math.sin(angle)
        y[i + dims // 2] = x[i] * math.sin(angle) + x[i + dims // 2] * math.cos(angle)
    return y


def weights_of(model: GPT) -> dict[str, Array]:
    return {name: parameter.detach().double().numpy() for name, parameter in model.named_parameters()}


def document_begins(options: dict[str, Any], tokens: list[int]) -> list[int]:
    """Where the document of each token begins."""
    starts = [t for t, token in enumerate(tokens) if t == 0 or (options["document_mask"] and token == options["bos_id"])]
    return [max(start for start in starts if start <= t) for t in range(len(tokens))]


def reference_order(options: dict[str, Any]) -> list[int]:
    """The layers, one after the other."""
    order, loop = list(range(options["num_layers"])), options["loop"]
    for _ in range(loop["passes"] - 1 if loop else 0):
        order[loop["last"] + 1:loop["last"] + 1] = range(loop["first"], loop["last"] + 1)
    return order


def reference_embeddings(options: dict[str, Any], w: dict[str, Array], tokens: list[int], begin: list[int]) -> list[Array]:
    """What goes into the first layer, for each token."""
    x = []
    for t, token in enumerate(tokens):
        x.append(w["token_embedding.weight"][token].copy())
        if options["bigram_rows"]:
            row = -1 if begin[t] == t else ((36313 * token) ^ (27191 * tokens[t - 1])) % (options["bigram_rows"] - 1)
            x[t] += w["bigram.projection.weight"] @ w["bigram.table.weight"][row] * w["bigram.scale"]
    if options["smear_gate"] and options["smear_per_token"]:
        gates = [w["smear_gate.factor"] * sigmoid(w["smear_gate.weight"] @ x[t][:12]) if t and token != options["bos_id"] else 0
                 for t, token in enumerate(tokens)]
        x = [x[t] + (gates[t] * x[t - 1]) for t in range(len(tokens))]
    x = [rms(each) for each in x]
    if options["smear_gate"] and not options["smear_per_token"]:
        gate = sigmoid(w["smear_gate.gate"])
        x = [(1 - gate) * x[t] + gate * (0 if begin[t] == t else x[t - 1]) for t in range(len(tokens))]
    return x


def reference_attention(options: dict[str, Any], w: dict[str, Array], layer: int, inputs: list[Array], *,
                        tokens: list[int], begin: list[int], span: int) -> list[Array]:
    """What attention adds to each token, from its normalised inputs."""
    name, heads, kv_heads = f"blocks.{layer}.attention", options["num_heads"], options["num_kv_heads"]
    width = options["model_dim"] // heads
    queries, keys, values, added = [], [], [], []
    for t, h in enumerate(inputs):
        q = (w[name + ".query.weight"] @ h).reshape(heads, width)
        k = (w[name + ".key.weight"] @ h).reshape(kv_heads, width)
        v = w[name + ".value.weight"] @ h
        if layer in options["value_embedding_layers"]:
            factor = w["value_embedding.layer_scales"][options["value_embedding_layers"].index(layer)] * w["value_embedding.scale"]
            v = v + w["value_embedding.projection.weight"] @ w["value_embedding.table.weight"][tokens[t]] * factor
        queries.append([rotated(rms(q[n]), t, options, span) * w[name + ".q_gain"][n] for n in range(heads)])
        keys.append([rotated(rms(k[n]), t, options, span) for n in range(kv_heads)])
        values.append(v.reshape(kv_heads, width))
    for t, h in enumerate(inputs):
        outputs = []
        for n in range(heads):
            group, seen = n // (heads // kv_heads), range(max(begin[t], t + 1 - span), t + 1)
            scores = np.array([queries[t][n] @ keys[s][group] / math.sqrt(width) for s in seen])
            shares = np.exp(scores - scores.max())
            y = sum(share / shares.sum() * values[s][group] for s, share in zip(seen, shares, strict=True))
            if layer >= options["num_layers"] - options["num_xsa_layers"]:
                own = values[t][group] / np.linalg.norm(values[t][group])
                y = y - (y @ own) * own
            outputs.append(y * sigmoid(0.5 * w[name + ".gate"][n] @ h[:12]) if options["attention_gate"] else y)
        added.append(w[name + "_scale"] * (w[name + ".output.weight"] @ np.concatenate(outputs)))
    return added


def reference_mlp(options: dict[str, Any], w: dict[str, Array], layer: int, inputs: list[Array]) -> list[Array]:
    """What the MLP adds to each token, from its normalised inputs."""
    name, added = f"blocks.{layer}.mlp", []
    for h in inputs:
        hidden = w[name + ".up.weight"] @ h
        hidden = np.where(hidden > 0, hidden, options["mlp_negative_slope"] * hidden) ** 2
        added.append(w[name + "_scale"] * (w[name + ".down.weight"] @ hidden))
    return added


def reference_logits(options: dict[str, Any], weights: dict[str, Array], tokens: list[int], attention_tokens: int | None = None,
                     begin: list[int] | None = None) -> Array:
    """(T, V) logits of one sequence, written from the published description with loops and no shared code.

    `begin` says for each token where what it sees begins, in place of `document_begins`.
    """
    w, every, span = weights, range(len(tokens)), min(len(tokens), attention_tokens or len(tokens))
    begin, order = begin or document_begins(options, tokens), reference_order(options)
    x = reference_embeddings(options, w, tokens, begin)
    x0, lane = list(x), list[Array]()
    stack: list[list[Array]] = []
    for place, layer in enumerate(order):
        name, number = f"blocks.{layer}.", place - len(order) // 2
        parallel = options["parallel_from"] is not None and layer >= options["parallel_from"]
        lane = lane or (list(x) if parallel else [])
        if options["unet_skips"] and number >= 0 and stack:
            skip, popped = w["skip_weights"][number], stack.pop()
            share = sigmoid(w["skip_gates"][number]) if options["skip_gates"] else None
            x = [x[t] + skip * popped[t] if share is None else share * x[t] + (1 - share) * skip * popped[t] for t in every]
        mixed = list(x)
        if options["residual_mix"]:
            mix = w[name + "residual_mix"]
            mixed = [mix[0] * x[t] + mix[1] * x0[t] for t in every]
        scale = 1 / math.sqrt(layer + 1) if options["ln_scale"] else 1.0
        attended = reference_attention(options, w, layer, [rms(mixed[t]) * scale for t in every], tokens=tokens, begin=begin, span=span)
        read = lane if parallel else [mixed[t] + attended[t] for t in every]
        transformed = reference_mlp(options, w, layer, [rms(read[t]) * scale for t in every])
        if parallel:
            keep, give = w[name + "lane_residual"], w[name + "lane_outputs"]
            x = [keep[0] * x[t] + give[0, 0] * attended[t] + give[1, 0] * transformed[t] for t in every]
            lane = [keep[1] * lane[t] + give[0, 1] * attended[t] + give[1, 1] * transformed[t] for t in every]
        else:
            x = [mixed[t] + attended[t] + transformed[t] for t in every]
        if options["unet_skips"] and number < 0:
            stack.append(list(x))
    x = [(x[t] + lane[t]) / 2 for t in every] if lane else x
    head, cap = w["token_embedding.weight" if options["tied_head"] else "head.weight"], options["logit_softcap"]
    return np.stack([cap * np.tanh(head @ rms(x[t]) / cap) for t in every])


ARCHITECTURES = {
    "full": FULL, "plain": PLAIN, "even": {**FULL, "num_layers": 4, "value_embedding_layers": [0]},
    "one layer": {**FULL, "num_layers": 1, "num_xsa_layers": 1, "value_embedding_layers": [0]},
    "untied": {**FULL, "tied_head": False}, "documents": {**FULL, "document_mask": True},
    "frontier": FRONTIER, "frontier documents": {**FRONTIER, "document_mask": True, "num_layers": 6},
    "loop to the end": {**FULL, "loop": {"first": 3, "last": 4, "passes": 2}},
    "loop over all": {**FULL, "skip_gates": True, "loop": {"first": 0, "last": 4, "passes": 2}},
    "lanes": {**PLAIN, "parallel_from": 2, "attention_gate": True}, "lanes of one layer": {**PLAIN, "num_layers": 1, "parallel_from": 0}}


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize(("num_tokens", "attention_tokens"), [  # within and beyond the trained length, 6
    (6, None), (9, None), (13, 1), (13, 4), (13, 8), (9, 8), (9, 9), (6, 9)])
def test_logits_equal_the_published_description(options: dict[str, Any], num_tokens: int, attention_tokens: int | None) -> None:
    model = make_model(options)
    tokens = torch.randint(0, 40, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    tokens[:, 2::3] = options["bos_id"]  # an ordinary token without the document mask
    expected = np.stack([reference_logits(options, weights_of(model), row, attention_tokens) for row in tokens.tolist()])
    found = model.logits(tokens, attention_tokens=attention_tokens)
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("options", [FULL, FRONTIER, {**FRONTIER, "document_mask": True}], ids=["full", "frontier", "documents"])
@pytest.mark.parametrize("attention_tokens", [None, 11])
def test_parts_that_are_listed_see_nothing_before_them(options: dict[str, Any], attention_tokens: int | None) -> None:
    """Of two packed rows: where parts begin is given, whatever the tokens are; only the smear gate of tokens goes by BOS."""
    model, boundaries = make_model(options), [[0, 3, 4, 9], [0, 11]]
    tokens = torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(1))
    tokens[0, 3] = tokens[1, 7] = options["bos_id"]
    starts = torch.tensor([[t in row for t in range(13)] for row in boundaries])
    expected = np.stack([reference_logits(options, weights_of(model), row, attention_tokens,
                                          [max(first for first in firsts if first <= t) for t in range(13)])
                         for row, firsts in zip(tokens.tolist(), boundaries, strict=True)])
    found = model.logits(tokens, slice(2, None), attention_tokens, starts)
    np.testing.assert_allclose(found.detach().numpy(), expected[:, 2:], rtol=2e-4, atol=2e-4)
    losses = model(tokens, tokens, attention_tokens=attention_tokens, starts=starts)
    nats = -torch.from_numpy(expected).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(losses.double(), nats, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attention_tokens", [None, 1, 3])
def test_logits_at_positions_are_those_of_all_positions(options: dict[str, Any], attention_tokens: int | None) -> None:
    """Every slice, also one that counts from the end."""
    model, tokens = make_model(options).double(), torch.arange(16).view(2, 8)
    everywhere = model.logits(tokens, attention_tokens=attention_tokens)
    for positions in [slice(first, last) for first in range(8) for last in range(first + 1, 9)] + [slice(-3, None), slice(None, -3)]:
        found = model.logits(tokens, positions, attention_tokens)
        torch.testing.assert_close(found, everywhere[:, positions], rtol=0, atol=2e-6)  # rounded to fp32 before the softcap


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attention_tokens", [None, 3])
def test_gradients_of_some_positions_are_those_of_their_part_of_the_loss(options: dict[str, Any], attention_tokens: int | None) -> None:
    model, tokens, positions = make_model(options).double(), torch.arange(18).view(2, 9), slice(4, 7)
    targets = tokens + 20
    parts = (model(tokens, targets[:, positions], positions, attention_tokens),
             model(tokens, targets, attention_tokens=attention_tokens)[:, positions])
    ours, theirs = (torch.autograd.grad(part.sum(), list(model.parameters()), allow_unused=True) for part in parts)
    for name, found, expected in zip(dict(model.named_parameters()), ours, theirs, strict=True):
        assert (found is None) == (expected is None), name
        if found is not None and expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("positions", [slice(None), slice(5, 8)])
def test_attention_to_at_least_all_tokens_changes_nothing(options: dict[str, Any], positions: slice) -> None:
    model, tokens = make_model(options), torch.arange(16).view(2, 8)
    for attention_tokens in (8, 9, 1000):
        assert torch.equal(model.logits(tokens, positions, attention_tokens), model.logits(tokens, positions))


@pytest.mark.parametrize(("options", "more"), [
    (PLAIN, 0), ({**PLAIN, "smear_gate": True}, 1), ({**PLAIN, "bigram_rows": 17}, 1), (FULL, 2),
    ({**FULL, "num_layers": 1, "num_xsa_layers": 1, "value_embedding_layers": [0]}, 2),
    ({**PLAIN, "loop": {"first": 1, "last": 2, "passes": 3}}, 0),
    ({**FRONTIER, "num_layers": 3, "value_embedding_layers": [0], "parallel_from": 2, "loop": {"first": 0, "last": 1, "passes": 2}}, 2)],
    ids=["plain", "smear gate", "bigram", "full", "one layer", "loop", "frontier"])
@pytest.mark.parametrize("attention_tokens", [1, 2, 4])
def test_a_token_is_seen_exactly_as_far_as_the_layers_reach(options: dict[str, Any], more: int, attention_tokens: int) -> None:
    """Each layer reaches back by the other tokens that it attends to, each time; the smear gate and the bigram by one more each."""
    model = make_model(options).double()
    loop = options["loop"] or {"first": 0, "last": 0, "passes": 1}
    reach = (options["num_layers"] + (loop["last"] - loop["first"] + 1) * (loop["passes"] - 1)) * (attention_tokens - 1) + more
    tokens = torch.randint(2, 39, (1, reach + 5), generator=torch.Generator().manual_seed(2))
    last = slice(reach + 4, None)

    def logits(changed: int | None = None) -> torch.Tensor:
        return model.logits(tokens + (torch.arange(reach + 5) == changed if changed is not None else 0), last, attention_tokens)

    for place in range(1, reach + 5):
        assert torch.equal(logits(place), logits()) == (reach + 4 - place > reach), place


def test_loss_is_the_negative_log_probability_of_the_target() -> None:
    model, tokens = make_model(FULL), torch.arange(12).view(2, 6)
    targets = torch.tensor([[5, 1], [0, 39]])
    positions = slice(4, 6)
    probabilities = model.logits(tokens)[:, positions].softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(model(tokens, targets, positions), -probabilities.log())


@pytest.mark.parametrize("options", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("attention_tokens", [None, 1, 3])
def test_later_tokens_change_no_earlier_logit(options: dict[str, Any], attention_tokens: int | None) -> None:
    model, tokens = make_model(options), torch.arange(16).view(2, 8)
    changed = tokens.clone()
    changed[:, 5:] = 39 - changed[:, 5:]
    before, after = (model.logits(each, attention_tokens=attention_tokens) for each in (tokens, changed))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])


# Two sequences of three documents; the first begins within a document.
DOCUMENT_TOKENS = torch.tensor([
    [7, 8, 9, 20, 1, 30, 31, 9, 9, 12, 1, 14, 7, 8, 39, 2], [1, 1, 5, 6, 3, 3, 3, 8, 2, 9, 1, 4, 17, 18, 19, 20]])
DOCUMENT_PLACES = [(0, slice(0, 4)), (0, slice(4, 10)), (0, slice(10, 16)), (1, slice(0, 1)), (1, slice(1, 10)), (1, slice(10, 16))]


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attention_tokens", [None, 1, 3, 5])
@pytest.mark.parametrize("positions", [slice(None), slice(7, 13), slice(15, None), slice(-1, None)], ids=str)
def test_a_document_among_others_is_the_document_alone(
        options: dict[str, Any], attention_tokens: int | None, positions: slice) -> None:
    """Within the trained length, where the frequencies of RoPE do not depend on the number of tokens."""
    model = make_model({**options, "document_mask": True, "rope_trained_tokens": 16}).double()
    found = torch.full((2, 16, 40), torch.nan)
    found[:, positions] = model.logits(DOCUMENT_TOKENS, positions, attention_tokens)
    for row, place in DOCUMENT_PLACES:
        alone = model.logits(DOCUMENT_TOKENS[row : row + 1, place], attention_tokens=attention_tokens)[0]
        wanted = ~found[row, place, 0].isnan()
        torch.testing.assert_close(found[row, place][wanted], alone[wanted], rtol=0, atol=2e-6)
    assert (~found[..., 0].isnan()).sum() == 2 * len(range(16)[positions])


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("attention_tokens", [None, 3, 12])
@pytest.mark.parametrize("document_mask", [True, False])
def test_changing_a_document_leaves_the_bits_of_others_if_they_are_masked(
        options: dict[str, Any], attention_tokens: int | None, document_mask: bool) -> None:
    model = make_model({**options, "document_mask": document_mask})
    before = model.logits(DOCUMENT_TOKENS, attention_tokens=attention_tokens)
    changed = DOCUMENT_TOKENS.clone()
    changed[0, 5:10] = torch.tensor([22, 23, 24, 25, 26])
    after = model.logits(changed, attention_tokens=attention_tokens)
    assert torch.equal(before[0, :5], after[0, :5]) and torch.equal(before[1], after[1])
    assert not torch.equal(before[0, 5:10], after[0, 5:10])
    assert torch.equal(before[0, 10:], after[0, 10:]) == document_mask


@pytest.mark.parametrize("attention_tokens", [None, 3])
@pytest.mark.parametrize("document_mask", [True, False])
def test_no_gradient_flows_to_a_masked_document(attention_tokens: int | None, document_mask: bool) -> None:
    """Tokens that only the first document has get gradient from the others' losses only without the mask."""
    model = make_model({**FULL, "document_mask": document_mask, "tied_head": False})
    model.logits(DOCUMENT_TOKENS[:1], slice(10, None), attention_tokens).sum().backward()
    assert model.value_embedding is not None and model.bigram is not None
    for table in (model.token_embedding, model.value_embedding.table):
        gradient = table.weight.grad
        assert gradient is not None and gradient[14].any()  # of the last document
        assert gradient[12].any() == (not document_mask)  # next to it, in the second one
        assert gradient[31].any() == (not document_mask)


@pytest.mark.parametrize("options", [FULL, FRONTIER], ids=["full", "frontier"])
def test_initialisation_is_published_and_trainable(options: dict[str, Any]) -> None:
    model = GPT(parse_model(options, ""))
    initialize(model, 3)
    for name, value in {"lane_residual": 1.1, "lane_outputs": 1.0, "attention.gate": 0.0, "skip_gates": 0.0, "smear_gate.weight": 0.0,
                        "smear_gate.factor": 0.0, "skip_weights": 1.0, "q_gain": options["q_gain_init"]}.items():
        assert all((parameter == value).all() for found, parameter in model.named_parameters() if found.endswith(name)), name
    for block in model.blocks:
        assert not block.get_submodule("attention.output").get_parameter("weight").any()
        assert not block.get_submodule("mlp.down").get_parameter("weight").any()
        query = block.get_submodule("attention.query").get_parameter("weight")
        torch.testing.assert_close(query @ query.T, torch.eye(24), atol=1e-5, rtol=0)
    assert abs(model.token_embedding.weight.std().item() - 0.5) < 0.05
    assert model.value_embedding is not None and not model.value_embedding.projection.weight.any()
    # Each zero needs a non-zero partner, or it never moves.
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens = torch.arange(40).view(2, 20)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(5):
        model(tokens, tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])] == []


def test_initialisation_depends_on_the_seed_only() -> None:
    weights = []
    for seed, noise in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(noise)
        model = GPT(parse_model(FULL, ""))
        initialize(model, seed)
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_tied_head_is_the_embedding_and_has_no_weight_of_its_own() -> None:
    """As a module it has an input and an output to look at, and changes neither logits nor the parameters' names."""
    tied, tokens = make_model(FULL), torch.arange(12).view(2, 6)
    apart = make_model({**FULL, "tied_head": False})
    assert isinstance(tied.head, TiedHead)
    assert tied.state_dict().keys() == apart.state_dict().keys() - {"head.weight"}
    apart.load_state_dict({**tied.state_dict(), "head.weight": tied.token_embedding.weight})
    assert torch.equal(tied.logits(tokens), apart.logits(tokens))
    seen: list[tuple[torch.Tensor, ...]] = []
    tied.head.register_forward_hook(lambda module, arguments, output: seen.append((*arguments, output)))
    logits, (x, weight, z) = tied.logits(tokens, slice(2, 4)), seen[0]
    assert weight is tied.token_embedding.weight and x.shape == (2, 2, 24)
    torch.testing.assert_close(z, x @ weight.T)
    torch.testing.assert_close(logits, 30 * torch.tanh(z / 30))


def test_attention_is_computed_by_the_given_kernel_once_for_all_layers_but_the_last() -> None:
    sights: list[Sight] = []

    def within(sight: Sight, device: torch.device) -> Attend:
        sights.append(sight)
        return SDPA.within(sight, device)

    weights = {name: parameter.detach() for name, parameter in make_model(FULL).named_parameters()}
    model = build_model(FULL, weights, Kernel("flash2", "", within))
    model.logits(torch.arange(18).view(2, 9), slice(4, 7), 5)
    assert sights == [Sight(0, 9, 5, None), Sight(4, 7, 5, None)]
    model.logits(torch.arange(18).view(2, 9), attention_tokens=9)
    assert sights[2:] == [Sight(0, 9, None, None)]


def test_build_model_restores_a_model_and_refuses_other_weights() -> None:
    model, tokens = make_model(FULL), torch.arange(6)[None]
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert torch.equal(build_model(FULL, weights).logits(tokens), model.logits(tokens))
    with pytest.raises(ValueError, match=r"skip_weights: expected \(2, 24\), found nothing"):
        build_model(FULL, {name: weight for name, weight in weights.items() if name != "skip_weights"})
    with pytest.raises(ValueError, match=r"head\.weight: expected nothing, found \(40, 24\)"):
        build_model(FULL, {**weights, "head.weight": torch.zeros(40, 24)})
    with pytest.raises(ParamsError, match="model configuration: num_layers"):
        build_model({**FULL, "num_layers": 0}, weights)
    with pytest.raises(UserError, match="expected num_layers 1000000000000, found weights of 5 layers"):  # none is built
        build_model({**FULL, "num_layers": 10**12}, weights)
    with pytest.raises(UserError, match="model configuration: expected sizes that a model can have"):
        build_model({**FULL, "bigram_rows": 2**62}, weights)


def test_the_order_of_layers_is_published() -> None:
    """Of #1855; before the loop begins, and after it."""
    params = parse_model({**FRONTIER, "num_layers": 11, "parallel_from": 8, "loop": {"first": 3, "last": 5, "passes": 3}}, "")
    assert params.layer_order(looped=False) == list(range(11))
    assert params.layer_order() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert (GPT(params).get_parameter("skip_weights").shape, GPT(params).get_parameter("skip_gates").shape) == ((8, 24), (8, 24))


def test_a_loop_is_a_deeper_model_with_the_same_layers() -> None:
    options = {**PLAIN, "num_layers": 4, "unet_skips": True, "skip_gates": True, "residual_mix": True}
    looped, tokens = make_model({**options, "loop": {"first": 1, "last": 2, "passes": 3}}), torch.arange(18).view(2, 9)
    deep = make_model({**options, "num_layers": 8})
    deep.blocks = nn.ModuleList(looped.blocks[layer] for layer in (0, 1, 2, 1, 2, 1, 2, 3))
    for name in ("token_embedding", "skip_weights", "skip_gates", "head"):
        setattr(deep, name, getattr(looped, name))
    assert torch.equal(looped.logits(tokens), deep.logits(tokens))
    assert not torch.equal(looped(tokens, tokens), looped(tokens, tokens, looped=False))


def test_gates_at_zero_halve_what_they_scale_and_a_closed_smear_gate_is_none() -> None:
    model, tokens = make_model(FRONTIER), torch.arange(18).view(2, 9)
    plain = make_model({**FRONTIER, "smear_gate": False, "attention_gate": False})
    with torch.no_grad():
        model.get_parameter("smear_gate.factor").zero_()
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
        for layer in range(5):
            model.get_parameter(f"blocks.{layer}.attention.gate").zero_()
            plain.get_parameter(f"blocks.{layer}.attention_scale").mul_(0.5)
    torch.testing.assert_close(model.logits(tokens), plain.logits(tokens))


def test_lanes_that_nothing_tells_apart_are_one_stream() -> None:
    """With factors of 1 everywhere and no skip or mix, both lanes are x + attention + MLP of the same x."""
    model, tokens = make_model({**PLAIN, "num_layers": 1, "parallel_from": 0}).double(), torch.arange(18).view(2, 9)
    seen: dict[str, Tensor] = {}
    for name in ("attention.output", "mlp.down"):
        model.get_submodule(f"blocks.0.{name}").register_forward_hook(lambda _, inputs, output, name=name: seen.update({name: output}))
    with torch.no_grad():
        for name in ("lane_residual", "lane_outputs"):
            model.get_parameter(f"blocks.0.{name}").fill_(1)
    logits = model.logits(tokens)
    x = rms_norm(model.token_embedding(tokens)) + seen["attention.output"] + seen["mlp.down"]
    torch.testing.assert_close(logits, 30 * torch.tanh(model.head_outputs(rms_norm(x)) / 30), check_dtype=False)


@pytest.mark.parametrize(("change", "message"), [
    ({"bos_id": 40}, "bos_id: expected a token below vocab_size 40, found 40"),
    ({"num_heads": 5}, "num_heads: expected a divisor of model_dim 24"),
    ({"num_kv_heads": 3}, "num_kv_heads: expected a divisor of num_heads 4"),
    ({"rope_dims": 2}, "rope_dims: expected an even number from 4 to the head dimension 6, found 2"),
    ({"rope_dims": 5}, "rope_dims: expected an even number"),
    ({"rope_dims": 8}, "rope_dims: expected an even number"),
    ({"num_xsa_layers": 6}, "num_xsa_layers: expected at most num_layers 5"),
    ({"bigram_rows": 1}, "bigram_rows: expected 0 or at least 2"),
    ({"value_embedding_dim": 0}, "value_embedding_layers: expected at least one layer exactly when"),
    ({"value_embedding_layers": [4, 3]}, "value_embedding_layers: expected ascending layers below 5"),
    ({"value_embedding_layers": [5]}, "value_embedding_layers: expected ascending layers below 5"),
    ({"loop": {"first": 3, "last": 2, "passes": 2}}, "loop: expected layers first <= last < num_layers 5, found 3 and 2"),
    ({"loop": {"first": 3, "last": 5, "passes": 2}}, "loop: expected layers first <= last < num_layers 5, found 3 and 5"),
    ({"loop": {"first": 3, "last": 4, "passes": 1}}, "loop.passes: expected a number from 2, found 1"),
    ({"skip_gates": True, "unet_skips": False}, "skip_gates: expected false where unet_skips is"),
    ({"parallel_from": 1}, "parallel_from: expected a layer of the second half behind the loop, 2 to 4, or null, found 1"),
    ({"parallel_from": 5}, "parallel_from: expected a layer of the second half behind the loop, 2 to 4"),
    ({"parallel_from": 3, "loop": {"first": 1, "last": 3, "passes": 2}}, "parallel_from: expected a layer .* behind the loop, 4 to 4"),
])
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        parse_model({**FULL, **change}, "")


def test_under_autocast_the_residual_stream_is_bf16_and_losses_are_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = make_model(FULL), torch.arange(16).view(2, 8)
    seen: set[torch.dtype] = set()
    def watch(half: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., tuple[Tensor | None, ...]]:
        def run(*arguments: Any, **options: Any) -> tuple[Tensor | None, ...]:
            outputs = half(*arguments, **options)
            seen.update(tensor.dtype for tensor in (*arguments[1:3], *outputs) if tensor is not None)
            return outputs
        return run

    monkeypatch.setattr(Block, "attend", watch(Block.attend))
    monkeypatch.setattr(Block, "transform", watch(Block.transform))
    exact = model(tokens, tokens)
    assert seen == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(tokens, tokens)
    assert seen == {torch.bfloat16}
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.2)
    rounded.mean().backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
