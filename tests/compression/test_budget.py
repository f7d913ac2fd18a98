import re

import pytest
import torch

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor
from lib.compression.budget import BudgetError, Part, check_limit, list_parts, summarize
from lib.compression.container import pack
from lib.quantization.grid import round_to_grid, row_scales
from tests.quantization.power_law import make_clip, make_weight

ROLES = {"up": "mlp", "down": "mlp", "query": "attention", "mix": "vector"}
CODE_BYTES = 1000


def make_parts(mlp_bits: int = 5, attention_bits: int = 5) -> list[Part]:
    matrices = {}
    for seed, (name, num_rows, bits) in enumerate((("up", 200, mlp_bits), ("down", 100, mlp_bits), ("query", 60, attention_bits))):
        weight = make_weight(num_rows, 200, seed)
        scales = row_scales(weight, bits, make_clip("mse", num_candidates=50))
        matrices[name] = QuantizedTensor(round_to_grid(weight, scales, bits), scales, bits)
    quantized = QuantizedModel({}, {}, matrices, {"mix": torch.ones(2, 3).half()})
    packed = pack(quantized, "zstd", 19)
    parts = list_parts(quantized, packed, ROLES, CODE_BYTES)
    assert summarize(parts) == {"artifact_bytes": len(packed.blob) + CODE_BYTES, "code_bytes": CODE_BYTES, "blob_bytes": len(packed.blob)}
    return parts


def artifact_bytes(parts: list[Part]) -> int:
    return summarize(parts)["artifact_bytes"]


def failure(parts: list[Part], limit_bytes: int) -> str:
    with pytest.raises(BudgetError) as caught:
        check_limit(parts, limit_bytes)
    return str(caught.value)


def test_parts_are_the_roles_and_the_rest() -> None:
    assert [part[:4] for part in make_parts(mlp_bits=4)] == [
        ("attention", 1, 12_000, 5), ("mlp", 2, 60_000, 4), ("fp16", None, None, None), ("code", None, None, None)]


def test_the_limit_itself_fits_and_one_byte_less_does_not() -> None:
    parts = make_parts()
    size = artifact_bytes(parts)
    check_limit(parts, size)
    message = failure(parts, size - 1)
    assert f"at most {size - 1:,} bytes, found {size:,} (" in message and "code 1,000): 1 too many" in message
    assert message.endswith(f"compress.limit_bytes {size}")


def test_remedies_are_the_most_bits_that_fit_and_their_estimates_hold() -> None:
    size = artifact_bytes(make_parts())
    limit_bytes = size - 2300  # 2 of 5 bits of 12,000 weights are enough, or 1 bit of 60,000
    remedies = {key: (int(bits), int(estimate.replace(",", ""))) for key, bits, estimate in
                re.findall(r"quantize\.bits\.(\w+) (\d) \(about ([\d,]+) bytes\)", failure(make_parts(), limit_bytes))}
    assert {key: bits for key, (bits, _) in remedies.items()} == {"attention": 3, "mlp": 4}
    assert remedies["attention"][1] == pytest.approx(artifact_bytes(make_parts(attention_bits=3)), rel=0.02)
    assert remedies["mlp"][1] == pytest.approx(artifact_bytes(make_parts(mlp_bits=4)), rel=0.02)


def test_all_roles_together_where_no_single_one_is_enough() -> None:
    parts = make_parts()
    message = failure(parts, int(0.48 * artifact_bytes(parts)))
    assert re.search(r"any one of: all quantize\.bits at most 2 \(about [\d,]+ bytes\); compress", message)


def test_no_bits_are_enough() -> None:
    assert "any one of: a smaller model (fewer bits for these roles are not enough); compress" in failure(make_parts(), CODE_BYTES)


def test_roles_at_the_smallest_grid_are_not_proposed() -> None:
    parts = make_parts(mlp_bits=2)
    assert "any one of: quantize.bits.attention 4 (" in failure(parts, artifact_bytes(parts) - 100)
