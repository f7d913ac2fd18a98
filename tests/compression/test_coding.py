import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.compression.coding import CODECS, Codes, compress_bytes, decompress_bytes

matrices = st.lists(hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)), max_size=4)


@pytest.mark.parametrize("name", CODECS)
@given(matrices, st.integers(1, 22))
def test_decode_undoes_encode(name: str, codes: list[Codes], level: int) -> None:
    stream, sizes = CODECS[name].encode(codes, level)
    assert len(sizes) == len(codes) and sum(sizes) <= len(stream)
    for found, expected in zip(CODECS[name].decode(stream, [matrix.shape for matrix in codes]), codes, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", CODECS)
def test_streams_that_do_not_fit_are_value_errors(name: str) -> None:
    codes = [np.arange(60, dtype=np.int8).reshape(6, 10), np.zeros((3, 4), np.int8)]
    stream, _ = CODECS[name].encode(codes, 3)
    for broken, shapes in ((stream[:-1], [(6, 10), (3, 4)]), (stream + b"\0", [(6, 10), (3, 4)]), (stream, [(6, 10)]), (b"", [(6, 10)]),
                           (stream, [(6, 10), (3, 5)]), (stream, [(6, 10), (3, 4), (1, 1)])):
        with pytest.raises(ValueError, match=r"expected|valid"):
            CODECS[name].decode(broken, shapes)


def test_codes_of_a_trained_matrix_come_near_their_entropy() -> None:
    generator = np.random.default_rng(0)
    codes = np.clip(np.round(generator.normal(0, 4, (256, 512)) * generator.uniform(0.5, 1.5, 512)), -15, 15).astype(np.int8)
    counts = np.unique_counts(codes).counts / codes.size
    entropy_bytes = -(counts * np.log2(counts)).sum() * codes.size / 8
    _, sizes = CODECS["zstd"].encode([codes], 22)
    assert sizes[0] < 1.02 * entropy_bytes


def test_a_frame_cannot_claim_more_than_is_expected() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(10_000_000))
    with pytest.raises(ValueError, match="expected a zstandard frame of 10 bytes, found 10000000"):
        decompress_bytes(bomb, 10)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(10_000_000))
    with pytest.raises(ValueError, match="zstandard frame"):
        decompress_bytes(unsized, 10)
    with pytest.raises(ValueError, match="zstandard frame"):
        decompress_bytes(compress_bytes(b"ab", 3) + b"x", 2)
