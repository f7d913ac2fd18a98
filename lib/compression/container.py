"""The submitted file, ``model.ptz``: a quantized model, self-describing, checksummed, read without unpickling anything.

Layout, integers little-endian:

    magic           4 bytes
    version         uint8, 3
    header_bytes    uint32, of the next part
    header          zstandard frame of JSON: `Header`
    codes           `codes_bytes` bytes, written by the codec that the header names
    exponents       `exponents_bytes` bytes: those of the scales of all matrices
    vectors         zstandard frame: all fp16 vectors, then all fp32 vectors; of each kind the lowest bytes of all values first
    checksum        16 bytes, BLAKE2b of everything before

Matrices and vectors are sorted by name, keys of the header too, and the same model gives the same bytes.
"""

import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field, JsonValue, ValidationError

from lib.artifacts.checkpoint import Training
from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import LEFT, MAX_BITS, MIN_BITS, RIGHT, QuantizedModel, QuantizedTensor, assemble, to_tensors
from lib.compression.coding import CODECS, compress_bytes, decompress_bytes
from lib.compression.exponents import decode_exponents, encode_exponents
from lib.errors import UserError
from lib.params import NonNegative, Params
from lib.problems import describe_problem

MAGIC = b"\x93PTZ"
VERSION = 3
PREFIX = struct.Struct("<4sBI")
CHECKSUM_BYTES = 16
VECTOR_TYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
# Far beyond any real model; they keep a hostile file from asking for more memory than these, or than in proportion to its own size.
MAX_HEADER_BYTES = 2**20
MAX_VALUES = 2**30
MAX_VALUES_PER_BYTE = 1024  # of the file; files with fewer values than the next constant may have more
MIN_MAX_VALUES = 2**20

Size = Annotated[int, Field(ge=0, le=MAX_VALUES)]
Side = Annotated[int, Field(ge=0, le=2**20)]


class ContainerError(ArtifactError):
    """A container that is damaged or foreign; the message says what was expected and found."""


class Matrix(Params):
    """Description of one quantized matrix."""

    name: str
    rows: Side
    columns: Side
    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)] | None


class Vector(Params):
    """Description of one tensor of floats."""

    name: str
    shape: tuple[Size, ...]
    dtype: Literal["float16", "float32"]


class Header(Params):
    """What the header says; `model` and `training` as in `QuantizedModel`."""

    model: dict[str, JsonValue]
    training: Training
    codec: str
    level: Annotated[int, Field(ge=1, le=22)]
    codes_bytes: NonNegative
    exponents_bytes: NonNegative
    matrices: tuple[Matrix, ...]
    vectors: tuple[Vector, ...]


class Packed(NamedTuple):
    """A container, and bytes of it.

    Attributes:
        blob: the container.
        matrix_bytes: size of each matrix, codes and those of its correction.
        correction_bytes: size of the correction alone, for matrices that have one.
        exponents_bytes: size of the scales of all matrices.
        vectors_bytes: size of all vectors.
    """

    blob: bytes
    matrix_bytes: dict[str, int]
    correction_bytes: dict[str, int]
    exponents_bytes: int
    vectors_bytes: int


def pack(quantized: QuantizedModel, codec: str, level: int) -> Packed:
    """Pack a quantized model into the bytes of a container; `unpack` gives it back bit for bit.

    Args:
        quantized: tensors on the CPU; `model` and `training` hold what JSON can hold.
        codec: a name in `CODECS`.
        level: level of the codec and of zstandard.

    Raises:
        ContainerError: a model that `unpack` would refuse, such as one of more than `MAX_VALUES_PER_BYTE` values in a byte of the file.
    """
    try:
        return _pack(quantized, codec, level)
    except ValueError as error:
        raise ContainerError(f"cannot be packed: {error}") from None


def unpack(blob: bytes, where: str = "container") -> QuantizedModel:
    """The quantized model in a container.

    Args:
        blob: the bytes that `pack` made.
        where: what errors call it, such as its path.

    Raises:
        ContainerError: not a container, of another version, truncated, damaged, or with contents that contradict each other.
    """
    try:
        return _unpack(blob)
    except ValueError as error:
        raise ContainerError(f"{where}: {error}") from None


