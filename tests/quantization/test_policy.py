from typing import Any

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians
from lib.model.gpt import build_model
from lib.model.roles import role_of
from lib.params import parse_params
from lib.quantization.config import QuantizeParams
from lib.quantization.hessian import collect_hessians
from lib.quantization.policy import TensorRow, list_grid_differences, quantize_model, summarize
from tests.evaluation.tiny import MODEL, make_model
from tests.quantization.test_config import BITS, QUANTIZE

CPU = torch.device("cpu")
MODEL_CHANGES: dict[str, Any] = {"tied_head": False}


def make_quantize(**changes: Any) -> QuantizeParams:
    return parse_params(QUANTIZE | {"bits": BITS | {"mlp": 4, "bigram": 3, "value_embedding": 6, "head": 7}} | changes, QuantizeParams, "")


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    weights = {name: parameter.detach() for name, parameter in make_model(**MODEL_CHANGES).named_parameters()}
    return Checkpoint(weights, MODEL | MODEL_CHANGES, {"sequence_tokens": 16, "qat": None})


@pytest.fixture(scope="module")
def hessians(checkpoint: Checkpoint) -> Hessians:
    model = build_model(checkpoint.model, checkpoint.weights)
    sequences = torch.randint(0, MODEL["vocab_size"], (64, 16), generator=torch.Generator().manual_seed(0))
    calibration, verification = (collect_hessians(model, part, 32, CPU, "test") for part in (sequences[:32], sequences[32:]))
    return Hessians(model.linear_inputs(), calibration, verification)


def test_roles_decide_bits_and_method(checkpoint: Checkpoint, hessians: Hessians) -> None:
    params = make_quantize()
    quantized, rows = quantize_model(checkpoint, hessians, params, CPU)
    by_name = {row.name: row for row in rows}
    assert [row.name for row in rows] == sorted(quantized.matrices)
    assert by_name.keys() | quantized.vectors.keys() == checkpoint.weights.keys()
    for name, weight in checkpoint.weights.items():
        role = role_of(name, weight.ndim)
        if role == "vector":
            assert torch.equal(quantized.vectors[name], weight.half())
        else:
            assert quantized.matrices[name].bits == by_name[name].bits == getattr(params.bits, role)
            is_table = name in ("token_embedding.weight", "bigram.table.weight", "value_embedding.table.weight")
            assert by_name[name].method == ("rtn" if is_table else "gptq")
            assert (by_name[name].dead_columns is None) == is_table
    assert by_name["bigram.projection.weight"].method == "gptq"  # small, and quantized all the same


def test_quantized_weights_are_close_and_build_the_model(checkpoint: Checkpoint, hessians: Hessians) -> None:
    quantized, _ = quantize_model(checkpoint, hessians, make_quantize(bits=dict.fromkeys(BITS, 8)), CPU)
    model = build_model(quantized.model, quantized.weights())
    for name, parameter in model.named_parameters():
        weight = checkpoint.weights[name]
        assert float((parameter.detach() - weight).norm()) < 0.03 * float(weight.norm()), name


def test_gptq_beats_round_to_nearest_on_the_verification_hessian(checkpoint: Checkpoint, hessians: Hessians) -> None:
    figures = summarize(quantize_model(checkpoint, hessians, make_quantize(), CPU)[1])
    nearest_params = make_quantize(method="rtn")
    quantized, rows = quantize_model(checkpoint, hessians, nearest_params, CPU)
    nearest = summarize(rows)
    assert figures["relative_error"] < 0.8 * figures["relative_error_rtn"]
    assert figures["relative_error_rtn"] == nearest["relative_error"] == nearest["relative_error_rtn"]
    assert {row.method for row in rows} == {"rtn"} and quantized.matrices.keys() == {row.name for row in rows}


def test_errors_are_those_of_the_verification_hessian(checkpoint: Checkpoint, hessians: Hessians) -> None:
    quantized, rows = quantize_model(checkpoint, hessians, make_quantize(), CPU)
    row = next(row for row in rows if row.name == "blocks.1.mlp.up.weight")
    weight, hessian = checkpoint.weights[row.name].double(), hessians.verification["blocks.1.mlp.up"].double()
    error = weight - quantized.matrices[row.name].weight()
    assert row.relative_error == pytest.approx(float((error @ hessian @ error.T).trace() / (weight @ hessian @ weight.T).trace()))
    table = next(row for row in rows if row.name == "token_embedding.weight")
    weight = checkpoint.weights[table.name].double()
    error = weight - quantized.matrices[table.name].weight()
    assert table.relative_error == pytest.approx(float(error.square().sum() / weight.square().sum()))


