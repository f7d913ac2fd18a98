"""Integers as a range-coded stream whose tables nobody stores: each is counted from the integers coded with it before.

An integer is a token for its magnitude, a sign and the low bits of a large magnitude. Tokens are coded with the counts of earlier
ones, which change after chunks of growing length, so that a chunk is one call; signs and low bits are equally likely. All that decides
a symbol is integers and one correctly rounded division (in `constriction`), so that every machine decodes the same.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from constriction import stream

from lib.errors import UserError

Integers = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int64]

NUM_DIRECT, SUB_BITS = 16, 3  # magnitudes with tokens of their own; binary digits of larger ones, after the first, that tokens tell
FIRST_LOW_BITS = NUM_DIRECT.bit_length() - 1 - SUB_BITS  # that the tokens of the smallest magnitudes without a token leave open
MAX_LOW_BITS = 13
MAX_MAGNITUDE = 2**(MAX_LOW_BITS + SUB_BITS + 1) - 1  # enough for differences of int16
NUM_TOKENS = NUM_DIRECT + (MAX_LOW_BITS - FIRST_LOW_BITS + 1 << SUB_BITS)
INCREMENT = 32  # what a token adds to its count; all counts begin with 1
FIRST_CHUNK, CHUNK_GROWTH = 32, 4  # a chunk has 1 / CHUNK_GROWTH of the tokens before it


def new_counts() -> Counts:
    """Counts, (NUM_TOKENS,), that know nothing."""
    return np.ones(NUM_TOKENS, np.int64)


class IntegerEncoder:
    """Writes integers of at most `MAX_MAGNITUDE` in absolute value."""

    def __init__(self) -> None:
        self._coder = stream.queue.RangeEncoder()

    def put(self, values: npt.ArrayLike, counts: Counts) -> None:
        """Append integers, any number of them in one dimension; `counts` are those of their tokens and are updated."""
        integers = np.asarray(values, np.int64)
        magnitudes = abs(integers)
        exponents = np.frexp(magnitudes)[1].astype(np.int64) - 1  # of the highest binary digit; exact
        low_bits = np.where(magnitudes < NUM_DIRECT, 0, exponents - SUB_BITS)
        large = NUM_DIRECT + (low_bits - FIRST_LOW_BITS - 1 << SUB_BITS) + (magnitudes >> low_bits)
        tokens = np.where(magnitudes < NUM_DIRECT, magnitudes, large).astype(np.int32)
        for chunk in _split(len(tokens)):
            self._coder.encode(tokens[chunk], _model(counts))
            _update(counts, tokens[chunk])
        self._put_uniform(integers[integers != 0] < 0, 2)
        for bits in np.unique(low_bits[low_bits > 0]):
            self._put_uniform(magnitudes[low_bits == bits] & (1 << bits) - 1, 1 << int(bits))

    def put_array(self, values: npt.ArrayLike, counts: Counts, header_counts: Counts) -> None:
        """Append integers that are near each other or multiples of a unit: median and unit first, and nothing else if all are equal."""
        integers = np.asarray(values, np.int64)
        if len(integers):
            base = int(np.partition(integers, len(integers) // 2)[len(integers) // 2])
            unit = int(np.gcd.reduce(integers - base))
            self.put([base, unit], header_counts)
            if unit:
                self.put((integers - base) // unit, counts)

    def _put_uniform(self, values: npt.NDArray[np.generic], num_values: int) -> None:
        self._coder.encode(np.ascontiguousarray(values, np.int32), stream.model.Uniform(num_values))

    def num_bytes(self) -> int:
        """Bytes of the stream so far."""
        return 4 * int(self._coder.num_words())

    def finish(self) -> bytes:
        """The stream."""
        return self._coder.get_compressed().astype("<u4").tobytes()


class IntegerDecoder:
    """Reads what `IntegerEncoder` wrote, in the same order and with the same counts."""

    def __init__(self, content: bytes) -> None:
        """Start reading.

        Raises:
            ValueError: no whole number of words.
        """
        if len(content) % 4:
            raise UserError(f"expected a stream of a multiple of 4 bytes, found {len(content)}")
        self._coder = stream.queue.RangeDecoder(np.frombuffer(content, "<u4").astype(np.uint32))

    def get(self, num_values: int, counts: Counts) -> Integers:
        """The next integers, (num_values,); `counts` as they were when these were written. No more memory is used than for them.

        Raises:
            ValueError: not what an encoder writes, as far as that can be seen.
        """
        tokens = np.empty(num_values, np.int64)
        for chunk in _split(num_values):
            tokens[chunk] = self._decode(_model(counts), chunk.stop - chunk.start)
            _update(counts, tokens[chunk])
        low_bits = np.where(tokens < NUM_DIRECT, 0, FIRST_LOW_BITS + (tokens - NUM_DIRECT >> SUB_BITS))
        magnitudes = np.where(tokens < NUM_DIRECT, tokens, (tokens & (1 << SUB_BITS) - 1 | 1 << SUB_BITS) << low_bits)
        signs = np.ones(num_values, np.int64)
        signs[tokens != 0] -= 2 * self._get_uniform(int(np.count_nonzero(tokens)), 2)
        for bits in np.unique(low_bits[low_bits > 0]):
            chosen = low_bits == bits
            magnitudes[chosen] |= self._get_uniform(int(np.count_nonzero(chosen)), 1 << int(bits))
        return signs * magnitudes

    def get_array(self, num_values: int, counts: Counts, header_counts: Counts) -> Integers:
        """The next integers, (num_values,), that `put_array` wrote; all of them fit int16.

        Raises:
            ValueError: as `get`, or an integer beyond int16.
        """
        if not num_values:
            return np.empty(0, np.int64)
        base, unit = self.get(2, header_counts)
        integers = np.full(num_values, base) if unit == 0 else base + unit * self.get(num_values, counts)
        return check_int16(integers)

    def finish(self) -> None:
        """Stop reading.

        Raises:
            ValueError: the stream goes on.
        """
        if not self._coder.maybe_exhausted():
            raise UserError("expected the end of the stream, found more")

    def _get_uniform(self, num_values: int, num_choices: int) -> Integers:
        return self._decode(stream.model.Uniform(num_choices), num_values)

    def _decode(self, model: stream.model.Model, num_values: int) -> Integers:
        try:
            return self._coder.decode(model, num_values).astype(np.int64)
        except AssertionError as error:  # how constriction reports invalid data
            raise UserError(f"not a valid stream ({error})") from None


def check_int16(integers: Integers) -> Integers:
    """The same integers.

    Raises:
        ValueError: some are beyond int16.
    """
    if len(integers) and not -2**15 <= integers.min() <= integers.max() < 2**15:
        raise UserError(f"expected integers of 16 bits, found {integers.min()} to {integers.max()}")
    return integers


def _split(num_tokens: int) -> Iterator[slice]:
    start = 0
    while start < num_tokens:
        stop = min(num_tokens, start + max(FIRST_CHUNK, start // CHUNK_GROWTH))
        yield slice(start, stop)
        start = stop


def _model(counts: Counts) -> stream.model.Categorical:
    return stream.model.Categorical(counts.astype(np.float64), perfect=False)


def _update(counts: Counts, tokens: npt.NDArray[np.integer]) -> None:
    counts += INCREMENT * np.bincount(tokens, minlength=NUM_TOKENS)
