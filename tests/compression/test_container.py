import json
import math
import resource
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.artifacts.checkpoint import TrainedGrid, Training
from lib.artifacts.quantized import LEFT, RIGHT, SCALE, QuantizedModel, QuantizedTensor, clip_range
from lib.compression import container
from lib.compression.coding import CODECS, compress_bytes, decompress_bytes
from lib.compression.container import (
    MAGIC,
    MAX_HEADER_BYTES,
    MAX_VALUES,
    MIN_MAX_VALUES,
    PREFIX,
    VERSION,
    ContainerError,
    load_artifact,
    pack,
    read_header,
    unpack,
)
from tests.artifacts.quantized_models import TRAINING, assert_same, make_quantized_model, make_quantized_tensor

names = st.text("abcé_.0", min_size=1, max_size=8)
numbers = st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
plain = st.recursive(st.none() | st.booleans() | numbers | st.text("aé\"\\\n"),
                     lambda values: st.lists(values, max_size=3) | st.dictionaries(names, values, max_size=3), max_leaves=5)


EMPTY_FRAME = compress_bytes(b"", 3)


int16s = st.integers(-2**15, 2**15 - 1)


def int16_tensors(*shape: int, elements: st.SearchStrategy[int] = int16s) -> st.SearchStrategy[torch.Tensor]:
    size = math.prod(shape)
    return st.lists(elements, min_size=size, max_size=size).map(lambda values: torch.tensor(values, dtype=torch.int16).reshape(shape))


@st.composite
def quantized_tensors(draw: st.DrawFn, num_rows: int | None = None, num_columns: int | None = None) -> QuantizedTensor:
    num_rows = draw(st.integers(0, 5)) if num_rows is None else num_rows
    num_columns = draw(st.integers(0, 5)) if num_columns is None else num_columns
    bits = draw(st.none() | st.integers(2, 8))
    limit = clip_range(bits)
    return QuantizedTensor(draw(int16_tensors(num_rows, num_columns, elements=st.integers(-limit, limit))), draw(int16_tensors(num_rows)),
                           draw(int16_tensors(num_columns)), bits)


@st.composite
def float_tensors(draw: st.DrawFn, *sizes: int) -> torch.Tensor:
    """Any bits, as fp16 or fp32."""
    shape: Sequence[int] = sizes or draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape)
    num_bits, of_bits, dtype = draw(st.sampled_from([(16, torch.int16, torch.float16), (32, torch.int32, torch.float32)]))
    bits = draw(st.lists(st.integers(-2**(num_bits - 1), 2**(num_bits - 1) - 1), min_size=size, max_size=size))
    return torch.tensor(bits, dtype=of_bits).view(dtype).reshape(tuple(shape))


trainings = st.builds(Training, sequence_tokens=st.integers(1, 2**40), selected=st.none() | st.text(max_size=3), qat=st.none() | st.builds(
    TrainedGrid, below_lr=st.floats(0, 2), bits=st.dictionaries(names, st.integers(2, 16), max_size=3), floor=st.floats(0, 1)))


@st.composite
def quantized_models(draw: st.DrawFn) -> QuantizedModel:
    matrices = draw(st.dictionaries(names, quantized_tensors(), max_size=3))
    vectors = draw(st.dictionaries(names, float_tensors(), max_size=3))
    for name in draw(st.sets(st.sampled_from(sorted(matrices)))) if matrices else ():
        matrices[name] = replace(matrices[name], row_scales=draw(float_tensors(len(matrices[name].codes))))
    for name in draw(st.sets(st.sampled_from(sorted(matrices)))) if matrices else ():
        (num_rows, num_columns), rank = matrices[name].codes.shape, draw(st.integers(0, 3))
        factors = draw(quantized_tensors(num_rows, rank)), draw(quantized_tensors(rank, num_columns))
        matrices[name] = replace(matrices[name], correction=factors)
    return QuantizedModel(draw(st.dictionaries(names, plain, max_size=3)), draw(trainings), matrices,
                          {name: vector for name, vector in vectors.items() if name not in matrices})


