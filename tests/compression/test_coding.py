import hashlib

import brotli
import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.compression import context
from lib.compression.coding import CODECS, compress_bytes, decompress_brotli, decompress_bytes
from lib.compression.context import MAX_PIECE, Codes, _Statistics

GOLDEN = "9547529e927334191de5354875cf63a3c8b4eda1cdd9fc288446f35bc6f44b53"
values = st.integers(-2, 2) | st.integers(-2**15, 2**15 - 1)
matrices = st.lists(hnp.arrays(np.int16, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9), elements=values), max_size=4)


@pytest.mark.parametrize("name", CODECS)
@given(matrices, st.integers(1, 22))
@example([np.array([[-32768, 32767], [-128, 128], [-127, 127], [-129, 0]], np.int16)], 1)
def test_decode_undoes_encode(name: str, codes: list[Codes], level: int) -> None:
    stream, sizes = CODECS[name].encode(codes, level)
    assert len(sizes) == len(codes) and sum(sizes) <= len(stream)
    for found, expected in zip(CODECS[name].decode(stream, [matrix.shape for matrix in codes]), codes, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)


@pytest.mark.parametrize("name", CODECS)
def test_streams_that_do_not_fit_are_value_errors(name: str) -> None:
    codes = [(np.arange(600, dtype=np.int16) ** 2 % 401).reshape(20, 30), np.zeros((3, 4), np.int16)]
    shapes = [matrix.shape for matrix in codes]
    stream, _ = CODECS[name].encode(codes, 3)
    for broken, found_shapes in ((stream[:-1], shapes), (stream + b"\0", shapes), (stream + bytes(8), shapes), (stream, shapes[:1]),
                                 (stream, [])):
        with pytest.raises(ValueError, match=r"expected|valid"):
            CODECS[name].decode(broken, found_shapes)


@pytest.mark.parametrize("name", ["zstd", "brotli"])
def test_frames_tell_other_shapes(name: str) -> None:
    codes = [np.arange(60, dtype=np.int16).reshape(6, 10), np.zeros((3, 4), np.int16)]
    stream, _ = CODECS[name].encode(codes, 3)
    for shapes in ([(6, 10), (3, 5)], [(6, 10), (3, 3)], [(6, 10), (1, 2)], [(6, 10), (3, 4), (1, 1)]):
        with pytest.raises(ValueError, match=r"expected|valid"):
            CODECS[name].decode(stream, shapes)


@pytest.mark.parametrize("name", CODECS)
@given(st.binary(max_size=60), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=3))
def test_garbage_is_matrices_or_a_value_error(name: str, stream: bytes, shapes: list[tuple[int, int]]) -> None:
    try:
        found = CODECS[name].decode(stream, shapes)
    except ValueError:
        return
    assert [matrix.shape for matrix in found] == shapes and all(matrix.dtype == np.int16 for matrix in found)


def entropy_bytes(codes: Codes) -> float:
    frequencies = np.unique_counts(codes).counts / codes.size
    return float(-(frequencies * np.log2(frequencies)).sum() * codes.size / 8)


def make_codes(num_rows: int, num_columns: int, spread: float, magnitude: float = 4, seed: int = 0) -> Codes:
    """Laplace codes with log-normal magnitudes of rows and columns."""
    generator = np.random.default_rng(seed)
    scales = magnitude * np.exp(spread * generator.normal(size=(num_rows, 1))) * np.exp(spread * generator.normal(size=num_columns))
    return np.rint(scales * generator.laplace(size=(num_rows, num_columns))).astype(np.int16)


@pytest.mark.parametrize(("name", "bound"), [("zstd", 1.025), ("brotli", 1.0), ("range", 0.96)])
def test_codes_of_a_trained_matrix_come_near_their_entropy_or_below(name: str, bound: float) -> None:
    codes = make_codes(256, 512, 0.5)  # 0.945 of the entropy with a table for the true magnitude of each code
    stream, _ = CODECS[name].encode([codes], 22)
    assert len(stream) < bound * entropy_bytes(codes)


@pytest.mark.parametrize(("num_rows", "num_columns", "bound"), [(512, 512, 1.005), (512, 8, 1.1), (8, 512, 1.1), (32, 32, 1.15)])
def test_rows_and_columns_alike_cost_hardly_more_than_their_entropy(num_rows: int, num_columns: int, bound: float) -> None:
    codes = make_codes(num_rows, num_columns, 0)
    stream, _ = CODECS["range"].encode([codes], 1)
    assert len(stream) < bound * entropy_bytes(codes)


def test_what_is_learned_from_a_matrix_helps_with_the_next() -> None:
    one, two = (make_codes(40, 40, 0.5, seed=seed) for seed in range(2))
    alone = sum(len(CODECS["range"].encode([codes], 1)[0]) for codes in (one, two))
    assert len(CODECS["range"].encode([one, two], 1)[0]) < 0.97 * alone


def test_contexts_with_more_codes_than_are_coded_at_a_time() -> None:
    codes = make_codes(1200, 1000, 0, magnitude=1)
    level = np.zeros(1200, np.int64), np.zeros(1000, np.int64)
    assert [len(places) for places, _ in _Statistics().by_context(*level)] == [MAX_PIECE, codes.size - MAX_PIECE]
    np.testing.assert_array_equal(CODECS["range"].decode(CODECS["range"].encode([codes], 1)[0], [codes.shape])[0], codes)


def test_streams_of_the_range_codec_stay_readable(monkeypatch: pytest.MonkeyPatch) -> None:
    """For given levels the bytes are these, on every platform and later; whoever changes them changes the container's version too."""
    monkeypatch.setattr(context, "_choose_levels", lambda codes: (np.arange(len(codes)) % 5, 20 - np.arange(codes.shape[1]) // 2))
    codes = ((np.arange(4000) ** 3 % 401 - 200).reshape(100, 40) // np.arange(1, 41)).astype(np.int16)
    assert hashlib.sha256(CODECS["range"].encode([codes[:10], codes], 1)[0]).hexdigest() == GOLDEN


def test_sizes_of_the_range_codec_are_those_of_the_matrices() -> None:
    codes = [make_codes(128, 128, 0.5), np.zeros((100, 100), np.int16), make_codes(128, 128, 0.5, seed=1)]
    stream, sizes = CODECS["range"].encode(codes, 1)
    assert sum(sizes) == len(stream) and sizes[1] < 40
    assert sizes[2] == pytest.approx(entropy_bytes(codes[2]), rel=0.12)


def test_a_frame_cannot_claim_or_hold_more_than_is_expected() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    with pytest.raises(ValueError, match="expected a zstandard frame of at most 10 bytes, found 10000000"):
        decompress_bytes(bomb, 10)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    with pytest.raises(ValueError, match="zstandard frame"):
        decompress_bytes(unsized, 10)
    for broken in (compress_bytes(b"ab", 3) + b"x", compress_bytes(b"ab", 3)[:-1], b""):
        with pytest.raises(ValueError, match="zstandard frame"):
            decompress_bytes(broken, 2)
    content = brotli.compress(b"abc")
    for size in (0, 3, 2**15 - 16, 2**15, 100_000):
        assert decompress_brotli(brotli.compress(bytes(size)), size) == bytes(size)
    for broken, max_bytes in ((brotli.compress(bytes(10_000_000)), 10), (content, 2), (content + b"x", 3), (content[:-1], 3), (b"", 3)):
        with pytest.raises(ValueError, match="brotli stream"):
            decompress_brotli(broken, max_bytes)
