"""What is inside a ``model.ptz``, as text."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.artifacts.quantized import QuantizedTensor
from lib.compression.budget import CODE, list_parts
from lib.compression.container import CHECKSUM_BYTES, VERSION, pack, read_artifact, read_header, unpack

NUMBERS = "{:>14}{:>6}{:>15}{:>9}{:>9}{:>12}"


def describe_artifact(path: Path, roles_of: Callable[[dict[str, Any]], Mapping[str, str]]) -> str:
    """Size, checksum, configuration, a table of matrices, and bytes by role.

    Packs the model once more, because the file does not say how many bytes of it belong to which matrix.

    Args:
        path: the file.
        roles_of: configuration of a model -> name of each parameter -> its role.

    Raises:
        ContainerError: as `load_artifact`.
        UserError: a configuration that is not valid.
    """
    blob = read_artifact(path)
    header, quantized = read_header(blob, str(path)), unpack(blob, str(path))
    packed = pack(quantized, header.codec, header.level)
    parts = [part for part in list_parts(quantized, packed, roles_of(quantized.model), 0) if part.part != CODE]
    name_width = 2 + max(map(len, [*map(_printable, quantized.matrices), *(part.part for part in parts), "vectors"]))
    lines = [
        f"file      {path}, {len(blob):,} bytes",
        f"checksum  {blob[-CHECKSUM_BYTES:].hex()}, fits",
        f"container version {VERSION}, codec {header.codec}, level {header.level}",
        f"model     {_list_settings(header.model)}",
        f"training  {_list_settings(header.training)}",
        f"vectors   {_list_vectors(quantized.vectors.values())}",
        "",
        "matrix".ljust(name_width) + NUMBERS.format("size", "bits", "codes", "entropy", "coded", "bytes"),
    ]
    for name, matrix in sorted(quantized.matrices.items()):
        lines.append(_printable(name).ljust(name_width) + NUMBERS.format(*_describe_matrix(matrix, packed.matrix_bytes[name])))
    lines += ["", "part".ljust(name_width) + NUMBERS.format("weights", "bits", "", "", "coded", "bytes")]
    for part in parts:
        weights, coded = ("", "") if part.coded_bits is None else (f"{part.num_weights:,}", f"{part.coded_bits:.3f}")
        lines.append(part.part.ljust(name_width) + NUMBERS.format(
            weights, _name_bits(part.bits) if part.num_weights is not None else "", "", "", coded, f"{part.num_bytes:,}"))
    return "\n".join(lines)


def _describe_matrix(matrix: QuantizedTensor, num_bytes: int) -> tuple[str, ...]:
    codes = matrix.codes
    extremes = f"{int(codes.min())}..{int(codes.max())}" if codes.numel() else ""
    return (f"{codes.shape[0]} x {codes.shape[1]}", _name_bits(matrix.bits), extremes, f"{matrix.entropy_bits():.3f}",
            f"{8 * num_bytes / max(1, codes.numel()):.3f}", f"{num_bytes:,}")


def _list_vectors(vectors: Iterable[Tensor]) -> str:
    by_type: dict[str, list[int]] = {"float16": []}
    for vector in vectors:
        by_type.setdefault(str(vector.dtype).removeprefix("torch."), []).append(vector.numel())
    return ", ".join(f"{len(sizes)} with {sum(sizes):,} values, {kind}" for kind, sizes in by_type.items())


def _name_bits(bits: int | None) -> str:
    return "free" if bits is None else str(bits)


def _list_settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{_printable(key)} {json.dumps(value)}" for key, value in settings.items()) or "none"


def _printable(name: str) -> str:
    """Without control characters, which a foreign file could command the terminal with."""
    return json.dumps(name)[1:-1]
