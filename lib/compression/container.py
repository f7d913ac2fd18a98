"""The submitted file, ``model.ptz``: a quantized model, self-describing, checksummed, read without unpickling anything.

Layout, integers little-endian:

    magic           4 bytes
    version         uint8, 1
    header_bytes    uint32, of the next part
    content_bytes   uint32, of its content
    header          zstandard frame of JSON: `Header`
    codes           `codes_bytes` bytes, written by the codec that the header names
    floats          zstandard frame: scales of all matrices, then all vectors, fp16; the low bytes of all values, then the high bytes
    checksum        16 bytes, BLAKE2b of everything before

Matrices and vectors are sorted by name, and the same model gives the same bytes.
"""

import hashlib
import math
import struct
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, JsonValue, ValidationError

from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import MAX_BITS, MIN_BITS, QuantizedModel, QuantizedTensor
from lib.compression.coding import CODECS, compress_bytes, decompress_bytes
from lib.params import NonNegative, Params

MAGIC = b"\x93PTZ"
VERSION = 1
PREFIX = struct.Struct("<4sBII")
CHECKSUM_BYTES = 16
MAX_HEADER_BYTES = 2**24  # both limits are far above any real model, and keep a hostile file from asking for more memory than this
MAX_VALUES = 2**30

Size = Annotated[int, Field(ge=0, le=MAX_VALUES)]


class ContainerError(ArtifactError):
    """A container that is damaged or foreign; the message says what was expected and found."""


class Matrix(Params):
    """Description of one quantized matrix."""

    name: str
    rows: Size
    columns: Size
    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]


class Vector(Params):
    """Description of one fp16 tensor."""

    name: str
    shape: tuple[Size, ...]


class Header(Params):
    """What the header says; `model` and `training` as in `QuantizedModel`."""

    model: dict[str, JsonValue]
    training: dict[str, JsonValue]
    codec: str
    codes_bytes: NonNegative
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]


class Packed(NamedTuple):
    """A container, and the bytes of it that the codes of each matrix take."""

    blob: bytes
    matrix_bytes: dict[str, int]


def pack(quantized: QuantizedModel, codec: str, level: int) -> Packed:
    """Pack a quantized model into the bytes of a container; `unpack` gives it back bit for bit.

    Args:
        quantized: tensors on the CPU; `model` and `training` hold what JSON can hold.
        codec: a name in `CODECS`.
        level: of the codec and of zstandard.
    """
    matrices, vectors = sorted(quantized.matrices.items()), sorted(quantized.vectors.items())
    codes, sizes = CODECS[codec].encode([matrix.codes.numpy() for _, matrix in matrices], level)
    header = Header(
        model=quantized.model, training=quantized.training, codec=codec, codes_bytes=len(codes),
        matrices=tuple(Matrix(name=name, rows=matrix.codes.shape[0], columns=matrix.codes.shape[1], bits=matrix.bits)
                       for name, matrix in matrices),
        vectors=tuple(Vector(name=name, shape=tuple(vector.shape)) for name, vector in vectors))
    header_content = header.model_dump_json().encode()
    header_frame = compress_bytes(header_content, level)
    halves = [matrix.scales for _, matrix in matrices] + [vector.flatten() for _, vector in vectors]
    floats = np.concatenate([np.empty(0, "<f2"), *(half.numpy().astype("<f2") for half in halves)])
    planes = floats.view(np.uint8).reshape(-1, 2).T.tobytes()
    prefix = PREFIX.pack(MAGIC, VERSION, len(header_frame), len(header_content))
    content = b"".join((prefix, header_frame, codes, compress_bytes(planes, level)))
    return Packed(content + _checksum(content), {name: size for (name, _), size in zip(matrices, sizes, strict=True)})


def unpack(blob: bytes, where: str = "container") -> QuantizedModel:
    """The quantized model in a container.

    Args:
        blob: the bytes that `pack` made.
        where: what errors call it, such as its path.

    Raises:
        ContainerError: not a container, of a newer version, truncated, damaged, or with contents that contradict each other.
    """
    try:
        return _unpack(blob)
    except ValueError as error:
        raise ContainerError(f"{where}: {error}") from None