def test_sixteen_bits_are_fp16(checkpoint: Checkpoint, hessians: Hessians) -> None:
    quantized, rows = quantize_model(checkpoint, hessians, make_quantize(bits=BITS | {"mlp": 16}), CPU)
    name = "blocks.0.mlp.up.weight"
    row = next(row for row in rows if row.name == name)
    assert torch.equal(quantized.vectors[name], checkpoint.weights[name].half()) and name not in quantized.matrices
    assert (row.method, row.bits, row.clip, row.entropy_bits) == ("fp16", 16, None, None)
    assert 0 < row.relative_error == row.relative_error_rtn < 1e-6
    _, rows = quantize_model(checkpoint, hessians, make_quantize(bits=dict.fromkeys(BITS, 16)), CPU)
    assert summarize(rows)["bits_per_weight"] == 16


def test_checkpoint_and_hessians_are_not_touched(checkpoint: Checkpoint, hessians: Hessians) -> None:
    before = {name: weight.clone() for name, weight in checkpoint.weights.items()}
    calibration = {name: hessian.clone() for name, hessian in hessians.calibration.items()}
    quantize_model(checkpoint, hessians, make_quantize(), CPU)
    assert all(torch.equal(weight, before[name]) for name, weight in checkpoint.weights.items())
    assert all(torch.equal(hessian, calibration[name]) for name, hessian in hessians.calibration.items())


def test_summary_by_hand() -> None:
    rows = [TensorRow("a", "mlp", "gptq", 2, 10, 5, "mse", 0.1, 0.4, 3.0, 0.01, 0),
            TensorRow("b", "head", "fp16", 4, 5, 16, None, 0.0, 0.0, None, None, 1),
            TensorRow("c", "embedding", "rtn", 5, 8, 8, "mse", 0.9, 0.9, 6.0, None, None)]
    assert summarize(rows) == pytest.approx({
        "bits_per_weight": (20 * 5 + 2 * 16 + 20 * 16 + 40 * 8 + 5 * 16) / 80, "entropy_bits": (20 * 3 + 40 * 6) / 60,
        "relative_error": 0.05, "relative_error_rtn": 0.2})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 7e4])
def test_weights_beyond_fp16_are_errors_that_name_the_tensor(checkpoint: Checkpoint, hessians: Hessians, value: float) -> None:
    for name in ("blocks.0.mlp.up.weight", "blocks.0.mlp_scale"):
        weight = checkpoint.weights[name].clone()
        weight.view(-1)[3] = value
        broken = Checkpoint(checkpoint.weights | {name: weight}, checkpoint.model, checkpoint.training)
        with pytest.raises(ValueError, match=f"{name}: expected magnitudes up to 65504"):
            quantize_model(broken, hessians, make_quantize(), CPU)


def test_hessians_of_another_model_are_an_error(checkpoint: Checkpoint, hessians: Hessians) -> None:
    other = Checkpoint({name: weight for name, weight in checkpoint.weights.items() if name != "head.weight"}, {}, {})
    with pytest.raises(ValueError, match=r"head\.weight: has a Hessian but is not in the checkpoint"):
        quantize_model(other, hessians, make_quantize(), CPU)


def test_grid_differences_name_the_keys() -> None:
    grid = {"bits": BITS, "clip": QUANTIZE["clip"], "below_lr": 0.1}
    same = parse_params(QUANTIZE, QuantizeParams, "")
    assert list_grid_differences(grid, same) == []
    changed = grid | {"bits": BITS | {"mlp": 6}, "clip": QUANTIZE["clip"] | {"rule": "max"}}
    assert list_grid_differences(changed, same) == ["bits.mlp 6 in training, 5 here", "clip.rule max in training, mse here"]


def test_the_search_for_scales_changes_gptq_and_not_the_reference(checkpoint: Checkpoint, hessians: Hessians) -> None:
    plain, searched = (quantize_model(checkpoint, hessians, make_quantize(scale_factors=factors), CPU)[1]
                       for factors in ([1.0], [0.8, 1.0, 1.2]))
    assert [row.relative_error_rtn for row in plain] == [row.relative_error_rtn for row in searched]
    changed = {one.method for one, other in zip(plain, searched, strict=True) if one.relative_error != other.relative_error}
    assert changed == {"gptq"}
