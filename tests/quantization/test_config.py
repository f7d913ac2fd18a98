import contextlib
from typing import Any, get_args

import pytest

from lib.artifacts.quantized import MAX_BITS, MIN_BITS
from lib.params import ParamsError, parse_params
from lib.quantization.clipping import CLIP_RULES
from lib.quantization.config import QuantizeParams
from lib.quantization.grid_config import FLOAT_BITS, BitsParams, ClipParams

BITS = {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 5, "value_embedding": 5, "head": 8}
QUANTIZE: dict[str, Any] = {
    "method": "gptq", "bits": BITS, "clip": {"rule": "mse", "percentiles": [0.999, 1.0], "num_candidates": 50, "num_std": 4.0},
    "damping": 0.01, "block_size": 128, "act_order": True, "scale_factors": [1.0],
}


def test_accepts_exactly_the_integer_bits_and_fp16() -> None:
    accepted = set()
    for bits in range(-1, 40):
        with contextlib.suppress(ParamsError):
            accepted.add(parse_params(BITS | {"mlp": bits}, BitsParams, "bits.").mlp)
    assert accepted == {*range(MIN_BITS, MAX_BITS + 1), FLOAT_BITS}


def test_bits_error_names_key_and_value() -> None:
    with pytest.raises(ParamsError, match=r"quantize\.bits\.mlp: expected 2 to 8, or 16 .*, found 9"):
        parse_params(QUANTIZE | {"bits": BITS | {"mlp": 9}}, QuantizeParams, "quantize.")


def test_rule_names_are_the_registry() -> None:
    assert set(get_args(ClipParams.model_fields["rule"].annotation)) == CLIP_RULES.keys()


@pytest.mark.parametrize("change", [{"damping": 0.0}, {"damping": 2.0}, {"block_size": 0}, {"method": "obq"}])
def test_rejects_values_out_of_range(change: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=rf"quantize\.{next(iter(change))}"):
        parse_params(QUANTIZE | change, QuantizeParams, "quantize.")