def load_artifact(path: Path) -> QuantizedModel:
    """The quantized model in a file, ``model.ptz``.

    Raises:
        ContainerError: missing, or as `unpack`.
    """
    try:
        blob = path.read_bytes()
    except FileNotFoundError:
        raise ContainerError(f"{path}: no such file; `dvc repro` makes it") from None
    return unpack(blob, str(path))


def _unpack(blob: bytes) -> QuantizedModel:
    if blob[:len(MAGIC)] != MAGIC:
        raise ValueError(f"not a .ptz container: expected it to begin with {MAGIC!r}, found {blob[:len(MAGIC)]!r}")
    if len(blob) < PREFIX.size + CHECKSUM_BYTES:
        raise ValueError(f"truncated: {len(blob)} bytes; copy or make the file anew")
    _, version, header_bytes, content_bytes = PREFIX.unpack_from(blob)
    if version > VERSION:
        raise ValueError(f"container version {version}, this program reads up to {VERSION}; use the program that wrote it, or a newer one")
    if blob[-CHECKSUM_BYTES:] != _checksum(blob[:-CHECKSUM_BYTES]):
        raise ValueError("the checksum does not fit, so the file is truncated or damaged; copy or make it anew")
    header_end = PREFIX.size + header_bytes
    header = _read_header(blob[PREFIX.size:header_end], content_bytes)
    codes_end = header_end + header.codes_bytes
    if codes_end > len(blob) - CHECKSUM_BYTES:
        raise ValueError(f"expected {header_bytes} + {header.codes_bytes} bytes of header and codes, found {len(blob)} in all")
    codes = CODECS[header.codec].decode(blob[header_end:codes_end], [(matrix.rows, matrix.columns) for matrix in header.matrices])
    num_floats = sum(matrix.rows for matrix in header.matrices) + sum(math.prod(vector.shape) for vector in header.vectors)
    planes = np.frombuffer(decompress_bytes(blob[codes_end:-CHECKSUM_BYTES], 2 * num_floats), np.uint8)
    floats = np.ascontiguousarray(planes.reshape(2, -1).T).view("<f2")[:, 0]
    position = 0
    matrices: dict[str, QuantizedTensor] = {}
    for matrix, matrix_codes in zip(header.matrices, codes, strict=True):
        scales = _to_tensor(floats[position:position + matrix.rows], np.float16)
        try:
            matrices[matrix.name] = QuantizedTensor(_to_tensor(matrix_codes, np.int8), scales, matrix.bits)
        except ArtifactError as error:
            raise ValueError(f"{matrix.name}: {error}") from None
        position += matrix.rows
    vectors: dict[str, torch.Tensor] = {}
    for vector in header.vectors:
        size = math.prod(vector.shape)
        vectors[vector.name] = _to_tensor(floats[position:position + size], np.float16).reshape(vector.shape)
        position += size
    return QuantizedModel(header.model, header.training, matrices, vectors)


def _read_header(frame: bytes, content_bytes: int) -> Header:
    """Decompress and parse a header, and check what memory is going to be taken at its word."""
    if content_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"header: expected at most {MAX_HEADER_BYTES} bytes, found {content_bytes}")
    try:
        header = Header.model_validate_json(decompress_bytes(frame, content_bytes))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        raise ValueError(f"header: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    if header.codec not in CODECS:
        raise ValueError(f"header: codec: expected one of {', '.join(CODECS)}, found {header.codec!r}")
    names = [matrix.name for matrix in header.matrices] + [vector.name for vector in header.vectors]
    if len(set(names)) < len(names):
        raise ValueError("header: expected every tensor once, found a name twice")
    shapes = [(matrix.rows, matrix.columns) for matrix in header.matrices] + [vector.shape for vector in header.vectors]
    if (num_values := sum(math.prod(max(1, size) for size in shape) for shape in shapes)) > MAX_VALUES:
        raise ValueError(f"header: expected at most {MAX_VALUES} values, found {num_values}")
    return header


def _to_tensor(values: npt.NDArray[np.generic], dtype: type[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype, order="C"))


def _checksum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()
