"""Codecs: how the integer codes of matrices become bytes and come back.

R rows, C columns. A codec gets all matrices at once, so that it may share statistics between them; to add one, write its two
functions, enter it in `CODECS` and name it in ``CompressParams.codec``.
"""

import struct
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import brotli
import numpy as np
import zstandard

from lib.compression.context import Codes, decode_range, encode_range
from lib.errors import UserError

MAX_BROTLI_LEVEL = 11
ESCAPE = -128  # stands for a code beyond int8, or for itself
MAX_CODE_BYTES = 3  # of such a code: the escape and an int16


class Codec(NamedTuple):
    """A pair of functions that undo each other.

    Attributes:
        encode: (matrices (R, C) int16, level) -> the stream, and the bytes of it that each matrix accounts for.
        decode: (stream, (R, C) of each matrix) -> the matrices. Raises ValueError, and nothing else, for streams that are not valid;
            uses memory in proportion to the stream and the shapes.
    """

    encode: Callable[[Sequence[Codes], int], tuple[bytes, list[int]]]
    decode: Callable[[bytes, Sequence[tuple[int, int]]], list[Codes]]


def compress_bytes(content: bytes, level: int) -> bytes:
    """One zstandard frame that records its decompressed size."""
    return zstandard.ZstdCompressor(level=level, write_content_size=True).compress(content)


def decompress_bytes(frame: bytes, max_bytes: int) -> bytes:
    """The content of one zstandard frame; no memory beyond `max_bytes` is asked for, whatever the frame claims.

    Raises:
        ValueError: not exactly one valid frame of at most `max_bytes` bytes of content.
    """
    try:
        if (found := zstandard.frame_content_size(frame)) > max_bytes:
            raise UserError(f"expected a zstandard frame of at most {max_bytes} bytes, found {found}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=max_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise UserError(f"not a valid zstandard frame ({error})") from None


def compress_brotli(content: bytes, level: int) -> bytes:
    """One brotli stream."""
    return brotli.compress(content, quality=min(level, MAX_BROTLI_LEVEL))


def decompress_brotli(frame: bytes, max_bytes: int) -> bytes:
    """The content of one brotli stream; memory stays in proportion to `max_bytes`, whatever the stream would give.

    Raises:
        ValueError: not exactly one valid stream of at most `max_bytes` bytes of content.
    """
    decompressor = brotli.Decompressor()
    try:
        content = decompressor.process(frame, output_buffer_limit=max_bytes + 1)
    except brotli.error as error:
        raise UserError(f"not a valid brotli stream ({error})") from None
    if not decompressor.is_finished() or len(content) > max_bytes:
        raise UserError(f"expected a brotli stream of at most {max_bytes} bytes, found more, or one that is cut off")
    return content


def _framed(compress: Callable[[bytes, int], bytes], decompress: Callable[[bytes, int], bytes]) -> Codec:
    """A codec of general-purpose frames, one for each matrix: the lengths of all (uint32, little-endian), then the frames.

    A frame has the codes as int8, row after row, `ESCAPE` for those beyond, which follow as int16. One frame for each matrix because
    zstandard's parser can find a row of many matrices worth less than their literals and lose 9 % against the order-0 entropy.
    """
    def encode(matrices: Sequence[Codes], level: int) -> tuple[bytes, list[int]]:
        with ThreadPoolExecutor() as pool:
            frames = list(pool.map(lambda codes: compress(_to_bytes(codes), level), matrices))
        sizes = [len(frame) for frame in frames]
        return struct.pack(f"<{len(sizes)}I", *sizes) + b"".join(frames), sizes

    def decode(stream: bytes, shapes: Sequence[tuple[int, int]]) -> list[Codes]:
        position = 4 * len(shapes)
        if len(stream) < position:
            raise UserError(f"expected the lengths of {len(shapes)} frames, found {len(stream)} bytes")
        sizes = struct.unpack(f"<{len(shapes)}I", stream[:position])
        if (expected := position + sum(sizes)) != len(stream):
            raise UserError(f"expected frames of {expected} bytes together, found {len(stream)}")
        matrices = []
        for size, (num_rows, num_columns) in zip(sizes, shapes, strict=True):
            content = decompress(stream[position:position + size], MAX_CODE_BYTES * num_rows * num_columns)
            matrices.append(_from_bytes(content, num_rows * num_columns).reshape(num_rows, num_columns))
            position += size
        return matrices

    return Codec(encode, decode)


def _to_bytes(codes: Codes) -> bytes:
    is_small = (codes > ESCAPE) & (codes < -ESCAPE)
    return np.where(is_small, codes, ESCAPE).astype(np.int8).tobytes() + codes[~is_small].astype("<i2").tobytes()


def _from_bytes(content: bytes, num_codes: int) -> Codes:
    codes = np.frombuffer(content[:num_codes], np.int8).astype(np.int16)
    is_escaped = codes == ESCAPE
    if len(content) != (expected := num_codes + 2 * np.count_nonzero(is_escaped)):
        raise UserError(f"expected {expected} bytes of codes, found {len(content)}")
    codes[is_escaped] = np.frombuffer(content[num_codes:], "<i2")
    return codes


CODECS = {
    "zstd": _framed(compress_bytes, decompress_bytes),
    "brotli": _framed(compress_brotli, decompress_brotli),
    "range": Codec(encode_range, decode_range),
}
