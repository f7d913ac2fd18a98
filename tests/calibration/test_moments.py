"""Second moments against the outputs, gradients and divergences that they stand for.

Shapes: N sequences, T tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.tokens import Split
from lib.calibration.moments import PRIOR_OCCURRENCES, check_reserve, collect_moments, draw_sequences
from lib.calibration.sums import matrix_inputs
from lib.distributed import SINGLE_CPU, Process
from lib.model.gpt import GPT
from lib.model.parts import parts_of
from lib.params import Precision
from lib.quantization.gptq import row_errors
from lib.quantization.quantizer import Quantizer
from tests.artifacts.quantized_models import TRAINING
from tests.evaluation.tiny import FRONTIER, MODEL, make_model
from tests.processes import run_processes
from tests.quantization.power_law import quadratic_error
from tests.quantization.test_config import make_quantize

TABLES = ("token_embedding", "bigram.table", "value_embedding.table")


def make_sequences(num_sequences: int = 6, num_tokens: int = 8) -> Tensor:
    return torch.randint(0, MODEL["vocab_size"], (num_sequences, num_tokens), generator=torch.Generator().manual_seed(0))


def collect(model: GPT, sequences: Tensor, *, num_gradient_sequences: int | None = None, batch_sequences: int = 4, seed: int = 0,
            precision: Precision = "fp32", process: Process = SINGLE_CPU, with_outputs: bool = False) -> Moments:
    return collect_moments(model, model.logits, sequences, num_gradient_sequences=num_gradient_sequences or len(sequences),
                           batch_sequences=batch_sequences, precision=precision, seed=seed, process=process, description="test",
                           with_outputs=with_outputs)


def linear_inputs(model: GPT) -> dict[str, tuple[str, ...]]:
    return {source: names for source, names in matrix_inputs(parts_of(model)).items() if source not in TABLES}


def likeliest(probabilities: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:
    """In place of `torch.multinomial`, so that labels do not depend on the order of sequences."""
    return probabilities.argmax(1, keepdim=True)


@pytest.fixture
def fixed_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "multinomial", likeliest)


def record_outputs(model: GPT, sequences: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """First input, output, and gradient of the summed loss of the likeliest labels at the output of every linear layer and table.

    Gradients are those of zeros that are added to the outputs. Outputs are those of the weights, before their rows are scaled.
    """
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def add(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name], outputs[name], added[name] = arguments[0].detach(), output.detach(), torch.zeros_like(output, requires_grad=True)
            return output + added[name]
        return add

    modules = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    hooks = [module.register_forward_hook(adder(name)) for name, module in modules.items()]
    logits = model.logits(sequences).flatten(0, 1)
    loss = F.cross_entropy(logits, logits.detach().argmax(1), reduction="sum")
    gradients = dict(zip(added, torch.autograd.grad(loss, list(added.values())), strict=True))
    for hook in hooks:
        hook.remove()
    for block in (name.removesuffix(".attention") for name, _ in model.named_modules() if name.endswith(".attention")):
        for layer, scale in (("attention.output", "attention_scale"), ("mlp.down", "mlp_scale")):
            factors = model.get_parameter(f"{block}.{scale}").detach()
            outputs[f"{block}.{layer}"] /= factors
            gradients[f"{block}.{layer}"] = gradients[f"{block}.{layer}"] * factors
    return inputs, outputs, gradients


def test_hessians_give_the_squared_outputs_of_every_linear_layer() -> None:
    model, sequences = make_model(tied_head=False), make_sequences()
    moments, (_, outputs, _) = collect(model, sequences), record_outputs(model, sequences)
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(name for names in linear_inputs(model).values() for name in names) == sorted(f"{name}.weight" for name in linear_names)
    for source, names in linear_inputs(model).items():
        for name in names:
            found = quadratic_error(model.get_parameter(name).detach(), moments.hessians[source])
            expected = float(outputs[name.removesuffix(".weight")].double().square().sum()) / sequences.numel()
            assert found == pytest.approx(expected, rel=1e-5), name


@pytest.mark.usefixtures("fixed_labels")
def test_gradients_are_those_of_the_outputs_of_every_linear_layer() -> None:
    model, sequences = make_model(tied_head=False), make_sequences()
    moments, (_, _, gradients) = collect(model, sequences), record_outputs(model, sequences)
    for names in linear_inputs(model).values():
        for name in names:
            expected = gradients[name.removesuffix(".weight")].double().square().mean((0, 1)).float()
            torch.testing.assert_close(moments.gradients[name], expected, rtol=1e-4, atol=1e-9)


@pytest.mark.usefixtures("fixed_labels")
@pytest.mark.parametrize("max_outputs", [4096, MODEL["vocab_size"] - 1])
def test_all_of_g_is_the_second_moment_of_the_gradients_of_linear_layers(max_outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.calibration.moments.MAX_OUTPUTS", max_outputs)
    model, sequences = make_model(tied_head=False), make_sequences()
    moments, (_, _, gradients) = collect(model, sequences, with_outputs=True), record_outputs(model, sequences)
    names = {name for names in linear_inputs(model).values() for name in names}
    assert moments.outputs.keys() == (names if max_outputs >= MODEL["vocab_size"] else names - {"head.weight"})
    for name, found in moments.outputs.items():
        g = gradients[name.removesuffix(".weight")].flatten(0, 1).double()
        torch.testing.assert_close(found, (g.T @ g / len(g)).float(), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(found.diagonal(), moments.gradients[name], rtol=1e-5, atol=1e-12)
    alone = collect(model, sequences)
    assert not alone.outputs and all(torch.equal(alone.gradients[name], value) for name, value in moments.gradients.items())


@pytest.mark.usefixtures("fixed_labels")
@pytest.mark.parametrize("table", TABLES)
def test_tables_are_linear_layers_of_one_hot_inputs(table: str) -> None:
    """Token by token: H from the gradients, g from those at each row, with the prior's mean gradients; in sum what was measured."""
    model, sequences = make_model(tied_head=False), make_sequences()
    moments, (inputs, _, gradients) = collect(model, sequences), record_outputs(model, sequences)
    num_rows, width = model.get_parameter(f"{table}.weight").shape
    rows, second, energy = inputs[table].flatten().tolist(), torch.zeros(width, width).double(), torch.zeros(num_rows).double()
    vectors = gradients[table].reshape(-1, width).double()
    for row, g in zip(rows, vectors, strict=True):
        second += torch.outer(g, g) / len(rows)
        energy[row] += g @ g
    energy += PRIOR_OCCURRENCES * vectors.square().sum() / len(rows)
    torch.testing.assert_close(moments.hessians[table], (second / second.trace()).float(), rtol=1e-4, atol=1e-8)
    found = moments.gradients[f"{table}.weight"]
    torch.testing.assert_close(found, (energy / energy.sum() * second.trace()).float(), rtol=1e-4, atol=1e-12)
    measured = float(vectors.square().sum()) / len(rows)  # mean squared gradient of a token
    assert float(found.sum()) * float(moments.hessians[table].trace()) == pytest.approx(measured, rel=1e-4)
    assert (found > 0).all() and len(set(rows)) < num_rows  # also of rows that never occurred


