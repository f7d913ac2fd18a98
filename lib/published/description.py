"""What is inside a published file, and what came of its import, as text."""

import json
from pathlib import Path

from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.model.config import ModelParams
from lib.published.layout import infer_model
from lib.published.reader import Published, read_published


def describe_published(path: Path) -> str:
    """Size, checksum, a table of all parameters, and what their shapes tell of the section ``model``, as YAML.

    Raises:
        ArtifactError: as `read_published`.
    """
    published = read_published(path)
    shapes = published.shapes
    rows = [(name, " x ".join(map(str, shape)) or "scalar", _describe_values(published, name)) for name, shape in shapes.items()]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:2]]
    lines = [
        f"file        {path}, {published.num_bytes:,} bytes",
        f"SHA-256     {published.sha256}",
        f"kind        {_kind(published)}",
        f"parameters  {published.num_parameters:,} in {len(rows)} tensors",
        *([f"left out    {', '.join(published.skipped)}"] if published.skipped else []),
        "",
        *(f"{name.ljust(widths[0])}  {shape.rjust(widths[1])}  {values}" for name, shape, values in rows),
        "",
    ]
    try:
        inferred = infer_model(shapes)
    except ArtifactError as error:
        return "\n".join([*lines, str(error)])
    if num_layers := inferred.pop("value_embedding_layers"):
        lines.append(f"{num_layers} layers with the value embedding; shapes do not tell which")
    untold = [key for key in ModelParams.model_fields if key not in inferred]
    return "\n".join([*lines, f"# of the section model shapes do not tell: {', '.join(untold)}", "model:",
                      *(f"  {key}: {json.dumps(inferred[key])}" for key in ModelParams.model_fields if key in inferred)])


def describe_import(published: Published, seed: int, packed_bytes: int | None) -> str:
    """What was imported, and the commands that go on from there.

    Args:
        published: the file.
        seed: the seed whose outputs it has become.
        packed_bytes: size of an artifact, packed by this project; None for a float checkpoint.
    """
    skipped = [f"left out, not part of the model: {', '.join(published.skipped)}"] if published.skipped else []
    lines = [f"imported {_kind(published)} of {published.num_parameters:,} parameters as seed {seed}", *skipped]
    if packed_bytes is None:
        return "\n".join([*lines, "go on with:", f"  dvc commit --force train@{seed}", "  make repro"])
    return "\n".join([
        *lines, f"published file {published.num_bytes:,} bytes, packed by compress {packed_bytes:,} bytes "
        f"({packed_bytes / published.num_bytes - 1:+.1%})", "go on with:", f"  dvc repro --single-item compress@{seed} evaluate@{seed}",
        "  python -m tools.summary", "  make audit"])


def _kind(published: Published) -> str:
    return "quantized artifact" if published.is_quantized else "float checkpoint"


def _describe_values(published: Published, name: str) -> str:
    if name in published.floats:
        return _name_type(published.floats[name])
    codes, scales = published.codes[name]
    return f"codes {int(codes.min())}..{int(codes.max())}, scales {_name_type(scales)}" if codes.numel() else "codes"


def _name_type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
