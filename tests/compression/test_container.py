import contextlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range
from lib.compression import container
from lib.compression.coding import compress_bytes, encode_zstd
from lib.compression.container import MAGIC, PREFIX, VERSION, ContainerError, load_artifact, pack, unpack
from tests.artifacts.quantized_models import assert_same, make_quantized_tensor

names = st.text("abcé_.0", min_size=1, max_size=8)
numbers = st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(st.none() | st.booleans() | numbers | st.text("aé\"\\\n"),
                     lambda values: st.lists(values, max_size=3) | st.dictionaries(names, values, max_size=3), max_leaves=5)


EMPTY_FRAME = compress_bytes(b"", 3)


@st.composite
def quantized_tensors(draw: st.DrawFn) -> QuantizedTensor:
    num_rows, num_columns, bits = draw(st.integers(0, 5)), draw(st.integers(0, 5)), draw(st.integers(2, 8))
    limit = clip_range(bits)
    codes = draw(st.lists(st.integers(-limit, limit), min_size=num_rows * num_columns, max_size=num_rows * num_columns))
    scales = draw(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=num_rows, max_size=num_rows))
    return QuantizedTensor(torch.tensor(codes, dtype=torch.int8).reshape(num_rows, num_columns), torch.tensor(scales).half(), bits)


@st.composite
def fp16_tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape)
    bits = draw(st.lists(st.integers(-2**15, 2**15 - 1), min_size=size, max_size=size))
    return torch.tensor(bits, dtype=torch.int16).view(torch.float16).reshape(shape)


@st.composite
def quantized_models(draw: st.DrawFn) -> QuantizedModel:
    matrices = draw(st.dictionaries(names, quantized_tensors(), max_size=3))
    vectors = draw(st.dictionaries(names, fp16_tensors(), max_size=3))
    return QuantizedModel(draw(st.dictionaries(names, plain, max_size=3)), draw(st.dictionaries(names, plain, max_size=3)), matrices,
                          {name: vector for name, vector in vectors.items() if name not in matrices})


def make_model() -> QuantizedModel:
    return QuantizedModel({"num_layers": 2}, {"qat": None}, {"b": make_quantized_tensor(3, 7, 5), "a": make_quantized_tensor(2, 4, 8)},
                          {"scale": torch.tensor(0.5).half(), "mix": torch.ones(2, 3).half()})


@given(quantized_models(), st.integers(1, 22))
def test_unpack_undoes_pack_bit_for_bit(quantized: QuantizedModel, level: int) -> None:
    packed = pack(quantized, "zstd", level)
    assert_same(unpack(packed.blob), quantized)
    assert packed.matrix_bytes.keys() == quantized.matrices.keys()
    assert sum(packed.matrix_bytes.values()) < len(packed.blob)


def test_same_model_gives_the_same_bytes_in_any_order() -> None:
    one = make_model()
    two = QuantizedModel(one.model, one.training, dict(reversed(one.matrices.items())), dict(reversed(one.vectors.items())))
    assert pack(one, "zstd", 22).blob == pack(two, "zstd", 22).blob


def test_every_flipped_bit_is_found() -> None:
    blob = pack(make_model(), "zstd", 3).blob
    for position in range(len(blob)):
        for bit in range(8):
            broken = bytearray(blob)
            broken[position] ^= 1 << bit
            with pytest.raises(ContainerError):
                unpack(bytes(broken))


def test_every_truncation_and_extension_is_found() -> None:
    blob = pack(make_model(), "zstd", 3).blob
    for end in range(len(blob)):
        with pytest.raises(ContainerError, match=r"truncated|not a \.ptz"):
            unpack(blob[:end])
    with pytest.raises(ContainerError):
        unpack(blob + b"\0")


@given(st.binary(max_size=200))
def test_foreign_bytes_are_container_errors(content: bytes) -> None:
    for blob in (content, MAGIC + content, MAGIC + bytes([VERSION]) + content):
        with pytest.raises(ContainerError):
            unpack(blob)


def test_newer_versions_say_so() -> None:
    blob = bytearray(pack(make_model(), "zstd", 3).blob)
    blob[len(MAGIC)] = VERSION + 1
    with pytest.raises(ContainerError, match=f"container version {VERSION + 1}, this program reads up to {VERSION}"):
        unpack(bytes(blob))