def read_header(blob: bytes, where: str = "container") -> Header:
    """The header of a container; arguments and errors as of `unpack`."""
    try:
        return _open(blob)[0]
    except ValueError as error:
        raise ContainerError(f"{where}: {error}") from None


def seal(content: bytes) -> bytes:
    """A container's content with its checksum."""
    return content + hashlib.blake2b(content, digest_size=CHECKSUM_BYTES).digest()


def read_artifact(path: Path) -> bytes:
    """The bytes of a file, ``model.ptz``.

    Raises:
        ContainerError: missing, or no file.
    """
    try:
        if path.exists() and not path.is_file():  # a device, perhaps, that never ends
            raise ContainerError(f"{path}: cannot be read (a folder or a device)")
        return path.read_bytes()
    except FileNotFoundError:
        raise ContainerError(f"{path}: no such file; `dvc repro` makes it") from None
    except OSError as error:
        raise ContainerError(f"{path}: cannot be read ({error.strerror})") from None


def load_artifact(path: Path) -> QuantizedModel:
    """The quantized model in a file, ``model.ptz``.

    Raises:
        ContainerError: as `read_artifact` and `unpack`.
    """
    return unpack(read_artifact(path), str(path))


def _pack(quantized: QuantizedModel, codec: str, level: int) -> Packed:
    by_name, vectors_by_name = to_tensors(quantized)
    matrices, vectors = sorted(by_name.items()), sorted(vectors_by_name.items())
    codes, sizes = CODECS[codec].encode([matrix.codes.numpy() for _, matrix in matrices], level)
    exponents = encode_exponents((matrix.row_exponents.numpy(), matrix.column_exponents.numpy()) for _, matrix in matrices)
    header = Header(
        model=quantized.model, training=quantized.training, codec=codec, level=level, codes_bytes=len(codes),
        exponents_bytes=len(exponents),
        matrices=tuple(Matrix(name=name, rows=matrix.codes.shape[0], columns=matrix.codes.shape[1], bits=matrix.bits)
                       for name, matrix in matrices),
        vectors=tuple(Vector.model_validate({"name": name, "shape": tuple(vector.shape), "dtype": str(vector.dtype).removeprefix("torch.")})
                      for name, vector in vectors))
    header_frame = compress_bytes(json.dumps(header.model_dump(), sort_keys=True, separators=(",", ":")).encode(), level)
    planes = []
    for kind, dtype in VECTOR_TYPES.items():
        values = [vector.flatten().numpy().astype(dtype) for _, vector in vectors if vector.dtype == getattr(torch, kind)]
        planes.append(np.concatenate([np.empty(0, dtype), *values]).view(np.uint8).reshape(-1, dtype.itemsize).T.tobytes())
    vectors_frame = compress_bytes(b"".join(planes), level)
    content = b"".join((PREFIX.pack(MAGIC, VERSION, len(header_frame)), header_frame, codes, exponents, vectors_frame))
    blob = seal(content)
    if _open(blob)[0] != header:
        raise UserError("expected a model and training that JSON can hold, found something else")
    codes_bytes = {name: size for (name, _), size in zip(matrices, sizes, strict=True)}
    correction_bytes = {name: codes_bytes[name + LEFT] + codes_bytes[name + RIGHT] for name, matrix in quantized.matrices.items()
                        if matrix.correction is not None}
    matrix_bytes = {name: codes_bytes[name] + correction_bytes.get(name, 0) for name in quantized.matrices}
    return Packed(blob, matrix_bytes, correction_bytes, len(exponents), len(vectors_frame))


