import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lib.compression.exponents import Exponents, decode_exponents, encode_exponents

exponents = hnp.arrays(np.int16, st.integers(0, 9))


@given(st.lists(st.tuples(exponents, exponents), max_size=4))
def test_decode_undoes_encode(matrices: list[tuple[Exponents, Exponents]]) -> None:
    found = decode_exponents(encode_exponents(matrices), [(len(rows), len(columns)) for rows, columns in matrices])
    assert len(found) == len(matrices)
    for found_pair, pair in zip(found, matrices, strict=True):
        for one, other in zip(found_pair, pair, strict=True):
            np.testing.assert_array_equal(one, other, strict=True)


def test_equal_exponents_of_columns_cost_nearly_nothing() -> None:
    generator = np.random.default_rng(0)
    rows = [(16 * generator.integers(-300, -200, 512)).astype(np.int16) for _ in range(20)]
    with_columns = encode_exponents((one, np.zeros(512, np.int16)) for one in rows)
    assert len(with_columns) - len(encode_exponents((one, np.zeros(0, np.int16)) for one in rows)) <= 20
    assert len(with_columns) < 20 * 512 * 7 / 8  # log2(100) = 6.6 bits


def test_damage_is_a_value_error() -> None:
    content = encode_exponents([(np.arange(100, dtype=np.int16), np.zeros(5, np.int16))])
    for broken in (content[:-1], content + bytes(8), b"\xff" * len(content)):
        with pytest.raises(ValueError, match=r"expected|valid"):
            decode_exponents(broken, [(100, 5)])
