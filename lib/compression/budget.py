"""The byte budget of the artifact: what takes how much of it, and what would make an artifact fit that does not."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lib.artifacts.quantized import MAX_BITS, MIN_BITS, QuantizedModel
from lib.compression.config import CompressParams
from lib.compression.container import Packed, pack
from lib.errors import UserError

SCALES, VECTORS, CONTAINER, CODE = "scales", "vectors", "container", "code"


class SizeRow(NamedTuple):
    """A part of the artifact; the fields are the columns of ``sizes.csv``, None is an empty cell.

    Attributes:
        part: a role with integer codes; ``scales``, the exponents of all matrices; ``vectors``, the tensors of floats; ``container``,
            header, configuration and checksum; or ``code``.
        num_tensors: parameters of the role.
        num_weights: number of weights of these parameters.
        bits: the most of their grids; None where some have free steps.
        coded_bits: per weight in the artifact; codes of low-rank corrections count as bytes, not as weights.
        num_bytes: in the artifact.
    """

    part: str
    num_tensors: int | None
    num_weights: int | None
    bits: int | None
    coded_bits: float | None
    num_bytes: int


class BudgetError(UserError):
    """An artifact above its limit; the message has the overshoot and what would fit."""


def artifact_bytes(coding: CompressParams, quantized: QuantizedModel) -> int:
    """Size of code and container, of the code what section ``compress`` reserves for it; errors as of `lib.compression.container.pack`."""
    return coding.code_bytes + len(pack(quantized, coding.codec, coding.level).blob)


def check_code(code_bytes: int, reserve_bytes: int) -> None:
    """Compare the code with what was reserved for it, ``compress.code_bytes``.

    Raises:
        BudgetError: the code is larger.
    """
    if code_bytes > reserve_bytes:
        raise BudgetError(f"compress.code_bytes: expected at least the {code_bytes:,} bytes of the submitted code, found "
                          f"{reserve_bytes:,}; raise it to {code_bytes}, and free steps are chosen for what is left")


def list_parts(quantized: QuantizedModel, packed: Packed, roles: Mapping[str, str], code_bytes: int) -> list[SizeRow]:
    """What takes how many bytes of the artifact, whose size is the sum.

    Args:
        quantized: the model.
        packed: the same, packed.
        roles: parameter name -> role.
        code_bytes: size of the code.
    """
    parts = []
    for role in sorted({roles[name] for name in quantized.matrices}):
        matrices = {name: matrix for name, matrix in quantized.matrices.items() if roles[name] == role}
        num_weights = sum(matrix.codes.numel() for matrix in matrices.values())
        num_bytes = sum(packed.matrix_bytes[name] for name in matrices)
        bits = [matrix.bits for matrix in matrices.values() if matrix.bits is not None]
        parts.append(SizeRow(role, len(matrices), num_weights, max(bits) if len(bits) == len(matrices) else None,
                          round(8 * num_bytes / max(1, num_weights), 3), num_bytes))
    rest = len(packed.blob) - sum(part.num_bytes for part in parts) - packed.exponents_bytes - packed.vectors_bytes
    sizes = {SCALES: packed.exponents_bytes, VECTORS: packed.vectors_bytes, CONTAINER: rest, CODE: code_bytes}
    return [*parts, *(SizeRow(name, None, None, None, None, size) for name, size in sizes.items())]


def summarize(parts: Sequence[SizeRow]) -> dict[str, int]:
    """``artifact_bytes``, all parts together, and of them ``code_bytes`` and ``blob_bytes``."""
    artifact_bytes = sum(part.num_bytes for part in parts)
    code_bytes = sum(part.num_bytes for part in parts if part.part == CODE)
    return {"artifact_bytes": artifact_bytes, "code_bytes": code_bytes, "blob_bytes": artifact_bytes - code_bytes}


def check_limit(parts: Sequence[SizeRow], limit_bytes: int) -> None:
    """Compare the artifact with its limit.

    Args:
        parts: all parts of the artifact.
        limit_bytes: limit of all parts together.

    Raises:
        BudgetError: above the limit.
    """
    artifact_bytes = summarize(parts)["artifact_bytes"]
    if artifact_bytes > limit_bytes:
        remedies = list_remedies(parts, artifact_bytes, limit_bytes) or ["a smaller model (fewer bits for these roles are not enough)"]
        raise BudgetError(
            f"compress.limit_bytes: expected code and blob of at most {limit_bytes:,} bytes, found {artifact_bytes:,} ("
            + ", ".join(f"{part.part} {part.num_bytes:,}" for part in parts) + f"): {artifact_bytes - limit_bytes:,} too many. "
            "What would fit, any one of: " + "; ".join([*remedies, f"compress.limit_bytes {artifact_bytes}"]))


def list_remedies(parts: Sequence[SizeRow], artifact_bytes: int, limit_bytes: int) -> list[str]:
    """A target for free steps; for each role with bits the most that would fit; if none would, the most bits of all these together.

    Coded bytes are taken to be proportional to the bits: within some percent for the clip rule mse, too much for max.
    """
    has_free = any(part.bits is None and part.num_weights for part in parts)
    coded = [part for part in parts if part.bits is not None]
    one_role = [_lower_bits(f"quantize.bits.{part.part}", [part], artifact_bytes, limit_bytes) for part in coded]
    all_roles = _lower_bits("all quantize.bits at most", coded, artifact_bytes, limit_bytes)
    return [f"quantize.target_bytes {limit_bytes}"] * has_free + (list(filter(None, one_role)) or list(filter(None, [all_roles])))


def _lower_bits(key: str, parts: Sequence[SizeRow], artifact_bytes: int, limit_bytes: int) -> str | None:
    for bits in range(MAX_BITS - 1, MIN_BITS - 1, -1):
        saved = sum(part.num_bytes * (part.bits - bits) / part.bits for part in parts if part.bits is not None and part.bits > bits)
        if artifact_bytes - saved <= limit_bytes:
            return f"{key} {bits} (about {artifact_bytes - saved:,.0f} bytes)"
    return None