BLOBS = {codec: pack(make_quantized_model(), codec, 3).blob for codec in CODECS}


@given(quantized_models(), st.sampled_from(sorted(CODECS)), st.integers(1, 22))
def test_unpack_undoes_pack_bit_for_bit(quantized: QuantizedModel, codec: str, level: int) -> None:
    packed = pack(quantized, codec, level)
    assert_same(unpack(packed.blob), quantized)
    assert packed.matrix_bytes.keys() == quantized.matrices.keys()
    assert sum(packed.matrix_bytes.values()) + packed.exponents_bytes + packed.vectors_bytes < len(packed.blob)
    header = read_header(packed.blob)
    assert (header.codec, header.level, header.exponents_bytes) == (codec, level, packed.exponents_bytes)


def test_same_model_gives_the_same_bytes_in_any_order() -> None:
    one = make_quantized_model()
    two = QuantizedModel(one.model, one.training, dict(reversed(one.matrices.items())), dict(reversed(one.vectors.items())))
    for codec in CODECS:
        assert pack(one, codec, 3).blob == pack(two, codec, 3).blob == BLOBS[codec]


def test_every_flipped_bit_is_found() -> None:
    blob = BLOBS["range"]
    for position, bit in product(range(len(blob)), range(8)):
        broken = bytearray(blob)
        broken[position] ^= 1 << bit
        with pytest.raises(ContainerError):
            unpack(bytes(broken))


def test_every_truncation_and_extension_is_found() -> None:
    blob = BLOBS["range"]
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


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1])
def test_other_versions_say_so(version: int) -> None:
    blob = bytearray(BLOBS["zstd"])
    blob[len(MAGIC)] = version
    with pytest.raises(ContainerError, match=f"container version {version}, this program reads version {VERSION} only"):
        unpack(bytes(blob))


EMPTY_FRAME = compress_bytes(b"", 3)


def seal(header: bytes, content: bytes = EMPTY_FRAME) -> bytes:
    """A container with a valid checksum around any content: what a hostile or broken writer can make."""
    frame = compress_bytes(header, 3)
    blob = PREFIX.pack(MAGIC, VERSION, len(frame)) + frame + content
    return container.seal(blob)


def header(**changes: Any) -> bytes:
    fields = {"model": {}, "training": {"sequence_tokens": 8}, "codec": "zstd", "level": 3, "codes_bytes": 0, "exponents_bytes": 0,
              "matrices": [], "vectors": []} | changes
    return json.dumps(fields).encode()


def matrix(**changes: Any) -> dict[str, Any]:
    return {"name": "a", "rows": 1, "columns": 2, "bits": 5} | changes


def vector(*shape: int, name: str = "a", dtype: str = "float16") -> dict[str, Any]:
    return {"name": name, "shape": shape, "dtype": dtype}


