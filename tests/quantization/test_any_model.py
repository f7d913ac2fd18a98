"""Quantization of other models, of the library transformers: calibrate, quantize to a size, pack, unpack, compare."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import QuantizedModel
from lib.calibration.moments import collect_moments
from lib.calibration.sums import matrix_inputs
from lib.compression.container import pack, unpack
from lib.distributed import SINGLE_CPU
from lib.model.parts import parts_of, read_weights, write_weights
from lib.quantization.distillation import distill
from lib.quantization.gptq import row_errors
from lib.quantization.policy import quantize_model
from tests.artifacts.quantized_models import TRAINING, assert_same
from tests.quantization.test_config import QUANTIZE, make_quantize

ROOT = Path(__file__).parents[2]
VOCAB_SIZE, TARGET_BYTES = 97, 9000


def gpt2(**options: Any) -> Any:
    """Layers are Conv1D, which store their matrices the other way round, with biases; positions have a table."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=VOCAB_SIZE, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2, **options))


def llama(**options: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        initializer_range=0.2, **options))


MODELS = {"gpt2": (gpt2, {}), "gpt2, untied": (gpt2, {"tie_word_embeddings": False}),
          "llama": (llama, {}), "llama, tied": (llama, {"tie_word_embeddings": True})}


def make(name: str) -> Any:
    torch.manual_seed(0)
    build, options = MODELS[name]
    model = build(**options).eval()
    embedding = model.get_input_embeddings().weight
    spectrum = torch.arange(1, embedding.shape[1] + 1) ** -1.0
    rotation = torch.linalg.qr(torch.randn(embedding.shape[1], embedding.shape[1])).Q
    with torch.no_grad():  # as in a trained model, inputs of layers lie in few directions
        embedding.copy_(2 * torch.randn(embedding.shape) * spectrum @ rotation)
    return model


def make_sequences(number: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (number, 24), generator=torch.Generator().manual_seed(seed))


def collect(model: Any, seed: int) -> Any:
    return collect_moments(model, lambda tokens: model(tokens).logits, make_sequences(48, seed), num_gradient_sequences=48,
                           batch_sequences=16, precision="fp32", seed=0, process=SINGLE_CPU, description="test")


def size(quantized: QuantizedModel) -> int:
    return len(pack(quantized, "range", 19).blob)


@torch.no_grad()
def divergence(model: Any, reference: Any) -> float:
    """Mean Kullback-Leibler divergence from the reference's next tokens, nats per token."""
    ours, theirs = (each(make_sequences(32, 3)).logits.double().log_softmax(-1) for each in (model, reference))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("name", MODELS)
def test_a_causal_language_model_meets_its_byte_budget_and_is_better_than_rounded_to_nearest(name: str) -> None:
    model = make(name)
    parts, weights = parts_of(model), read_weights(model)
    hessians = Hessians(matrix_inputs(parts), collect(model, 1), collect(model, 2))
    checkpoint = Checkpoint(weights, {"architecture": name}, TRAINING)

    found = {}
    for method in ("gptq", "rtn"):
        params = make_quantize(target_bytes=TARGET_BYTES, bits={part.role: "free" for part in parts.values() if part.is_matrix},
                               method=method, free_rows=False, free_columns=False)  # they cost more than they save in so small ones
        quantized, _ = quantize_model(checkpoint, parts, hessians, params, process=SINGLE_CPU, measure=size)
        blob = pack(quantized, "range", 19).blob
        assert 0.98 * TARGET_BYTES < len(blob) <= TARGET_BYTES
        unpacked = unpack(blob)
        assert all(torch.equal(weight, unpacked.weights()[key]) for key, weight in quantized.weights().items())
        copy = make(name)
        write_weights(copy, unpacked.weights())
        found[method] = divergence(copy, model)
        if method == "gptq":
            predicted = sum(float((hessians.verification.gradients[key].double() * row_errors(
                weights[key] - unpacked.weights()[key], hessians.verification.hessians[source])).sum()) / 2
                            for source, keys in hessians.inputs.items() for key in keys)
            assert 0.75 < predicted / found[method] < 1.25
    assert 0 < found["gptq"] < 0.92 * found["rtn"]


