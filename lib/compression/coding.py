"""Codecs: how the integer codes of matrices become bytes and come back.

R rows, C columns. A codec gets all matrices at once, so that it may share statistics between them; to add one, write its two
functions, enter it in `CODECS` and name it in ``CompressParams.codec``.
"""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

Codes = npt.NDArray[np.int8]


class Codec(NamedTuple):
    """A pair of functions that undo each other.

    Attributes:
        encode: (matrices (R, C) int8, level) -> the stream, and the bytes of it that each matrix accounts for.
        decode: (stream, (R, C) of each matrix) -> the matrices. Raises ValueError for whatever `encode` does not write.
    """

    encode: Callable[[Sequence[Codes], int], tuple[bytes, list[int]]]
    decode: Callable[[bytes, Sequence[tuple[int, int]]], list[Codes]]


def compress_bytes(content: bytes, level: int) -> bytes:
    """One zstandard frame that records its decompressed size."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(content)


def decompress_bytes(frame: bytes, num_bytes: int) -> bytes:
    """The content of one zstandard frame; no memory beyond `num_bytes` is asked for, whatever the frame claims.

    Raises:
        ValueError: not exactly one valid frame of `num_bytes` bytes of content.
    """
    try:
        if (found := zstandard.frame_content_size(frame)) != num_bytes:
            raise ValueError(f"expected a zstandard frame of {num_bytes} bytes, found {found}")
        content = zstandard.ZstdDecompressor().decompress(frame, max_output_size=num_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"not a valid zstandard frame ({error})") from None
    if len(content) != num_bytes:
        raise ValueError(f"expected {num_bytes} bytes in a zstandard frame, found {len(content)}")
    return content


def encode_zstd(matrices: Sequence[Codes], level: int) -> tuple[bytes, list[int]]:
    """The lengths of all frames (uint32, little-endian), then one frame for each matrix, column after column.

    One frame per matrix because zstandard's parser can find a row of many matrices worth less than their literals and lose 9 %
    against the order-0 entropy; column-major because columns differ more than rows, whose scales have evened them out.
    """
    with ThreadPoolExecutor() as pool:
        frames = list(pool.map(lambda codes: compress_bytes(codes.tobytes(order="F"), level), matrices))
    sizes = [len(frame) for frame in frames]
    return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(frames), sizes


def decode_zstd(stream: bytes, shapes: Sequence[tuple[int, int]]) -> list[Codes]:
    """The matrices of a stream that `encode_zstd` wrote.

    Raises:
        ValueError: damaged, or of other shapes.
    """
    position = 4 * len(shapes)
    if len(stream) < position:
        raise ValueError(f"expected the lengths of {len(shapes)} frames, found {len(stream)} bytes")
    sizes = struct.unpack(f"<{len(shapes)}I", stream[:position])
    if (expected := position + sum(sizes)) != len(stream):
        raise ValueError(f"expected frames of {expected} bytes together, found {len(stream)}")
    matrices = []
    for size, (num_rows, num_columns) in zip(sizes, shapes, strict=True):
        content = decompress_bytes(stream[position:position + size], num_rows * num_columns)
        matrices.append(np.frombuffer(content, np.int8).reshape((num_rows, num_columns), order="F"))
        position += size
    return matrices


CODECS: dict[str, Codec] = {"zstd": Codec(encode_zstd, decode_zstd)}