def seal(header: bytes, codes: bytes = b"", floats: bytes = EMPTY_FRAME, header_content_bytes: int | None = None) -> bytes:
    """A container with a valid checksum around any content: what a hostile or broken writer can make."""
    frame = compress_bytes(header, 3)
    size = len(header) if header_content_bytes is None else header_content_bytes
    content = PREFIX.pack(MAGIC, VERSION, len(frame), size) + frame + codes + floats
    return content + container._checksum(content)


def header(**changes: Any) -> bytes:
    fields = {"model": {}, "training": {}, "codec": "zstd", "codes_bytes": 0, "matrices": [], "vectors": []} | changes
    return json.dumps(fields).encode()


def matrix(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "rows": 1, "columns": 2, "bits": 5} | changes


def test_the_sealed_container_is_valid_otherwise() -> None:
    assert_same(unpack(seal(header())), QuantizedModel({}, {}, {}, {}))


@pytest.mark.parametrize(("blob", "message"), [
    (seal(b"[" * 100_000), "header: "),
    (seal(b"\xff\xfe"), "header: "),
    (seal(b"{}"), "header: model: Field required"),
    (seal(header(extra=1)), "header: extra: "),
    (seal(header(codec="pickle")), "expected one of zstd, found 'pickle'"),
    (seal(header(codes_bytes=-1)), "header: codes_bytes"),
    (seal(header(codes_bytes=10**9)), "expected .* bytes of header and codes"),
    (seal(header(), header_content_bytes=2**31), "header: expected at most 16777216 bytes"),
    (seal(header(), header_content_bytes=5), "expected a zstandard frame of 5 bytes"),
    (seal(header(matrices=[matrix(rows=2**20, columns=2**20)])), "expected at most 1073741824 values"),
    (seal(header(matrices=[matrix(rows=2**40)])), r"header: matrices\.0\.rows"),
    (seal(header(matrices=[matrix(rows=0, columns=2**40)])), r"header: matrices\.0\.columns"),
    (seal(header(vectors=[{"name": "a", "shape": [2**29, 2**29, 0]}])), "expected at most 1073741824 values"),
    (seal(header(vectors=[{"name": "a", "shape": [2**30]}])), "expected a zstandard frame of 2147483648 bytes, found 0"),
    (seal(header(vectors=[{"name": "a", "shape": [0]}, {"name": "a", "shape": [0]}])), "found a name twice"),
    (seal(header(matrices=[matrix(bits=9)])), r"header: matrices\.0\.bits"),
    (seal(header(matrices=[matrix()], codes_bytes=2), b"ab"), "expected the lengths of 1 frames, found 2 bytes"),
    (seal(header(matrices=[matrix()], codes_bytes=7), struct.pack("<I", 3) + b"abc"), "zstandard frame"),
    (seal(header(), floats=b"abc"), "zstandard frame"),
])
def test_hostile_containers_are_container_errors(blob: bytes, message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        unpack(blob)


def test_codes_beyond_their_bits_are_container_errors() -> None:
    good = QuantizedModel({}, {}, {"a": QuantizedTensor(torch.full((1, 2), 20, dtype=torch.int8), torch.ones(1).half(), 8)}, {})
    codes, _ = encode_zstd([good.matrices["a"].codes.numpy()], 3)
    with pytest.raises(ContainerError, match="a: codes: expected -15 to 15 with 5 bits, found 20 to 20"):
        unpack(seal(header(matrices=[matrix()], codes_bytes=len(codes)), codes, compress_bytes(b"\0\x3c", 3)))


@settings(max_examples=300)
@given(st.data())
def test_resealed_damage_never_raises_anything_else(data: st.DataObject) -> None:
    blob = bytearray(pack(make_model(), "zstd", 3).blob[:-container.CHECKSUM_BYTES])
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(blob)))
    content = bytes(blob[:end]) if data.draw(st.booleans()) else bytes(blob)
    with contextlib.suppress(ContainerError):
        unpack(content + container._checksum(content))


def test_files(tmp_path: Path) -> None:
    path, quantized = tmp_path / "model.ptz", make_model()
    path.write_bytes(pack(quantized, "zstd", 3).blob)
    assert_same(load_artifact(path), quantized)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ContainerError, match=r"model\.ptz: not a \.ptz container"):
        load_artifact(path)
    with pytest.raises(ContainerError, match="no such file"):
        load_artifact(tmp_path / "nothing.ptz")
