import re
from dataclasses import replace

import pytest
import torch

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range
from lib.compression.budget import BudgetError, SizeRow, check_limit, list_parts, summarize
from lib.compression.container import pack
from tests.artifacts.quantized_models import TRAINING, make_quantized_tensor

ROLES = {"up": "mlp", "down": "mlp", "query": "attention", "mix": "vector"}
CODE_BYTES = 1000
STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 8: 0.0308, None: 0.1881}  # Max, Quantizing for minimum distortion, 1960, table II


def make_matrix(num_rows: int, bits: int | None, seed: int) -> QuantizedTensor:
    """A matrix of normal weights on the grid of least squared error, or with free steps like those of 5 bits."""
    weight = torch.randn(num_rows, 200, generator=torch.Generator().manual_seed(seed))
    codes = (weight / STEPS[bits]).round().clamp(-clip_range(bits), clip_range(bits)).short()
    return QuantizedTensor(codes, torch.arange(num_rows).short(), torch.zeros(200).short(), bits)


def make_parts(mlp_bits: int | None = 5, attention_bits: int | None = 5, down_bits: int | None = None, rank: int = 0) -> list[SizeRow]:
    matrices = {"up": make_matrix(200, mlp_bits, 0), "down": make_matrix(100, down_bits or mlp_bits, 1),
                "query": make_matrix(60, attention_bits, 2)}
    if rank:
        factors = make_quantized_tensor(60, rank, 8), make_quantized_tensor(rank, 200, 8)
        matrices["query"] = replace(matrices["query"], correction=factors)
    quantized = QuantizedModel({}, TRAINING, matrices, {"mix": torch.ones(2, 3).half()})
    packed = pack(quantized, "range", 19)
    parts = list_parts(quantized, packed, ROLES, CODE_BYTES)
    assert summarize(parts) == {"artifact_bytes": len(packed.blob) + CODE_BYTES, "code_bytes": CODE_BYTES, "blob_bytes": len(packed.blob)}
    assert {part.part: part.num_bytes for part in parts[-4:-2]} == {"scales": packed.exponents_bytes, "vectors": packed.vectors_bytes}
    return parts


def artifact_bytes(parts: list[SizeRow]) -> int:
    return summarize(parts)["artifact_bytes"]


def failure(parts: list[SizeRow], limit_bytes: int) -> str:
    with pytest.raises(BudgetError) as caught:
        check_limit(parts, limit_bytes)
    return str(caught.value)


def test_parts_are_the_roles_and_the_rest() -> None:
    parts = make_parts(mlp_bits=4)
    assert [part[:4] for part in parts] == [
        ("attention", 1, 12_000, 5), ("mlp", 2, 60_000, 4), ("scales", None, None, None), ("vectors", None, None, None),
        ("container", None, None, None), ("code", None, None, None)]
    assert all(part.coded_bits == pytest.approx(8 * part.num_bytes / part.num_weights, abs=0.001) for part in parts if part.num_weights)
    assert 100 < parts[-2].num_bytes < 500


def test_bits_are_the_most_of_a_role_and_none_where_some_are_free() -> None:
    assert [part.bits for part in make_parts(4, None, down_bits=8)[:2]] == [None, 8]
    assert [part.bits for part in make_parts(None, 5, down_bits=8)[:2]] == [5, None]


def test_corrections_are_bytes_of_the_role_of_their_matrix() -> None:
    (plain, *_), (corrected, *_) = make_parts(), make_parts(rank=3)
    assert corrected[:4] == plain[:4] and corrected.part == "attention"
    assert 0.8 * 260 * 3 < corrected.num_bytes - plain.num_bytes < 1.2 * 260 * 3


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


def test_the_first_remedy_for_free_steps_is_the_target() -> None:
    parts = make_parts(attention_bits=None)
    limit = artifact_bytes(parts) - 2300
    assert f"any one of: quantize.target_bytes {limit}; quantize.bits.mlp 4 (" in failure(parts, limit)
    free = make_parts(None, None)
    assert failure(free, 9000).endswith(f"any one of: quantize.target_bytes 9000; compress.limit_bytes {artifact_bytes(free)}")
    assert "target_bytes" not in failure(make_parts(), limit)


def test_all_roles_together_where_no_single_one_is_enough() -> None:
    parts = make_parts()
    message = failure(parts, int(0.48 * artifact_bytes(parts)))
    assert re.search(r"any one of: all quantize\.bits at most 2 \(about [\d,]+ bytes\); compress", message)


def test_no_bits_are_enough() -> None:
    assert "any one of: a smaller model (fewer bits for these roles are not enough); compress" in failure(make_parts(), CODE_BYTES)


def test_roles_at_the_smallest_grid_are_not_proposed() -> None:
    parts = make_parts(mlp_bits=2)
    assert "any one of: quantize.bits.attention 4 (" in failure(parts, artifact_bytes(parts) - 100)
