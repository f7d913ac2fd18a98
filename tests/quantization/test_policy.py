from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.checkpoint import Checkpoint, TrainedGrid
from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedModel
from lib.distributed import SINGLE_CPU, Process
from lib.model.gpt import build_model, outline
from lib.model.parts import Part, parts_of
from lib.params import parse_params
from lib.quantization.allocation import TOLERANCE, TargetError
from lib.quantization.config import QuantizeParams
from lib.quantization.policy import choose_bits, list_grid_differences, quantize_model, truncate
from lib.quantization.quantizer import Group, Quantizer
from tests.artifacts.quantized_models import assert_same
from tests.processes import run_processes
from tests.quantization.test_config import BITS, FREE_BITS, QUANTIZE

ROLE_BITS = BITS | {"mlp": 4, "bigram": 3, "value_embedding": 6, "head": 7}


def make_quantize(**changes: Any) -> QuantizeParams:
    return parse_params(QUANTIZE | {"bits": ROLE_BITS} | changes, QuantizeParams, "")


def measure(model: QuantizedModel) -> int:
    """Entropy of the codes, and 2 bytes for every other value."""
    vectors = sum(2 * vector.numel() for vector in model.vectors.values())
    return vectors + round(sum(matrix.entropy_bits() * matrix.codes.numel() for matrix in model.matrices.values()) / 8)


def quantize(checkpoint: Checkpoint, hessians: Hessians, process: Process = SINGLE_CPU, **changes: Any) -> QuantizedModel:
    return quantize_model(checkpoint, parts_of(outline(checkpoint.model)), hessians, make_quantize(**changes), process=process,
                          measure=measure)[0]


def test_roles_decide_bits(checkpoint: Checkpoint, parts: dict[str, Part], hessians: Hessians) -> None:
    params = make_quantize()
    quantized, dampings = quantize_model(checkpoint, parts, hessians, params, process=SINGLE_CPU, measure=measure)
    assert dampings == dict.fromkeys(quantized.matrices, params.damping)
    assert quantized.matrices.keys() | quantized.vectors.keys() == checkpoint.weights.keys()
    assert (quantized.model, quantized.training) == (checkpoint.model, checkpoint.training)
    for name, weight in checkpoint.weights.items():
        if parts[name].is_matrix:
            assert quantized.matrices[name].bits == params.bits[parts[name].role]
        else:
            assert torch.equal(quantized.vectors[name], weight.half())
    assert "bigram.projection.weight" in quantized.matrices  # small, and quantized all the same


def test_exceptions_have_the_name_of_a_matrix(checkpoint: Checkpoint, parts: dict[str, Part]) -> None:
    exceptions = {"blocks.1.mlp.up.weight": 16, "token_embedding.weight": 2}
    plain, changed = (choose_bits(parts, make_quantize(bits_of=bits_of)) for bits_of in ({}, exceptions))
    assert changed == plain | exceptions and plain["blocks.1.mlp.up.weight"] == 4
    assert set(plain) == {name for name, part in parts.items() if part.is_matrix}
    for unknown in ("blocks.9.mlp.up.weight", "blocks.0.mlp_scale"):  # a vector is no matrix
        with pytest.raises(ValueError, match=rf"quantize\.bits_of: {unknown}: expected the name of a matrix, one of bigram\.projection"):
            choose_bits(parts, make_quantize(bits_of={unknown: 16}))


def test_quantized_weights_are_close_and_build_the_model(checkpoint: Checkpoint, hessians: Hessians) -> None:
    quantized = quantize(checkpoint, hessians, bits=dict.fromkeys(BITS, 8))
    model = build_model(quantized.model, quantized.weights())
    for name, parameter in model.named_parameters():
        weight = checkpoint.weights[name]
        assert float((parameter.detach() - weight).norm()) < 0.03 * float(weight.norm()), name


def test_sixteen_bits_are_fp16(checkpoint: Checkpoint, parts: dict[str, Part], hessians: Hessians) -> None:
    quantized = quantize(checkpoint, hessians, bits=BITS | {"mlp": 16})
    name = "blocks.0.mlp.up.weight"
    assert torch.equal(quantized.vectors[name], checkpoint.weights[name].half()) and name not in quantized.matrices
    params = make_quantize(bits=dict.fromkeys(BITS, 16))
    everything, dampings = quantize_model(checkpoint, parts, hessians, params, process=SINGLE_CPU, measure=measure)
    assert not everything.matrices and not dampings and everything.vectors.keys() == checkpoint.weights.keys()


