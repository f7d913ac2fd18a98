import contextlib
from typing import Any, get_args

import pytest

from lib.artifacts.quantized import MAX_BITS, MIN_BITS
from lib.calibration.config import CalibrateParams
from lib.params import ParamsError, parse_params
from lib.quantization.clipping import CLIP_RULES
from lib.quantization.config import ClipParams, QuantizeParams
from lib.quantization.grid_config import FLOAT_BITS

BITS: dict[str, Any] = {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 5, "value_embedding": 5, "head": 8}
QUANTIZE: dict[str, Any] = {
    "target_bytes": None, "method": "gptq", "bits": BITS, "bits_of": {}, "free_rows": True, "free_columns": True,
    "clip": {"rule": "mse", "percentiles": [0.999, 1.0], "num_candidates": 50, "num_std": 4.0, "num_std_of": {}, "floor": 0.0},
    "damping": 0.01, "feedback_damping": None, "block_size": 128, "act_order": True,
    "rate_weight": 0.0,
    "prune_fraction": 0.0, "low_rank": {"max_bytes": 0, "bits": 8}, "vector_mantissa_bits": 10, "heldout_tokens": 1000,
    "distill": {"steps": 0, "batch_sequences": 2, "code_lr": 0.02, "vector_lr": 0.002, "excess": 0.03, "precision": "fp32"},
}
FREE_BITS = dict.fromkeys(BITS, "free")


def make_quantize(**changes: Any) -> QuantizeParams:
    """Parameters with some values changed."""
    return parse_params(QUANTIZE | changes, QuantizeParams, "quantize.")


def test_accepts_exactly_the_integer_bits_and_fp16() -> None:
    accepted = set()
    for bits in range(-1, 40):
        with contextlib.suppress(ParamsError):
            accepted.add(make_quantize(bits=BITS | {"mlp": bits}).bits["mlp"])
    assert accepted == {*range(MIN_BITS, MAX_BITS + 1), FLOAT_BITS}


def test_bits_error_names_key_and_value() -> None:
    with pytest.raises(ParamsError, match=r"quantize\.bits\.mlp.*: expected 2 to 8, or 16 .*, found 9"):
        make_quantize(bits=BITS | {"mlp": 9})
    with pytest.raises(ParamsError, match=r"quantize\.bits_of\.a\.weight.*: expected 2 to 8, or 16 .*, found 1"):
        make_quantize(bits_of={"a.weight": 1})


def test_rule_names_are_the_registry() -> None:
    assert set(get_args(ClipParams.model_fields["rule"].annotation)) == CLIP_RULES.keys()


@pytest.mark.parametrize("change", [
    {"damping": 0.0}, {"damping": 2.0}, {"block_size": 0}, {"method": "obq"}, {"target_bytes": 0},
    {"rate_weight": -0.1}, {"prune_fraction": 1.0}, {"vector_mantissa_bits": 11},
    {"low_rank": {"max_bytes": -1, "bits": 8}}, {"low_rank": {"max_bytes": 0, "bits": 9}}, {"heldout_tokens": 0},
    {"bits": BITS | {"mlp": "fre"}}])
def test_rejects_values_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=rf"quantize\.{next(iter(change))}"):
        make_quantize(**change)


@pytest.mark.parametrize(("change", "free"), [
    ({}, False), ({"bits": FREE_BITS}, True), ({"bits": BITS | {"head": "free"}}, True), ({"bits_of": {"a": "free"}}, True),
    ({"bits_of": {"a": 16}}, False)])
def test_there_is_a_target_exactly_when_something_is_free(change: dict[str, Any], free: bool) -> None:
    assert make_quantize(**change, target_bytes=1000 if free else None).target_bytes == (1000 if free else None)
    with pytest.raises(ParamsError, match=r"quantize\.target_bytes: expected a number exactly when .* free, found "
                                          + ("None and some" if free else "1000 and no")):
        make_quantize(**change, target_bytes=None if free else 1000)


@pytest.mark.parametrize("change", [{"prune_fraction": 0.1}, {"low_rank": {"max_bytes": 1, "bits": 8}}])
def test_what_distillation_would_undo_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=r"quantize\.distill\.steps: expected 0, or neither pruning nor low-rank corrections"):
        make_quantize(**change, distill=QUANTIZE["distill"] | {"steps": 1})


def test_gradients_come_from_the_same_sequences() -> None:
    calibrate = {"num_sequences": 8, "batch_sequences": 4, "precision": "fp32"}
    assert parse_params(calibrate | {"num_gradient_sequences": 8}, CalibrateParams, "calibrate.").num_gradient_sequences == 8
    with pytest.raises(ParamsError, match=r"calibrate\.num_gradient_sequences: expected at most num_sequences 8, found 9"):
        parse_params(calibrate | {"num_gradient_sequences": 9}, CalibrateParams, "calibrate.")