@pytest.mark.parametrize("name", ["gpt2", "llama, tied"])
def test_a_distilled_model_meets_its_byte_budget_and_is_no_worse_than_gptq(name: str) -> None:
    model = make(name)
    parts, before = parts_of(model), read_weights(model)
    params = make_quantize(target_bytes=TARGET_BYTES, bits={part.role: "free" for part in parts.values() if part.is_matrix},
                           free_rows=False, free_columns=False, distill=QUANTIZE["distill"] | {"steps": 20, "code_lr": 0.06})
    quantize = partial(quantize_model, Checkpoint(before, {}, TRAINING), parts, Hessians(
        matrix_inputs(parts), collect(model, 1), collect(model, 2)), process=SINGLE_CPU, measure=size)
    start, _ = quantize(params)
    quantized, metrics, *_ = distill(
        model, lambda tokens: model(tokens).logits, lambda step: make_sequences(8, 100 + step), start, params, process=SINGLE_CPU,
        measure=size, undistilled=lambda: quantize(params.undistilled)[0])
    assert size(start) > 1.02 * TARGET_BYTES and 0.99 * TARGET_BYTES < size(quantized) <= TARGET_BYTES
    assert all(torch.equal(weight, before[key]) for key, weight in read_weights(model).items())
    if not metrics["distill_kept"]:  # models of random weights gain nothing
        assert_same(quantized, quantize(params.undistilled)[0])


def test_the_example_of_the_page_meets_its_budget() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/quantization.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"model": make("gpt2"), "sequences": make_sequences(96, 1), "budget": TARGET_BYTES}
    exec(example, names)
    assert 0.95 * TARGET_BYTES < len(names["blob"]) <= TARGET_BYTES
    assert 0 < divergence(names["model"], make("gpt2")) < 0.6


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_read_can_be_written(name: str) -> None:
    model, other = make(name), make(name)
    weights = read_weights(model)
    for part in parts_of(model).values():
        if part.is_matrix:
            linear = next((each for each in map(model.get_submodule, part.modules) if not isinstance(each, torch.nn.Embedding)), None)
            if linear is not None:  # (R, C) by what it does to unit vectors
                x = torch.eye(weights[part.name].shape[1])
                bias = 0 if linear.bias is None else linear.bias
                torch.testing.assert_close(linear(x) - bias, weights[part.name].T, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    write_weights(other, weights)
    assert torch.equal(other(make_sequences(2, 0)).logits, model(make_sequences(2, 0)).logits)


class Looped(torch.nn.Module):
    """A language model that runs twice through one layer."""

    def __init__(self, num_passes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.num_passes = num_passes
        self.embedding, self.layer = torch.nn.Embedding(31, 16), torch.nn.Linear(16, 16, bias=False)
        self.head = torch.nn.Linear(16, 31, bias=False)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for _ in range(self.num_passes):
            x = x + torch.tanh(self.layer(x))
        logits: Tensor = self.head(x)
        return logits


@pytest.mark.parametrize("num_passes", [1, 2, 3])
def test_the_predicted_loss_of_a_matrix_that_is_used_several_times_is_the_divergence(num_passes: int) -> None:
    """Errors of random sign in every row, small enough for the second order; the cost is a sum over passes, not a product of sums."""
    model = Looped(num_passes)
    tokens = torch.randint(0, 31, (512, 8), generator=torch.Generator().manual_seed(0))
    moments = collect_moments(model, model, tokens, num_gradient_sequences=512, batch_sequences=256, precision="fp32", seed=0,
                              process=SINGLE_CPU, description="test", with_outputs=True)
    ratios, whole_ratios = [], []
    with torch.no_grad():
        before = model(tokens).double().log_softmax(-1)
        for seed in range(20):
            error = 0.01 * torch.randn(16, 16, generator=torch.Generator().manual_seed(seed))
            model.layer.weight.add_(error)
            found = (before.exp() * (before - model(tokens).double().log_softmax(-1))).sum(-1).mean()
            model.layer.weight.sub_(error)
            predicted = (moments.gradients["layer.weight"].double() * row_errors(error, moments.hessians["layer"])).sum() / 2
            ratios.append(float(predicted / found))
            outputs = moments.outputs["layer.weight"].double()
            whole_ratios.append(float((outputs @ error.double() * (error.double() @ moments.hessians["layer"].double())).sum() / 2 / found))
    assert 0.7 < sum(ratios) / len(ratios) < 1.3
    assert 0.7 < sum(whole_ratios) / len(whole_ratios) < 1.3
