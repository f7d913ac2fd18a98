"""Rounding all matrices of a block to a target, with sizes from the codes' entropy."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedModel, clip_range, exponents_of, scales_of
from lib.distributed import SINGLE_CPU
from lib.quantization.allocation import TOLERANCE, TargetError, column_exponents, row_exponents
from lib.quantization.clipping import row_scales
from lib.quantization.gptq import Problem, factorize, round_gptq, row_errors
from lib.quantization.grid import round_to_grid
from lib.quantization.quantizer import Matrices, Quantizer, smallest
from tests.artifacts.quantized_models import TRAINING
from tests.quantization.power_law import SHAPES, entropy_bits, make_hessian, make_layers
from tests.quantization.test_config import FREE_BITS, make_quantize

WEIGHTS, HESSIANS = make_layers()
SOURCES = {name: source for source, names in HESSIANS.inputs.items() for name in names}
ROLES = {name: source.split(".")[2] for name, source in SOURCES.items()}
QUERY, KEY, VALUE = HESSIANS.inputs["blocks.0.attention.input"]
FIXED_BYTES = 500


def measure(matrices: Matrices) -> int:
    return FIXED_BYTES + round(sum(entropy_bits(matrix.codes) * matrix.codes.numel() for matrix in matrices.values()) / 8)


def quantize(kind: int | str | dict[str, Any], **changes: Any) -> Matrices:
    hessians: Hessians = changes.pop("hessians", HESSIANS)
    bits: dict[str, int | str] = kind if isinstance(kind, dict) else dict.fromkeys(WEIGHTS, kind)
    params = make_quantize(**changes, **({"bits": FREE_BITS} if "target_bytes" in changes else {}))
    quantizer = Quantizer(WEIGHTS, hessians, bits, params, roles=ROLES, process=SINGLE_CPU)
    assert quantizer.dampings.keys() == bits.keys()
    return quantizer.round_clipped() if params.target_bytes is None else quantizer.meet_target(params.target_bytes, measure)


def loss_of(matrices: Matrices, moments: Moments = HESSIANS.verification) -> float:
    """Predicted, nats per token."""
    weights = QuantizedModel({}, TRAINING, matrices, {}).weights()
    return sum(float((moments.gradients[name].double() * row_errors(WEIGHTS[name] - weight, moments.hessians[SOURCES[name]])).sum()) / 2
               for name, weight in weights.items())


@pytest.mark.parametrize("target", [1200, 2000, 4000, 8000])
@pytest.mark.parametrize("rate_weight", [0.0, 0.1])
def test_the_target_is_met_from_below_and_nothing_clips(target: int, rate_weight: float) -> None:
    found = quantize("free", target_bytes=target, rate_weight=rate_weight)
    assert target * (1 - TOLERANCE) - 1 <= measure(found) <= target
    assert found.keys() == WEIGHTS.keys() and all(matrix.bits is None for matrix in found.values())
    assert max(int(matrix.codes.abs().max()) for matrix in found.values()) < clip_range(None)


@pytest.mark.parametrize("target", [2000, 3500, 6000])
def test_the_first_trial_is_close(target: int) -> None:
    """The curves say how many bits each step takes, so that few trials are needed."""
    sizes: list[int] = []

    def record(matrices: Matrices) -> int:
        sizes.append(measure(matrices))
        return sizes[-1]

    params = make_quantize(bits=FREE_BITS, target_bytes=target)
    quantizer = Quantizer(WEIGHTS, HESSIANS, dict.fromkeys(WEIGHTS, "free"), params, roles=ROLES, process=SINGLE_CPU)
    quantizer.meet_target(target, record)
    assert sizes[0] == FIXED_BYTES  # when everything is 0
    assert sizes[1] == pytest.approx(target, rel=0.06) and len(sizes) <= 7


def test_loss_falls_as_the_target_rises() -> None:
    losses = [loss_of(quantize("free", target_bytes=target)) for target in (600, 1500, 3000, 9000)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 1e4 * losses[-1]


def test_steps_are_those_of_rows_and_columns_up_to_a_factor_of_each_matrix() -> None:
    params = make_quantize()
    found = quantize("free", target_bytes=3000)
    shifts = []
    for name, matrix in found.items():
        factor = factorize("", HESSIANS.calibration.hessians[SOURCES[name]], params.damping, params.act_order)
        assert torch.equal(matrix.column_exponents, column_exponents(Problem(WEIGHTS[name], factor)))
        shift = (matrix.row_exponents - row_exponents(HESSIANS.calibration.gradients[name])).unique()
        assert len(shift) == 1
        shifts.append(int(shift))
    assert len(set(shifts)) > 2
    plain = quantize("free", target_bytes=3000, free_rows=False, free_columns=False)
    assert all(len(matrix.row_exponents.unique()) == 1 and not matrix.column_exponents.any() for matrix in plain.values())
    rows = quantize("free", target_bytes=3000, free_columns=False)
    assert all(len(matrix.row_exponents.unique()) > 1 and not matrix.column_exponents.any() for matrix in rows.values())


def test_codes_are_those_of_gptq_at_these_steps() -> None:
    found = quantize("free", target_bytes=3000, rate_weight=0.06)
    for name, matrix in found.items():  # alone; in the pipeline matrices with the same input are rounded together
        params = make_quantize()
        factor = factorize("", HESSIANS.calibration.hessians[SOURCES[name]], params.damping, params.act_order)
        codes, _ = round_gptq([Problem(WEIGHTS[name], factor)], [scales_of(matrix.row_exponents)], [scales_of(matrix.column_exponents)],
                              bits=None, block_size=16, rate_weight=0.06)
        assert float((codes[0] == matrix.codes).float().mean()) > 0.99, name


@pytest.mark.parametrize("bits", [4, 5])
def test_free_steps_beat_grids_that_clip_at_the_same_size(bits: int) -> None:
    """On moments that nothing was minimised with; and each kind of free step helps."""
    clipped = quantize(bits)
    target = measure(clipped)
    free = loss_of(quantize("free", target_bytes=target))
    assert free < 0.6 * loss_of(clipped)
    for less in ({"free_rows": False}, {"free_columns": False}):
        assert free < loss_of(quantize("free", target_bytes=target, **less))
    assert free < 0.7 * loss_of(quantize("free", target_bytes=target, method="rtn"))


def test_matrices_of_one_input_may_be_free_clipped_and_fp16() -> None:
    """Each as it would be if all were alike; a matrix that is to stay fp16 is not given."""
    bits: dict[str, Any] = {QUERY: "free", KEY: 5} | {name: 4 for name in WEIGHTS if name not in (QUERY, KEY, VALUE)}
    found = quantize(bits, target_bytes=4600)
    clipped = quantize(5)
    assert found.keys() == bits.keys() and 4600 * (1 - TOLERANCE) - 1 <= measure(found) <= 4600
    assert [found[name].bits for name in bits] == [None, 5, 4, 4]
    assert torch.equal(found[KEY].codes, clipped[KEY].codes) and torch.equal(found[KEY].row_exponents, clipped[KEY].row_exponents)
    assert int(found[QUERY].codes.abs().max()) > clip_range(5)


@pytest.mark.parametrize("kind", ["free", 5])
def test_round_to_nearest_is_nearest_at_its_steps(kind: int | str) -> None:
    found = quantize(kind, method="rtn", **({"target_bytes": 3000} if kind == "free" else {}))
    for name, matrix in found.items():
        steps = scales_of(matrix.row_exponents)[:, None] * scales_of(matrix.column_exponents)
        assert torch.equal(matrix.codes, round_to_grid(WEIGHTS[name], steps, matrix.bits).to(torch.int16)), name
        if kind != "free":
            assert torch.equal(matrix.row_exponents, exponents_of(row_scales(WEIGHTS[name], 5, make_quantize().clip)))


def test_gptq_beats_round_to_nearest_at_the_same_size() -> None:
    assert loss_of(quantize(5)) < 0.7 * loss_of(quantize(5, method="rtn"))


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.02, 0.3, 0.999])
@pytest.mark.parametrize("levels", [2, 40, 10**6])
def test_what_is_pruned_is_what_sorting_finds_and_of_equal_magnitudes_the_first(fraction: float, levels: int) -> None:
    weight = (torch.randn(30, 47, generator=torch.Generator().manual_seed(levels)) * levels).round() / levels
    expected = torch.zeros(weight.numel(), dtype=torch.bool)
    expected[weight.abs().flatten().argsort(stable=True)[:int(fraction * weight.numel())]] = True
    assert torch.equal(smallest(weight, fraction), expected.view(30, 47))


@pytest.mark.parametrize("kind", ["free", 4])
def test_the_smallest_magnitudes_are_pruned(kind: int | str) -> None:
    found = quantize(kind, prune_fraction=0.3, **({"target_bytes": 4000} if kind == "free" else {}))
    for name, matrix in found.items():
        pruned = WEIGHTS[name].abs().flatten().argsort()[:int(0.3 * WEIGHTS[name].numel())]
        assert not matrix.codes.flatten()[pruned].any(), name
        assert float((matrix.codes != 0).float().mean()) > 0.4


@pytest.mark.parametrize("kind", ["free", 3])
def test_a_low_rank_correction_is_in_the_model_and_lowers_the_loss(kind: int | str) -> None:
    target = {"target_bytes": 4000} if kind == "free" else {}
    plain = quantize(kind, **target)
    found = quantize(kind, low_rank={"max_bytes": 500, "bits": 8}, **target)
    assert 400 < sum(factor.codes.numel() for matrix in found.values() for factor in matrix.correction or ()) <= 500
    without = {name: replace(matrix, correction=None) for name, matrix in found.items()}
    assert without.keys() == plain.keys() and loss_of(found, HESSIANS.calibration) < loss_of(without, HESSIANS.calibration)
    if kind == "free":
        assert 0.99 * 4000 <= measure(found) <= 4000  # the correction counts
    else:
        assert loss_of(found) < 0.97 * loss_of(plain)


def correlate(moments: Moments) -> Moments:
    """With gradients of outputs that go together in part, of the same size each."""
    outputs = {}
    for number, (name, gradients) in enumerate(moments.gradients.items()):
        hessian = make_hessian(len(gradients), number)
        scales = (gradients / hessian.diagonal()).sqrt()
        outputs[name] = scales[:, None] * hessian * scales
    return Moments(moments.hessians, moments.gradients, outputs)


def test_feedback_across_outputs_meets_the_target_with_a_lower_loss() -> None:
    hessians = Hessians(HESSIANS.inputs, correlate(HESSIANS.calibration), correlate(HESSIANS.verification))
    losses = []
    for damping in (None, 0.05):
        found = quantize("free", hessians=hessians, target_bytes=3000, feedback_damping=damping)
        assert 3000 * (1 - TOLERANCE) - 1 <= measure(found) <= 3000 and found.keys() == WEIGHTS.keys()
        losses.append(sum(float(((hessians.verification.outputs[name] @ error) * (
            error @ hessians.verification.hessians[SOURCES[name]])).sum()) for name in WEIGHTS
            for error in [WEIGHTS[name] - found[name].weight()]))
        if damping is None:
            assert all(torch.equal(matrix.codes, found[name].codes) for name, matrix in quantize("free", target_bytes=3000).items())
    assert losses[1] < 0.85 * losses[0]
    nearest = quantize("free", hessians=hessians, target_bytes=3000, feedback_damping=0.05, method="rtn")
    assert all(torch.equal(matrix.codes, nearest[name].codes) for name, matrix in quantize("free", target_bytes=3000, method="rtn").items())


def test_feedback_across_outputs_needs_what_older_files_do_not_have() -> None:
    with pytest.raises(ValueError, match=r"quantize\.feedback_damping: expected Hessians with second moments .*calibrate again"):
        quantize("free", target_bytes=3000, feedback_damping=0.05)


def test_targets_below_the_smallest_size_are_errors_that_name_it() -> None:
    with pytest.raises(TargetError, match=r"quantize\.target_bytes: expected at least 500, found 499"):
        quantize("free", target_bytes=499)
    size = measure({name: matrix for name, matrix in quantize(4).items() if name != QUERY})
    with pytest.raises(TargetError, match=rf"expected at least {size:,}, found 1,000"):
        quantize(dict.fromkeys(WEIGHTS, 4) | {QUERY: "free"}, target_bytes=1000)


@pytest.mark.parametrize("target", [13_500, 10**6])
def test_targets_beyond_what_codes_hold_give_the_finest_steps_and_say_so(target: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = quantize("free", target_bytes=target)
    said = capsys.readouterr().err
    assert f"note: quantize.target_bytes is {target:,}, the closest size below it that was found is {measure(found):,}" in said
    assert measure(found) <= target and loss_of(found) < 1e-9
    assert all(clip_range(12) < int(matrix.codes.abs().max()) < clip_range(None) for matrix in found.values())


def test_dead_inputs_and_gradients_of_zero() -> None:
    hessian = HESSIANS.calibration.hessians["blocks.0.mlp.up"].clone()
    hessian[5], hessian[:, 5] = 0, 0
    gradients = HESSIANS.calibration.gradients | {VALUE: torch.zeros(12)}
    hessians = Hessians(HESSIANS.inputs, Moments(HESSIANS.calibration.hessians | {
        "blocks.0.mlp.up": hessian, "blocks.0.mlp.down": torch.zeros(64, 64)}, gradients), HESSIANS.verification)
    found = quantize("free", hessians=hessians, target_bytes=3000)
    assert measure(found) <= 3000 and not found["blocks.0.mlp.up.weight"].codes[:, 5].any()
    assert not found["blocks.0.mlp.down.weight"].codes.any()
    assert entropy_bits(found[VALUE].codes) < 0.3 and entropy_bits(found[QUERY].codes) > 3


def test_nothing_is_changed_and_results_repeat() -> None:
    before = {name: weight.clone() for name, weight in WEIGHTS.items()}
    one, two = (quantize("free", target_bytes=2000, low_rank={"max_bytes": 300, "bits": 8}) for _ in range(2))
    assert all(torch.equal(weight, before[name]) for name, weight in WEIGHTS.items()) and len(SHAPES) == len(HESSIANS.inputs)
    assert one.keys() == two.keys() and all(torch.equal(matrix.codes, two[name].codes) for name, matrix in one.items())
