"""The byte budget of the artifact: what takes how much of it, and what would make an artifact fit that does not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lib.artifacts.quantized import MAX_BITS, MIN_BITS, QuantizedModel
from lib.compression.container import Packed

FP16, CODE = "fp16", "code"


class Part(NamedTuple):
    """A part of the artifact; the fields are the columns of ``sizes.csv``, None is an empty cell.

    Attributes:
        part: a role with integer codes; ``fp16`` for row scales, fp16 tensors and the container's own bytes; or ``code``.
        num_tensors: matrices of the role.
        num_weights: their weights.
        bits: per weight, before coding.
        num_bytes: in the artifact.
    """

    part: str
    num_tensors: int | None
    num_weights: int | None
    bits: int | None
    num_bytes: int


class BudgetError(ValueError):
    """An artifact above its limit; the message has the overshoot and what would fit."""


def list_parts(quantized: QuantizedModel, packed: Packed, roles: Mapping[str, str], code_bytes: int) -> list[Part]:
    """What takes how many bytes of the artifact, whose size is the sum.

    Args:
        quantized: the model.
        packed: the same, packed.
        roles: parameter name -> role, whose matrices all have the same bits.
        code_bytes: of the code.
    """
    parts = []
    for role in sorted({roles[name] for name in quantized.matrices}):
        matrices = {name: matrix for name, matrix in quantized.matrices.items() if roles[name] == role}
        num_weights = sum(matrix.codes.numel() for matrix in matrices.values())
        bits = max(matrix.bits for matrix in matrices.values())
        parts.append(Part(role, len(matrices), num_weights, bits, sum(packed.matrix_bytes[name] for name in matrices)))
    rest = len(packed.blob) - sum(packed.matrix_bytes.values())
    return [*parts, Part(FP16, None, None, None, rest), Part(CODE, None, None, None, code_bytes)]


def summarize(parts: Sequence[Part]) -> dict[str, int]:
    """``artifact_bytes``, all parts together, and of them ``code_bytes`` and ``blob_bytes``."""
    artifact_bytes = sum(part.num_bytes for part in parts)
    code_bytes = sum(part.num_bytes for part in parts if part.part == CODE)
    return {"artifact_bytes": artifact_bytes, "code_bytes": code_bytes, "blob_bytes": artifact_bytes - code_bytes}


def check_limit(parts: Sequence[Part], limit_bytes: int) -> None:
    """Compare the artifact with its limit.

    Args:
        parts: of the artifact.
        limit_bytes: of all parts together.

    Raises:
        BudgetError: above the limit.
    """
    artifact_bytes = summarize(parts)["artifact_bytes"]
    if artifact_bytes > limit_bytes:
        remedies = _list_remedies(parts, artifact_bytes, limit_bytes) or ["a smaller model (fewer bits for these roles are not enough)"]
        raise BudgetError(
            f"compress.limit_bytes: expected code and blob of at most {limit_bytes:,} bytes, found {artifact_bytes:,} ("
            + ", ".join(f"{part.part} {part.num_bytes:,}" for part in parts) + f"): {artifact_bytes - limit_bytes:,} too many. "
            "What would fit, any one of: " + "; ".join([*remedies, f"compress.limit_bytes {artifact_bytes}"]))


def _list_remedies(parts: Sequence[Part], artifact_bytes: int, limit_bytes: int) -> list[str]:
    """For each role the most bits that would fit; where no single role is enough, the most bits of all roles together.

    Coded bytes are taken to be proportional to the bits: within some percent for the clip rule mse, too much for max.
    """
    coded = [part for part in parts if part.bits is not None]
    one_role = [_lower_bits(f"quantize.bits.{part.part}", [part], artifact_bytes, limit_bytes) for part in coded]
    all_roles = _lower_bits("all quantize.bits at most", coded, artifact_bytes, limit_bytes)
    return list(filter(None, one_role)) or list(filter(None, [all_roles]))


def _lower_bits(key: str, parts: Sequence[Part], artifact_bytes: int, limit_bytes: int) -> str | None:
    for bits in range(MAX_BITS - 1, MIN_BITS - 1, -1):
        saved = sum(part.num_bytes * (part.bits - bits) / part.bits for part in parts if part.bits is not None and part.bits > bits)
        if artifact_bytes - saved <= limit_bytes:
            return f"{key} {bits} (about {artifact_bytes - saved:,.0f} bytes)"
    return None