def test_a_table_without_influence_costs_nothing() -> None:
    model = make_model()
    with torch.no_grad():
        model.get_parameter("bigram.projection.weight").zero_()
    moments = collect(model, make_sequences())
    assert not moments.hessians["bigram.table"].any() and not moments.gradients["bigram.table.weight"].any()
    assert all(value.isfinite().all() for values in vars(moments).values() for value in values.values())


def test_a_tied_head_adds_what_it_costs_as_an_output_layer() -> None:
    """Compared with the same model whose head has a copy of the embedding: the cost of each row, and of all rows together, is the sum."""
    tied, sequences = make_model(), make_sequences()
    apart = make_model(tied_head=False)
    with torch.no_grad():
        for name, parameter in tied.named_parameters():
            apart.get_parameter(name).copy_(parameter)
        apart.get_parameter("head.weight").copy_(tied.token_embedding.weight)
    both, each = collect(tied, sequences), collect(apart, sequences)
    assert both.hessians.keys() == each.hessians.keys() - {"head"} == matrix_inputs(parts_of(tied)).keys()
    assert both.gradients.keys() == each.gradients.keys() - {"head.weight"}
    parts = [(each.hessians[source], each.gradients[f"{source}.weight"]) for source in ("token_embedding", "head")]
    hessian, gradients = both.hessians["token_embedding"], both.gradients["token_embedding.weight"]
    torch.testing.assert_close(gradients * hessian.trace(), torch.stack([g * h.trace() for h, g in parts]).sum(0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(hessian * gradients.sum(), torch.stack([h * g.sum() for h, g in parts]).sum(0), rtol=1e-4, atol=1e-9)
    assert float(parts[0][1].sum() * parts[0][0].trace()) > 0 and float(parts[1][1].sum() * parts[1][0].trace()) > 0
    for name in each.hessians.keys() - {"token_embedding", "head"}:
        torch.testing.assert_close(both.hessians[name], each.hessians[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied_head", [True, False])
def test_every_matrix_has_its_moments(tied_head: bool) -> None:
    model = make_model(tied_head=tied_head)
    moments, inputs = collect(model, make_sequences()), matrix_inputs(parts_of(model))
    matrices = {name: parameter for name, parameter in model.named_parameters() if name.endswith(".weight")}
    assert sorted(name for names in inputs.values() for name in names) == sorted(matrices)
    assert moments.hessians.keys() == inputs.keys() and moments.gradients.keys() == matrices.keys()
    for source, names in inputs.items():
        for name in names:
            assert moments.gradients[name].shape == matrices[name].shape[:1] and moments.gradients[name].dtype == torch.float32
            assert moments.hessians[source].shape == (matrices[name].shape[1],) * 2


def test_hessians_are_symmetric_fp32_and_positive() -> None:
    for hessian in collect(make_model(), make_sequences()).hessians.values():
        assert hessian.dtype == torch.float32
        torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-7)
        assert float(torch.linalg.eigvalsh(hessian.double())[0]) > -1e-6 * float(hessian.diagonal().amax())


@pytest.mark.usefixtures("fixed_labels")
def test_batches_change_nothing() -> None:
    model, sequences = make_model(), make_sequences()
    whole = collect(model, sequences, batch_sequences=12)
    for batch_sequences in (1, 4):  # with 4 the last batch is smaller
        assert_close(collect(model, sequences, batch_sequences=batch_sequences), whole)


def assert_close(found: Moments, expected: Moments) -> None:
    assert found.hessians.keys() == expected.hessians.keys() and found.gradients.keys() == expected.gradients.keys()
    for name, hessian in expected.hessians.items():
        torch.testing.assert_close(found.hessians[name], hessian, rtol=1e-4, atol=1e-6)
    for name, gradients in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradients, rtol=1e-4, atol=1e-9)


@pytest.mark.usefixtures("fixed_labels")
def test_gradients_come_from_evenly_spread_sequences() -> None:
    model, sequences = make_model(tied_head=False), make_sequences(9)
    found, part, whole = collect(model, sequences, num_gradient_sequences=3), collect(model, sequences[::3]), collect(model, sequences)
    tables = {table: part.hessians[table] for table in TABLES}
    assert_close(found, Moments(whole.hessians | tables, part.gradients))


def test_the_model_is_left_as_it_was() -> None:
    model, sequences = make_model(), make_sequences()
    model.token_embedding.weight.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    collect(model, sequences)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["token_embedding.weight"]
    assert all(parameter.grad is None and torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)  # labels have a generator of their own


def test_labels_are_drawn_from_the_model() -> None:
    """Closed form for the logits: the expectation of (p - label)^2 is p (1 - p), times the squared slope of the soft cap."""
    model, sequences = make_model(tied_head=False), make_sequences(64, 16)
    moments = collect(model, sequences, batch_sequences=64)
    logits = model.logits(sequences).detach().flatten(0, 1)
    probabilities, slope = logits.softmax(1), 1 - (logits / MODEL["logit_softcap"]).square()
    expected = (probabilities * (1 - probabilities) * slope.square()).mean(0)
    found = moments.gradients["head.weight"]
    assert float(found.sum() / expected.sum()) == pytest.approx(1, abs=0.1)
    assert float((found - expected).abs().sum() / expected.sum()) < 0.2
    other = collect(model, sequences, batch_sequences=64, seed=1).gradients["head.weight"]
    assert not torch.equal(other, found)
    assert torch.equal(collect(model, sequences, batch_sequences=64).gradients["head.weight"], found)


@pytest.mark.parametrize("options", [{}, {"tied_head": False}, FRONTIER], ids=["tied", "untied", "frontier"])
def test_the_predicted_loss_is_the_divergence(options: dict[str, Any]) -> None:
    """1/2 sum g e H e^T against the Kullback-Leibler divergence of the model with small random errors in one matrix."""
    model, sequences = make_model(**options), make_sequences(128, 16)
    moments = collect(model, sequences, batch_sequences=64)
    ratios: dict[str, float] = {}
    with torch.no_grad():
        before = model.logits(sequences).double().log_softmax(-1)
        for source, names in matrix_inputs(parts_of(model)).items():
            for name in names:
                parameter = model.get_parameter(name)
                original, logs = parameter.clone(), 0.0
                for seed in range(3):
                    error = 0.01 * original.std() * torch.randn(original.shape, generator=torch.Generator().manual_seed(seed))
                    parameter.copy_(original + error)
                    divergence = (before.exp() * (before - model.logits(sequences).double().log_softmax(-1))).sum(-1).mean()
                    parameter.copy_(original)
                    predicted = (moments.gradients[name].double() * row_errors(error, moments.hessians[source])).sum() / 2
                    logs += math.log(float(predicted / divergence)) / 3
                assert abs(logs) < math.log(3), name
                ratios[name] = logs
    assert abs(sum(ratios.values()) / len(ratios)) < math.log(1.3)
    assert abs(ratios["token_embedding.weight"]) < math.log(1.6)


def relative_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest one of all matrices, by the norms of each."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


def test_moments_in_bf16_are_those_in_fp32_up_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With labels that do not depend on the model: rounding would change some that are drawn."""
    monkeypatch.setattr(torch, "multinomial", lambda probabilities, *_, **__: (torch.arange(len(probabilities)) % 7)[:, None])
    model, sequences = mild_model(), make_sequences(24)
    expected, found = collect(model, sequences), collect(model, sequences, precision="bf16")
    assert 1e-5 < relative_difference(found.hessians, expected.hessians) < 0.02
    assert 1e-5 < relative_difference(found.gradients, expected.gradients) < 0.04


@pytest.mark.usefixtures("fixed_labels")
def test_moments_in_bf16_give_a_quantized_model_that_is_as_good() -> None:
    """KL divergence from the float model, on the text of calibration and on other text, within 10 %, and better than without moments."""
    model, sequences = mild_model(), make_sequences(48)
    weights = {name: model.get_parameter(name).detach().clone() for names in matrix_inputs(parts_of(model)).values() for name in names}
    reference = model.logits(sequences).log_softmax(-1).detach()

    def divergences(moments: Moments) -> Tensor:
        hessians = Hessians(matrix_inputs(parts_of(model)), moments, moments)
        quantizer = Quantizer(weights, hessians, dict.fromkeys(weights, 4), make_quantize(), roles=dict.fromkeys(weights, ""),
                              process=SINGLE_CPU)
        quantized = mild_model()
        with torch.no_grad():
            for name, weight in QuantizedModel({}, TRAINING, quantizer.round_clipped(), {}).weights().items():
                quantized.get_parameter(name).copy_(weight)
            kl = (reference.exp() * (reference - quantized.logits(sequences).log_softmax(-1))).sum(-1)
        return torch.stack([part.mean() for part in kl.split(24)])

    fp32, bf16 = (collect(model, sequences[:24], precision=precision) for precision in ("fp32", "bf16"))
    blind = Moments({name: torch.eye(len(value)) for name, value in fp32.hessians.items()},
                    {name: torch.ones_like(value) for name, value in fp32.gradients.items()})
    expected, found, without = divergences(fp32), divergences(bf16), divergences(blind)
    assert ((found - expected).abs() < 0.1 * expected).all()
    assert (without > torch.maximum(found, expected)).all()


@pytest.mark.usefixtures("fixed_labels")
def test_sums_of_bf16_inputs_are_not_rounded_to_bf16() -> None:
    model, sequences = mild_model(), make_sequences(24)
    for moments in (collect(model, sequences, precision="bf16").hessians, collect(model, sequences).hessians):
        name = next(iter(linear_inputs(model)))
        assert not torch.equal(moments[name], moments[name].bfloat16().float())
        assert torch.linalg.eigvalsh(moments[name].double())[0] > -1e-6 * moments[name].diagonal().max()


def test_precision_of_other_products_is_as_before() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    seen: list[str] = []
    model = make_model()
    model.blocks[0].get_submodule("mlp").register_forward_hook(lambda *_: seen.append(torch.backends.cuda.matmul.fp32_precision))
    for precision, within in (("fp32", before), ("bf16", "tf32")):
        seen.clear()
        collect(model, make_sequences(), precision=precision)  # type: ignore[arg-type]
        assert set(seen) == {within}
        assert torch.backends.cuda.matmul.fp32_precision == before


def mild_model() -> GPT:
    """Weights of a size that real ones have."""
    model = make_model(tied_head=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model


def _compare_with_one_process(process: Process, expected: dict[str, Any], sequences: Tensor) -> None:
    torch.multinomial = likeliest  # type: ignore[assignment]  # a process of its own
    for num_gradient_sequences, moments in expected.items():
        found = collect(make_model(), sequences, num_gradient_sequences=int(num_gradient_sequences), process=process)
        assert_close(found, moments)


@pytest.mark.slow
@pytest.mark.usefixtures("fixed_labels")
def test_two_processes_find_the_same() -> None:
    """Also where one of them has no sequence for gradients."""
    sequences = make_sequences(5)
    expected = {str(number): collect(make_model(), sequences, num_gradient_sequences=number) for number in (5, 1)}
    run_processes(_compare_with_one_process, 2, expected, sequences)


def test_sets_are_disjoint_spread_over_the_shards_and_repeatable() -> None:
    shards = tuple(np.arange(start, start + 1000, dtype=np.uint16) for start in (0, 1000, 2000))
    split = Split(Path("train"), shards, 1, 6000, 6000, 65536)
    sets = draw_sequences(split, 30, 20, seed=3)
    assert [tuple(tokens.shape) for tokens in sets] == [(30, 20), (30, 20)]
    first, second = (set(tokens.flatten().tolist()) for tokens in sets)
    assert not first & second
    for tokens in (first, second):
        assert {token // 1000 for token in tokens} == {0, 1, 2}
    assert all(torch.equal(*pair) for pair in zip(sets, draw_sequences(split, 30, 20, seed=3), strict=True))
    assert not torch.equal(sets[0], draw_sequences(split, 30, 20, seed=4)[0])


@pytest.mark.parametrize(("seconds", "reserve"), [(5.0, 5.0), (5.0, None)])
def test_calibration_within_its_part_of_the_budget(seconds: float, reserve: float | None) -> None:
    check_reserve(seconds, reserve)


def test_calibration_that_takes_longer_than_its_part_of_the_budget_fails() -> None:
    with pytest.raises(ValueError, match=r"at most the 5 s that train\.reserve_seconds left of .*, took 5\.1 s; lower calibrate\."):
        check_reserve(5.1, 5.0)