@pytest.mark.parametrize("target", [3000, 5500])
def test_free_steps_meet_the_target(checkpoint: Checkpoint, parts: dict[str, Part], hessians: Hessians, target: int) -> None:
    sizes: list[int] = []

    def record(model: QuantizedModel) -> int:
        assert model.vectors.keys() | model.matrices.keys() == checkpoint.weights.keys()
        sizes.append(measure(model))
        return sizes[-1]

    params = make_quantize(bits=FREE_BITS, target_bytes=target)
    quantized, dampings = quantize_model(checkpoint, parts, hessians, params, process=SINGLE_CPU, measure=record)
    assert measure(quantized) in sizes and dampings.keys() == quantized.matrices.keys()
    assert (1 - 3 * TOLERANCE) * target <= measure(quantized) <= target


def test_one_input_may_be_read_by_free_clipped_and_fp16_matrices(checkpoint: Checkpoint, hessians: Hessians) -> None:
    names = [f"blocks.1.attention.{part}.weight" for part in ("query", "key", "value")]
    quantized = quantize(checkpoint, hessians, bits_of=dict(zip(names, ("free", 5, 16), strict=True)), target_bytes=4000)
    assert quantized.matrices[names[0]].bits is None and quantized.matrices[names[1]].bits == 5 and names[2] in quantized.vectors
    assert 3980 <= measure(quantized) <= 4000
    clipped = quantize(checkpoint, hessians)
    for name, matrix in clipped.matrices.items():  # all others are as without the exceptions
        if name not in names:
            assert torch.equal(quantized.matrices[name].codes, matrix.codes)


def test_an_impossible_target_is_an_error_that_names_the_smallest_size(checkpoint: Checkpoint, parts: dict[str, Part],
                                                                       hessians: Hessians) -> None:
    smallest = sum(2 * weight.numel() for name, weight in checkpoint.weights.items() if not parts[name].is_matrix)
    with pytest.raises(TargetError, match=rf"quantize\.target_bytes: expected at least {smallest:,}, found {smallest - 1:,}"):
        quantize(checkpoint, hessians, bits=FREE_BITS, target_bytes=smallest - 1)


@pytest.mark.slow
@given(st.lists(st.floats(-65504, 65504, width=16), min_size=1, max_size=20), st.integers(0, 10))
def test_truncated_values_are_the_nearest_with_fewer_bits(values: list[float], mantissa_bits: int) -> None:
    """Against all values 1.m x 2^e with so many bits in m around each."""
    for value, found in zip(values, truncate(torch.tensor(values), mantissa_bits).double().tolist(), strict=True):
        exponents = range(-25, 16)  # 2^16 and more are beyond fp16
        grid = [sign * (1 + m / 2**mantissa_bits) * 2.0**e for sign in (1, -1) for e in exponents for m in range(2**mantissa_bits)
                if e <= -25 or 0.4 * abs(value) <= 2.0**e <= 2.1 * abs(value)]
        nearest = min(abs(candidate - value) for candidate in [*grid, 0.0])
        assert abs(found - value) == nearest


def test_ten_bits_are_all_of_fp16() -> None:
    every = torch.arange(-2**15, 2**15, dtype=torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    assert torch.equal(truncate(every.float(), 10), every)
    assert torch.equal(truncate(torch.tensor([1.3, -2.9, 0.0]), 0), torch.tensor([1, -2, 0]).half())  # 2.9 is nearest to 2 and 4


def test_vectors_have_the_mantissa_that_was_asked_for(checkpoint: Checkpoint, parts: dict[str, Part], hessians: Hessians) -> None:
    quantized = quantize(checkpoint, hessians, vector_mantissa_bits=3, bits_of={"blocks.0.mlp.up.weight": 16})
    for name, vector in quantized.vectors.items():
        weight = checkpoint.weights[name]
        whole = parts[name].is_matrix  # a matrix at fp16 keeps all its bits
        assert torch.equal(vector, weight.half() if whole else truncate(weight, 3))
        assert whole or float((vector.float() / weight - 1).abs().max()) <= 2.0**-4 * 1.01


def test_checkpoint_and_hessians_are_not_touched(checkpoint: Checkpoint, hessians: Hessians) -> None:
    before = {name: weight.clone() for name, weight in checkpoint.weights.items()}
    moments = {name: value.clone() for values in vars(hessians.calibration).values() for name, value in values.items()}
    for changes in ({"prune_fraction": 0.1}, {"bits": FREE_BITS, "target_bytes": 3000, "rate_weight": 0.1}):
        quantize(checkpoint, hessians, **changes)
    assert all(torch.equal(weight, before[name]) for name, weight in checkpoint.weights.items())
    assert all(torch.equal(value, moments[name]) for values in vars(hessians.calibration).values() for name, value in values.items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 7e4])
def test_weights_beyond_fp16_are_errors_that_name_the_tensor(checkpoint: Checkpoint, hessians: Hessians, value: float) -> None:
    for name in ("blocks.0.mlp.up.weight", "blocks.0.mlp_scale"):
        weight = checkpoint.weights[name].clone()
        weight.view(-1)[3] = value
        broken = Checkpoint(checkpoint.weights | {name: weight}, checkpoint.model, checkpoint.training)
        with pytest.raises(ValueError, match=f"{name}: expected magnitudes up to 65504"):
            quantize(broken, hessians)


