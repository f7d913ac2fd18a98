import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.quantized import QuantizedModel
from lib.compression.container import ContainerError, pack
from lib.compression.contents import describe_artifact
from tests.artifacts.quantized_models import TRAINING, make_quantized_model, make_quantized_tensor


def roles_of(model: dict[str, Any]) -> dict[str, str]:
    return {"a.weight": "mlp", "b.weight": "head"}


def describe(path: Path, quantized: QuantizedModel, codec: str) -> tuple[str, bytes]:
    packed = pack(quantized, codec, 7)
    path.write_bytes(packed.blob)
    return describe_artifact(path, roles_of), packed.blob


@pytest.mark.parametrize("codec", ["zstd", "range"])
def test_everything_is_there_and_the_parts_are_the_file(tmp_path: Path, codec: str) -> None:
    quantized = make_quantized_model()
    text, blob = describe(tmp_path / "model.ptz", quantized, codec)
    lines = text.splitlines()
    assert lines[0] == f"file      {tmp_path / 'model.ptz'}, {len(blob):,} bytes"
    assert lines[1] == f"checksum  {blob[-16:].hex()}, fits"
    assert lines[2] == f"container version 3, codec {codec}, level 7"
    assert lines[3:6] == ["model     num_layers 2", "training  sequence_tokens 8",
                          "vectors   2 with 7 values, float16, 1 with 2 values, float32"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[8:10]}
    packed, free = pack(quantized, codec, 7), quantized.matrices["a.weight"]
    assert {name: int(row[-1]) for name, row in rows.items()} == packed.matrix_bytes
    assert rows["a.weight"][:-1] == ["9", "x", "6", "free", f"{free.codes.min()}..{free.codes.max()}", f"{free.entropy_bits():.3f}",
                                     f"{8 * packed.matrix_bytes['a.weight'] / 54:.3f}"]
    assert rows["b.weight"][3] == "5"
    parts = {line.split()[0]: line.split()[1:] for line in lines[12:]}
    assert parts.keys() == {"mlp", "head", "scales", "vectors", "container"}
    assert (parts["mlp"][:2], parts["head"][:2]) == (["54", "free"], ["21", "5"])
    assert sum(int(row[-1]) for row in parts.values()) == len(blob)


def test_empty_matrices_and_no_matrices(tmp_path: Path) -> None:
    empty = make_quantized_tensor(0, 3, 5)
    text, _ = describe(tmp_path / "model.ptz", QuantizedModel({}, TRAINING, {"a.weight": empty}, {}), "zstd")
    assert re.search(r"a\.weight +0 x 3 +5 +-?0\.000 ", text) and "model     none" in text
    text, blob = describe(tmp_path / "model.ptz", QuantizedModel({}, TRAINING, {}, {}), "brotli")
    assert f"{len(blob)} bytes" in text


def test_names_cannot_command_the_terminal(tmp_path: Path) -> None:
    text, _ = describe(tmp_path / "model.ptz", replace(make_quantized_model(), model={"\x1b[2J": "\x1b[2J"}), "range")
    assert "\x1b" not in text and r'\u001b[2J "\u001b[2J"' in text


def test_damaged_files_are_container_errors(tmp_path: Path) -> None:
    path = tmp_path / "model.ptz"
    path.write_bytes(pack(make_quantized_model(), "range", 7).blob[:-1])
    with pytest.raises(ContainerError, match=r"model\.ptz: the checksum does not fit"):
        describe_artifact(path, roles_of)
