import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.compression.adaptive import MAX_MAGNITUDE, NUM_TOKENS, IntegerDecoder, IntegerEncoder, Integers, new_counts

integers = st.one_of(st.integers(-40, 40), st.integers(-MAX_MAGNITUDE, MAX_MAGNITUDE))
int16s = st.integers(-2**15, 2**15 - 1)
GOLDEN = "28a05e0793b06984afca411cfd0c722a95684a2d9cdbf89a2fd9919e29932004"


@given(st.lists(st.tuples(st.lists(integers, max_size=200), st.booleans()), max_size=4))
def test_decoder_undoes_encoder(calls: list[tuple[list[int], bool]]) -> None:
    encoder, tables = IntegerEncoder(), (new_counts(), new_counts())
    for values, which in calls:
        encoder.put(values, tables[which])
    content = encoder.finish()
    assert encoder.num_bytes() == len(content)
    decoder, found_tables = IntegerDecoder(content), (new_counts(), new_counts())
    for values, which in calls:
        assert decoder.get(len(values), found_tables[which]).tolist() == values
    decoder.finish()
    np.testing.assert_array_equal(found_tables, tables)


def test_all_magnitudes() -> None:
    values, encoder = np.arange(-MAX_MAGNITUDE, MAX_MAGNITUDE + 1), IntegerEncoder()
    counts = new_counts()
    encoder.put(values, counts)
    assert (counts > 1).all(), "some token is never used"
    np.testing.assert_array_equal(IntegerDecoder(encoder.finish()).get(len(values), new_counts()), values)


@given(st.lists(st.lists(int16s, max_size=20) | st.tuples(int16s, st.integers(0, 9)).map(lambda pair: [pair[0]] * pair[1]), max_size=4))
def test_arrays(arrays: list[list[int]]) -> None:
    encoder, counts, header_counts = IntegerEncoder(), new_counts(), new_counts()
    for values in arrays:
        encoder.put_array(values, counts, header_counts)
    decoder, counts, header_counts = IntegerDecoder(encoder.finish()), new_counts(), new_counts()
    for values in arrays:
        assert decoder.get_array(len(values), counts, header_counts).tolist() == values
    decoder.finish()


def size_of(values: Integers) -> int:
    encoder = IntegerEncoder()
    encoder.put_array(values, new_counts(), new_counts())
    return len(encoder.finish())


def test_units_and_equal_values_take_little_space() -> None:
    small = np.random.default_rng(0).integers(-8, 8, 1000)
    assert size_of(np.full(100_000, 12345)) <= 12
    assert size_of(small) < 0.55 * 1000 and abs(size_of(128 * small + 7777) - size_of(small)) <= 8


def test_the_size_is_the_entropy_without_knowing_the_distribution() -> None:
    values = np.rint(np.random.default_rng(0).laplace(0, 5, 50_000)).astype(np.int64)
    frequencies = np.unique_counts(values).counts / len(values)
    encoder = IntegerEncoder()
    encoder.put(values, new_counts())
    assert len(encoder.finish()) < 1.005 * -(frequencies * np.log2(frequencies)).sum() * len(values) / 8


def test_streams_stay_readable() -> None:
    """On every platform and later, the bytes are these; whoever changes them changes the version of the container too."""
    encoder = IntegerEncoder()
    encoder.put_array(np.arange(3000)**2 % 1009 - 500, new_counts(), new_counts())
    assert hashlib.sha256(encoder.finish()).hexdigest() == GOLDEN


@given(st.binary(max_size=80), st.integers(0, 3000))
def test_garbage_is_integers_or_a_value_error(content: bytes, num_values: int) -> None:
    try:
        decoder, counts = IntegerDecoder(content), new_counts()
        values = decoder.get_array(num_values, counts, new_counts())
        decoder.finish()
    except ValueError:
        return
    assert len(values) == num_values and len(counts) == NUM_TOKENS
    assert not len(values) or -2**15 <= values.min() <= values.max() < 2**15


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="multiple of 4 bytes, found 5"):
        IntegerDecoder(b"abcde")
    with pytest.raises(ValueError, match="not a valid stream"):
        IntegerDecoder(b"\xff" * 12).get(100_000, new_counts())
    for beyond in (-2**15 - 1, 2**15):
        encoder = IntegerEncoder()
        encoder.put([beyond, 0], new_counts())
        content = encoder.finish()
        with pytest.raises(ValueError, match=f"expected integers of 16 bits, found {beyond} to {beyond}"):
            IntegerDecoder(content).get_array(1, new_counts(), new_counts())
    with pytest.raises(ValueError, match="expected the end of the stream"):
        IntegerDecoder(content + bytes(8)).finish()