def test_hessians_of_another_model_are_an_error(checkpoint: Checkpoint, hessians: Hessians) -> None:
    other = Checkpoint({name: weight for name, weight in checkpoint.weights.items() if name != "head.weight"},
                       checkpoint.model | {"tied_head": True}, checkpoint.training)
    with pytest.raises(ValueError, match=r"head\.weight: .*in the checkpoint.* the Hessians"):
        quantize(other, hessians)
    inputs = {source: names for source, names in hessians.inputs.items() if source != "bigram.table"}
    with pytest.raises(ValueError, match=r"bigram\.table\.weight: .*in the checkpoint.* the Hessians"):
        quantize(checkpoint, Hessians(inputs, hessians.calibration, hessians.verification))


def test_hessians_that_overflowed_are_an_error_that_names_the_input(checkpoint: Checkpoint, hessians: Hessians) -> None:
    broken = hessians.calibration.hessians | {"blocks.1.mlp.up": torch.full((16, 16), torch.nan)}
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up: expected a finite Hessian"):
        quantize(checkpoint, Hessians(hessians.inputs, Moments(broken, hessians.calibration.gradients), hessians.verification))


def test_grid_differences_name_the_keys() -> None:
    grid = TrainedGrid(below_lr=0.1, bits=BITS)
    clip = QUANTIZE["clip"] | {"rule": "max"}
    same, published = (parse_params(QUANTIZE | {"clip": each}, QuantizeParams, "")
                       for each in (clip, clip | {"rule": "percentile", "percentiles": [0.9995], "floor": 1.0}))
    assert list_grid_differences(grid, same) == []
    assert list_grid_differences(grid.model_copy(update={"clip_quantile": 0.9995, "floor": 1.0}), published) == []
    assert list_grid_differences(grid.model_copy(update={"bits": BITS | {"mlp": 6}, "clip_quantile": 0.99}), same) == [
        "bits.mlp 6 in training, 5 here", "clip_quantile 0.99 in training, clip rule max here"]
    assert list_grid_differences(grid, published) == [
        "clip_quantile 1 in training, clip rule percentile here", "floor 0 in training, 1 here"]
    assert list_grid_differences(grid.model_copy(update={"full_range": True}), same) == ["full_range in training, symmetric here"]
    free = parse_params(QUANTIZE | {"clip": clip, "bits": BITS | {"head": "free"}, "target_bytes": 1}, QuantizeParams, "")
    assert list_grid_differences(grid, free) == ["bits.head 8 in training, free here"]


SETTINGS: tuple[dict[str, Any], ...] = (
    {"prune_fraction": 0.1},
    {"bits": FREE_BITS, "bits_of": {"blocks.0.attention.key.weight": 5, "blocks.0.attention.value.weight": 16}, "target_bytes": 4000,
     "low_rank": {"max_bytes": 300, "bits": 8}, "rate_weight": 0.06})


def _compare_with_one_process(process: Process, checkpoint: Checkpoint, hessians: Hessians, expected: list[QuantizedModel]) -> None:
    for changes, quantized in zip(SETTINGS, expected, strict=True):
        assert_same(quantize(checkpoint, hessians, process, **changes), quantized)


def test_groups_of_the_same_shape_may_be_rounded_at_once(checkpoint: Checkpoint, hessians: Hessians,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the order of sums differs."""
    alone = [quantize(checkpoint, hessians, **changes) for changes in SETTINGS]
    batches, on_gpu, sizes = Quantizer._batches, SimpleNamespace(_process=SimpleNamespace(device=SimpleNamespace(type="cuda"))), []

    def batch_all(quantizer: Quantizer, groups: Sequence[Group]) -> Iterator[list[Group]]:
        for batch in batches(on_gpu, groups):  # type: ignore[arg-type]
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(Quantizer, "_batches", batch_all)
    for changes, expected in zip(SETTINGS, alone, strict=True):
        found = quantize(checkpoint, hessians, **changes).matrices
        assert found.keys() == expected.matrices.keys() and max(sizes) >= 3
        for name, matrix in expected.matrices.items():
            assert float((found[name].codes == matrix.codes).float().mean()) > 0.98, name
            assert torch.equal(found[name].column_exponents, matrix.column_exponents)


@pytest.mark.slow
def test_two_processes_find_the_same(checkpoint: Checkpoint, hessians: Hessians) -> None:
    expected = [quantize(checkpoint, hessians, **changes) for changes in SETTINGS]
    run_processes(_compare_with_one_process, 2, checkpoint, hessians, expected)
