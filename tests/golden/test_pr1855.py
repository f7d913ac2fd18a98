"""The architecture of entry #1855 beside what its own classes computed: logits, loss and gradients of one small model.

`pr1855_model.safetensors` holds all weights, 61 tokens of three documents, logits with and without the loop, with documents joined and
apart, and gradients of the loss with both; of matrices of layers those of two rows. `pr1855_adapter.safetensors` holds two documents in
two rows, their adapters of rank 8 and alpha 144, A and B of each layer in each of the 17 passes of blocks, and the losses.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from lib.model.gpt import GPT, build_model
from lib.model.linear import LowRank

ADAPTER = load_file(Path(__file__).parent / "pr1855_adapter.safetensors")
GOLDEN = load_file(Path(__file__).parent / "pr1855_model.safetensors")
TOKENS = GOLDEN["tokens"][None]
DOCUMENTS = [0, 17, 41]
MODEL: dict[str, Any] = {
    "vocab_size": 97, "bos_id": 1, "document_mask": False, "num_layers": 11, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2,
    "mlp_hidden_dim": 256, "mlp_negative_slope": 0.5, "rope_dims": 16, "rope_base": 10000.0, "rope_trained_tokens": None,
    "q_gain_init": 5.0, "num_xsa_layers": 11, "smear_gate": True, "smear_per_token": True, "bigram_rows": 0, "bigram_dim": 1,
    "value_embedding_dim": 0, "value_embedding_layers": [], "unet_skips": True, "skip_gates": True, "attention_gate": True,
    "parallel_from": 8, "loop": {"first": 3, "last": 5, "passes": 3}, "residual_mix": True, "ln_scale": True, "tied_head": True,
    "logit_softcap": 30.0, "embedding_init_std": 0.005}
NAMES = {"q": "attention.query.weight", "k": "attention.key.weight", "v": "attention.value.weight", "o": "attention.output.weight",
         "up": "mlp.up.weight", "down": "mlp.down.weight", "q_gain": "attention.q_gain", "gate": "attention.gate", "mix": "residual_mix",
         "attn_scale": "attention_scale", "mlp_scale": "mlp_scale"}
TABLES = {"tok": "token_embedding.weight", "smear_w": "smear_gate.weight", "smear_lambda": "smear_gate.factor",
          "skip_weights": "skip_weights", "skip_gates": "skip_gates"}
SHAPES = {"smear_w": (12,), "smear_lambda": ()}
SIGNS = torch.tensor([1.0] * 8 + [-1.0] * 8)  # the published rotation is by minus the angle


def read(kind: str) -> dict[str, Tensor]:
    """Weights or gradients by this project's names."""
    found = {name: GOLDEN[f"{kind}/{key}"].reshape(SHAPES.get(key, GOLDEN[f"{kind}/{key}"].shape)) for key, name in TABLES.items()}
    for layer in range(11):
        found |= {f"blocks.{layer}.{name}": GOLDEN[f"{kind}/blocks.{layer}.{key}"] for key, name in NAMES.items()}
        if layer >= 8:
            found |= {f"blocks.{layer}.lane_residual": GOLDEN[f"{kind}/lane_resid"][layer],
                      f"blocks.{layer}.lane_outputs": GOLDEN[f"{kind}/lane_post"][layer]}
    return found


def make_model(**changes: Any) -> GPT:
    weights = read("weight")
    for layer in range(11):
        for name in ("query", "key"):
            matrix = weights[f"blocks.{layer}.attention.{name}.weight"]
            weights[f"blocks.{layer}.attention.{name}.weight"] = matrix * SIGNS.repeat(len(matrix) // 16)[:, None]
    if changes.get("loop", True) is None:
        weights |= {name: weights[name][:5] for name in ("skip_weights", "skip_gates")}
    return build_model(MODEL | changes, weights)


@pytest.mark.parametrize("loop", [None, MODEL["loop"]], ids=["plain", "loop"])
@pytest.mark.parametrize("documents", [True, False], ids=["documents", "joined"])
def test_logits(loop: dict[str, int] | None, documents: bool) -> None:
    expected = GOLDEN[f"logits/{'loop' if loop else 'plain'}/{'documents' if documents else 'joined'}"][None]
    found = make_model(loop=loop, document_mask=documents).logits(TOKENS[:, :-1])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    if documents:  # the same from the list of where they begin
        starts = torch.zeros(1, 60, dtype=torch.bool).index_fill(1, torch.tensor(DOCUMENTS), True)
        torch.testing.assert_close(make_model(loop=loop).logits(TOKENS[:, :-1], starts=starts), expected, rtol=0, atol=1e-4)


def test_before_the_loop_begins_losses_are_those_of_the_plain_model() -> None:
    losses = make_model()(TOKENS[:, :-1], TOKENS[:, 1:], looped=False)[0]
    expected = F.cross_entropy(GOLDEN["logits/plain/joined"], TOKENS[0, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


def test_loss_and_gradients() -> None:
    model = make_model(document_mask=True)
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:]).mean()
    loss.backward()
    torch.testing.assert_close(loss[None], GOLDEN["loss/loop/documents"], rtol=0, atol=1e-5)
    for name, expected in read("gradient").items():
        found = model.get_parameter(name).grad
        assert found is not None
        if name.endswith(("attention.query.weight", "attention.key.weight")):
            found = found * SIGNS.repeat(len(found) // 16)[:, None]
        if found.shape != expected.shape:
            found = found[[0, len(found) // 2]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not GOLDEN["gradient/lane_post"][:8].any()  # what layers before the first parallel one have, and this model has not


def test_losses_with_adapters_in_every_pass() -> None:
    model = make_model()
    with torch.no_grad():
        without = model(ADAPTER["rows"], ADAPTER["targets"])
        for layer, num_passes in {"query": 17, "key": 17, "value": 17, "attention": 17, "mlp": 17, "head": 1}.items():
            model.adapters[layer] = [read_adapter(layer, place) for place in range(num_passes)]
        found = model(ADAPTER["rows"], ADAPTER["targets"])
    torch.testing.assert_close(found, ADAPTER["nats"], rtol=0, atol=1e-4)
    assert (found - without).abs().mean() > 0.1


def read_adapter(layer: str, place: int) -> LowRank:
    a, b = (ADAPTER[f"{layer}/{place}/{matrix}"] for matrix in "AB")
    if layer in ("query", "key"):
        b = b * SIGNS.repeat(b.shape[1] // 16)[:, None]
    return LowRank(a, b, 144 / 8)