def test_the_sealed_container_is_valid_otherwise() -> None:
    assert_same(unpack(seal(header())), QuantizedModel({}, TRAINING, {}, {}))


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(("blob", "message"), [
    (seal(b"[" * 100_000), "header: "),
    (seal(header().replace(b'"model": {}', b'"model": {"a": ' + DEEP.encode() + b"}")), "header: .*recursion"),
    (seal(header().replace(b'"level": 3', b'"level": ' + b"9" * 1_000_000)), "header: "),
    (seal(header().replace(b'"level": 3', b'"level": NaN')), "header: "),
    (seal(header(model={"a": [math.nan]})), "Out of range float"),
    (seal(header(model={"a": 1.5}).replace(b"1.5", b"1e999")), "Out of range float"),
    (seal(b"\xff\xfe"), "header: "),
    (seal(b"{}"), "header: model: missing"),
    (seal(header(extra=1)), "header: extra: "),
    (seal(header(codec="pickle")), "expected one of zstd, brotli, range, found 'pickle'"),
    (seal(header(level=23)), "header: level"),
    (seal(header(codes_bytes=-1)), "header: codes_bytes"),
    (seal(header(codes_bytes=10**30)), "header: codes_bytes: expected a number below"),
    (seal(header(exponents_bytes=10**9)), "expected .* bytes of header, codes and exponents"),
    (seal(header() + b" " * MAX_HEADER_BYTES), f"expected a zstandard frame of at most {MAX_HEADER_BYTES} bytes"),
    (seal(header(matrices=[matrix(rows=2**20, columns=2**20)])), f"expected at most {MIN_MAX_VALUES} values in a file of"),
    (seal(header(matrices=[matrix(rows=2**20 + 1)])), r"header: matrices\.0\.rows"),
    (seal(header(matrices=[matrix(rows=0, columns=2**40)])), r"header: matrices\.0\.columns"),
    (seal(header(vectors=[vector(2**19, 2**19, 0)])), f"expected at most {MIN_MAX_VALUES} values"),
    (seal(header(vectors=[vector(MIN_MAX_VALUES + 1)])), f"expected at most {MIN_MAX_VALUES} values"),
    (seal(header(vectors=[vector(MAX_VALUES), vector(1, name="b")]), bytes(MAX_VALUES // 1024)), f"expected at most {MAX_VALUES} values"),
    (seal(header(vectors=[vector(9)])), "expected vectors of 18 bytes, found 0"),
    (seal(header(vectors=[vector(9), vector(1, name="b", dtype="float32")])), "expected vectors of 22 bytes, found 0"),
    (seal(header(vectors=[vector(9, dtype="int16")])), r"header: vectors\.0\.dtype"),
    (seal(header(vectors=[vector(1)]), compress_bytes(b"abc", 3)), "expected a zstandard frame of at most 2 bytes, found 3"),
    (seal(header(vectors=[vector(0), vector(0)])), "found a name twice"),
    (seal(header(matrices=[matrix(rows=0)], vectors=[vector(0)])), "found a name twice"),
    (seal(header(matrices=[matrix(bits=9)])), r"header: matrices\.0\.bits"),
    (seal(header(matrices=[matrix()], codes_bytes=2), b"ab" + EMPTY_FRAME), "expected the lengths of 1 frames, found 2 bytes"),
    (seal(header(matrices=[matrix()], codes_bytes=7), b"\3\0\0\0abc" + EMPTY_FRAME), "zstandard frame"),
    (seal(header(exponents_bytes=3), b"abc" + EMPTY_FRAME), "expected a stream of a multiple of 4 bytes"),
    (seal(header(exponents_bytes=16), b"abcdefgh" * 2 + EMPTY_FRAME), "expected the end of the stream"),
    (seal(header(), b"abc"), "zstandard frame"),
])
def test_hostile_containers_are_container_errors(blob: bytes, message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        unpack(blob)


def test_codes_beyond_their_bits_are_container_errors() -> None:
    codes, _ = CODECS["zstd"].encode([np.full((1, 2), 20, np.int16)], 3)
    sealed = header(matrices=[matrix()], codes_bytes=len(codes))
    with pytest.raises(ContainerError, match="a: codes: expected -15 to 15, found 20 to 20"):
        unpack(seal(sealed, codes + EMPTY_FRAME))


def make_zeros(num_rows: int, num_columns: int) -> QuantizedTensor:
    rows, columns = torch.zeros(num_rows, dtype=torch.int16), torch.zeros(num_columns, dtype=torch.int16)
    return QuantizedTensor(rows[:, None] * columns, rows, columns, None)


@pytest.mark.parametrize(("quantized", "message"), [
    (QuantizedModel({"a": math.nan}, TRAINING, {}, {}), "cannot be packed"),
    (QuantizedModel({"a": "b" * MAX_HEADER_BYTES}, TRAINING, {}, {}), "cannot be packed: expected a zstandard frame of at most"),
    (QuantizedModel({}, TRAINING, {"a": make_quantized_tensor(1, 1, 5)}, {"a": torch.zeros(1).half()}),
     "cannot be packed: .* a name twice"),
    (QuantizedModel({}, TRAINING, {"a": make_zeros(1024, 1025)}, {}), "cannot be packed: header: expected at most 1048576 values"),
])
def test_what_could_not_be_unpacked_is_not_packed(quantized: QuantizedModel, message: str) -> None:
    with pytest.raises(ContainerError, match=message):
        pack(quantized, "range", 3)


def accept_or_refuse(blob: bytes) -> None:
    """A container is a whole model or a ContainerError; any other exception fails the test."""
    try:
        quantized = unpack(blob)
    except ContainerError:
        return
    quantized.weights()


@settings(max_examples=300)
@given(st.data(), st.sampled_from(sorted(CODECS)))
def test_resealed_damage_never_raises_anything_else(data: st.DataObject, codec: str) -> None:
    blob = bytearray(BLOBS[codec][:-container.CHECKSUM_BYTES])
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(blob)) | st.just(len(blob)))
    accept_or_refuse(container.seal(bytes(blob[:end])))


def split(blob: bytes) -> tuple[dict[str, Any], bytes]:
    """Header as plain data, and what follows up to the checksum."""
    end = PREFIX.size + PREFIX.unpack_from(blob)[2]
    return json.loads(decompress_bytes(blob[PREFIX.size:end], MAX_HEADER_BYTES)), blob[end:-container.CHECKSUM_BYTES]


@pytest.mark.parametrize(("name", "other"), [
    ("a.weight" + LEFT, "b.weight" + LEFT), ("a.weight" + LEFT, "c"), ("a.weight" + RIGHT, "c"), ("a.weight", "c"),
    ("a.weight" + LEFT, "a.weight" + LEFT + LEFT), ("b.weight" + SCALE, "a.weight" + SCALE), ("b.weight" + SCALE, "c" + SCALE),
    ("b.weight" + SCALE, "a.weight" + LEFT + SCALE), ("mix", "a.weight" + SCALE)])
def test_parts_that_do_not_fit_together_are_container_errors(name: str, other: str) -> None:
    fields, content = split(BLOBS["range"])
    part, = (part for part in [*fields["matrices"], *fields["vectors"]] if part["name"] == name)
    part["name"] = other
    with pytest.raises(ContainerError, match="the matrix does not fit together with its row scales or correction"):
        unpack(seal(json.dumps(fields).encode(), content))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(sorted(CODECS)))
def test_headers_that_lie_never_raise_anything_else(data: st.DataObject, codec: str) -> None:
    fields, content = split(BLOBS[codec])
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from([fields, *fields["matrices"], *fields["vectors"]]))
        key = data.draw(st.sampled_from(sorted(part)))
        part[key] = data.draw({"name": st.sampled_from(["a", "b", "a:left", "b:right", "a:scale"]),
                               "codec": st.sampled_from(sorted(CODECS)), "dtype": st.sampled_from(["float16", "float32", "int8"]),
                               "shape": st.lists(st.integers(0, 2000), max_size=3)}.get(key, st.integers(0, 2000) | st.none()))
        if not isinstance(fields["matrices"], list) or not isinstance(fields["vectors"], list):
            break
    accept_or_refuse(seal(json.dumps(fields).encode(), content))


def test_a_small_file_cannot_take_much_memory() -> None:
    """Whole streams of each codec for as many values as a file of its size may claim."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for codec, shape in product(CODECS, ((1024, 1024), (1, MIN_MAX_VALUES // 2), (MIN_MAX_VALUES // 2, 1))):
        zeros = make_zeros(*shape)
        blob = pack(QuantizedModel({}, TRAINING, {"a": zeros}, {}), codec, 3).blob
        assert len(blob) < 1000
        assert_same(unpack(blob), QuantizedModel({}, TRAINING, {"a": zeros}, {}))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024  # kibibytes


def test_files(tmp_path: Path) -> None:
    path, quantized = tmp_path / "model.ptz", make_quantized_model()
    path.write_bytes(BLOBS["range"])
    assert_same(load_artifact(path), quantized)
    path.write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ContainerError, match=r"model\.ptz: not a \.ptz container"):
        load_artifact(path)
    with pytest.raises(ContainerError, match="no such file"):
        load_artifact(tmp_path / "nothing.ptz")
    with pytest.raises(ContainerError, match="cannot be read"):
        load_artifact(tmp_path)
