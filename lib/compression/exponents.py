"""The exponents of the scales of all matrices as one range-coded stream, whatever the codec of the codes."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from lib.compression.adaptive import IntegerDecoder, IntegerEncoder, new_counts

Exponents = npt.NDArray[np.int16]


def encode_exponents(matrices: Iterable[tuple[Exponents, Exponents]]) -> bytes:
    """The exponents of rows (R,) and columns (C,) of each matrix, int16; equal or coarse ones take hardly any space."""
    encoder, rows_counts, columns_counts, header_counts = IntegerEncoder(), new_counts(), new_counts(), new_counts()
    for row_exponents, column_exponents in matrices:
        encoder.put_array(row_exponents, rows_counts, header_counts)
        encoder.put_array(column_exponents, columns_counts, header_counts)
    return encoder.finish()


def decode_exponents(content: bytes, shapes: Sequence[tuple[int, int]]) -> list[tuple[Exponents, Exponents]]:
    """The exponents of rows and columns of matrices of these shapes.

    Raises:
        ValueError: damaged, or of other shapes, as far as that can be seen.
    """
    decoder, rows_counts, columns_counts, header_counts = IntegerDecoder(content), new_counts(), new_counts(), new_counts()
    matrices = [(decoder.get_array(num_rows, rows_counts, header_counts).astype(np.int16),
                 decoder.get_array(num_columns, columns_counts, header_counts).astype(np.int16)) for num_rows, num_columns in shapes]
    decoder.finish()
    return matrices
