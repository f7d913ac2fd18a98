"""What is inside a ``model.ptz``, as text."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.artifacts.files import read_csv
from lib.artifacts.quantized import QuantizedTensor, scales_of
from lib.compression.budget import CODE, list_parts
from lib.compression.container import CHECKSUM_BYTES, VERSION, pack, read_artifact, read_header, unpack
from lib.errors import UserError

ERROR_COLUMNS = ("name", "method", "entropy_bits", "relative_error", "relative_error_rtn", "predicted_loss", "damping", "dead_columns")
SHOWN = 12  # names, at most, in an error
NUMBERS = "{:>14}{:>6}{:>15}{:>9}{:>9}{:>12}"


def describe_artifact(path: Path, roles_of: Callable[[dict[str, Any]], Mapping[str, str]]) -> str:
    """Size, checksum, configuration, a table of matrices, and bytes by role.

    Packs the model once more, because the file does not say how many bytes of it belong to which matrix.

    Args:
        path: the file.
        roles_of: configuration of a model -> name of each parameter -> its role.

    Raises:
        ContainerError: as `load_artifact`.
        UserError: a configuration that is not valid, or that has no such matrices.
    """
    blob = read_artifact(path)
    header, quantized = read_header(blob, str(path)), unpack(blob, str(path))
    packed, roles = pack(quantized, header.codec, header.level), roles_of(quantized.model)
    if foreign := sorted(quantized.matrices.keys() - roles.keys()):
        raise UserError(f"{path}: expected matrices of the model that its configuration describes, found {_printable(foreign[0])}")
    parts = [part for part in list_parts(quantized, packed, roles, 0) if part.part != CODE]
    name_width = 2 + max(map(len, [*map(_printable, quantized.matrices), *(part.part for part in parts), "vectors"]))
    lines = [
        f"file      {path}, {len(blob):,} bytes",
        f"checksum  {blob[-CHECKSUM_BYTES:].hex()}, fits",
        f"container version {VERSION}, codec {header.codec}, level {header.level}",
        f"model     {_list_settings(header.model)}",
        f"training  {_list_settings(header.training.model_dump())}",
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


def describe_matrices(path: Path, wanted: str, table: Path) -> str:
    """What happened to some matrices, a paragraph for each: grid, steps, bytes, and what quantizing them cost.

    Args:
        path: path of the ``model.ptz``.
        wanted: neighbouring parts of their names: ``blocks.3``, ``mlp.up``, or a whole name.
        table: ``tensors.csv`` of the stage quantize, which knows errors and losses; where it is missing or of another model, that is said.

    Raises:
        ContainerError: as `load_artifact`.
        UserError: no matrix has such a name.
    """
    blob = read_artifact(path)
    header, quantized = read_header(blob, str(path)), unpack(blob, str(path))
    packed = pack(quantized, header.codec, header.level)
    names = sorted({*quantized.matrices, *(name for name in quantized.vectors if name.endswith(".weight"))})
    chosen = [name for name in names if f".{wanted}." in f".{name}."]
    if not chosen:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        raise UserError(f"--matrix: expected parts of the name of a matrix, found {wanted}; there are "
                        f"{', '.join(map(_printable, names[:SHOWN]))}{more}")
    costs = {row["name"]: row for row in read_csv(table, ERROR_COLUMNS)} if table.exists() else {}
    same = all(name in costs and abs(float(costs[name]["entropy_bits"]) - matrix.entropy_bits()) < 1e-6
               for name, matrix in quantized.matrices.items())
    paragraphs = []
    for name in chosen:
        lines = ([f"kept at 16 bits, {2 * quantized.vectors[name].numel():,} bytes before compression"] if name in quantized.vectors
                 else _list_grid(quantized.matrices[name], packed.matrix_bytes[name], packed.correction_bytes.get(name, 0)))
        if same and name in costs:
            lines += _list_costs(costs[name], sum(float(row["predicted_loss"]) for row in costs.values()))
        paragraphs.append("\n  ".join([_printable(name), *lines]))
    if not same:
        paragraphs.append(f"What quantizing cost is not known: {table} is {'of another model' if costs else 'not there'}.")
    return "\n\n".join(paragraphs)


def _list_grid(matrix: QuantizedTensor, num_bytes: int, correction_bytes: int) -> list[str]:
    size, bits, codes, entropy, coded, size_bytes = _describe_matrix(matrix, num_bytes - correction_bytes)
    zeros = float((matrix.codes == 0).float().mean()) if matrix.codes.numel() else 0.0
    steps = [f"{kind} {_list_range(scales_of(exponents))}" for kind, exponents in (("rows", matrix.row_exponents),
                                                                                 ("columns", matrix.column_exponents)) if exponents.any()]
    return [f"size    {size}, {matrix.codes.numel():,} weights",
            f"bits    {bits}, codes {codes}, {zeros:.1%} of them 0",
            f"step    {'; '.join(steps) or 1}",
            f"bytes   {size_bytes}, {coded} bits per weight; entropy {entropy}"
            + (f"; and {correction_bytes:,} of a correction of rank {matrix.rank}" if matrix.rank else "")]


def _list_costs(row: Mapping[str, str], total_loss: float) -> list[str]:
    error, nearest, loss = (float(row[column]) for column in ("relative_error", "relative_error_rtn", "predicted_loss"))
    method = f", damping {row['damping']}, {row['dead_columns']} dead columns" if row["damping"] else ""
    ratio = f"; {error / nearest:.2f} of rounding to nearest, {nearest:.3g}" if nearest else ""
    share = f", {loss / total_loss:.1%} of what all matrices cost" if total_loss else ""
    return [f"method  {row['method']}{method}", f"error   {error:.3g} of the outputs, relative{ratio}",
            f"loss    {loss:.3g} nats per token{share}"]


def _list_range(values: Tensor) -> str:
    return f"{float(values.min()):.3g} to {float(values.max()):.3g}, median {float(values.median()):.3g}"


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