def _open(blob: bytes) -> tuple[Header, int]:
    """The header, checked, and where it ends."""
    if blob[:len(MAGIC)] != MAGIC:
        raise UserError(f"not a .ptz container: expected it to begin with {MAGIC!r}, found {blob[:len(MAGIC)]!r}")
    if len(blob) < PREFIX.size + CHECKSUM_BYTES:
        raise UserError(f"truncated: {len(blob)} bytes; copy or make the file anew")
    _, version, header_bytes = PREFIX.unpack_from(blob)
    if version != VERSION:
        raise UserError(f"container version {version}, this program reads version {VERSION} only; use the program that wrote it, "
                        "or make the file anew")
    if seal(blob[:-CHECKSUM_BYTES]) != blob:
        raise UserError("the checksum does not fit, so the file is truncated or damaged; copy or make it anew")
    header_end = PREFIX.size + header_bytes
    content = decompress_bytes(blob[PREFIX.size:header_end], MAX_HEADER_BYTES)
    try:
        header = Header.model_validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        raise UserError(f"header: {'.'.join(map(str, problem['loc']))}: {describe_problem(problem)}") from None
    _check(header, len(blob))
    if header_end + header.codes_bytes + header.exponents_bytes > len(blob) - CHECKSUM_BYTES:
        raise UserError(f"expected {header_bytes} + {header.codes_bytes} + {header.exponents_bytes} bytes of header, codes and "
                        f"exponents, found {len(blob)} in all")
    return header, header_end


def _unpack(blob: bytes) -> QuantizedModel:
    header, header_end = _open(blob)
    codes_end = header_end + header.codes_bytes
    exponents_end = codes_end + header.exponents_bytes
    shapes = [(matrix.rows, matrix.columns) for matrix in header.matrices]
    exponents = decode_exponents(blob[codes_end:exponents_end], shapes)
    codes = CODECS[header.codec].decode(blob[header_end:codes_end], shapes)
    matrices: dict[str, QuantizedTensor] = {}
    for matrix, matrix_codes, (rows, columns) in zip(header.matrices, codes, exponents, strict=True):
        try:
            matrices[matrix.name] = QuantizedTensor(torch.from_numpy(matrix_codes), torch.from_numpy(rows), torch.from_numpy(columns),
                                                    matrix.bits)
        except ArtifactError as error:
            raise UserError(f"{matrix.name}: {error}") from None
    num_bytes = sum(math.prod(vector.shape) * VECTOR_TYPES[vector.dtype].itemsize for vector in header.vectors)
    planes = np.frombuffer(decompress_bytes(blob[exponents_end:-CHECKSUM_BYTES], num_bytes), np.uint8)
    if len(planes) != num_bytes:
        raise UserError(f"expected vectors of {num_bytes} bytes, found {len(planes)}")
    vectors = {}
    for kind, dtype in VECTOR_TYPES.items():
        of_kind = [vector for vector in header.vectors if vector.dtype == kind]
        sizes = [math.prod(vector.shape) for vector in of_kind]
        part, planes = np.split(planes, [sum(sizes) * dtype.itemsize])
        values = np.ascontiguousarray(part.reshape(dtype.itemsize, -1).T).view(dtype)[:, 0].astype(kind)
        for vector, tensor in zip(of_kind, torch.from_numpy(values).split(sizes), strict=True):
            vectors[vector.name] = tensor.reshape(vector.shape).clone()
    return QuantizedModel(header.model, header.training, *assemble(matrices, vectors))


def _check(header: Header, num_bytes: int) -> None:
    """Raise ValueError for contradictions, and for values that a file of `num_bytes` bytes should not make anybody allocate."""
    json.dumps(header.model, allow_nan=False)  # pydantic lets NaN and infinity pass in JSON
    if header.codec not in CODECS:
        raise UserError(f"header: codec: expected one of {', '.join(CODECS)}, found {header.codec!r}")
    names = [matrix.name for matrix in header.matrices] + [vector.name for vector in header.vectors]
    if len(set(names)) < len(names):
        raise UserError("header: expected every tensor once, found a name twice")
    shapes = [(matrix.rows, matrix.columns) for matrix in header.matrices] + [vector.shape for vector in header.vectors]
    limit = min(MAX_VALUES, max(MIN_MAX_VALUES, MAX_VALUES_PER_BYTE * num_bytes))
    if (num_values := sum(math.prod(max(1, size) for size in shape) for shape in shapes)) > limit:
        raise UserError(f"header: expected at most {limit} values in a file of {num_bytes} bytes, found {num_values}")
