"""Bits of a grid, which quantization-aware training and export share.

Apart from `lib.quantization.config`, so that a new option of the quantize stage does not make a checkpoint stale.
"""

from typing import Annotated

from pydantic import AfterValidator

FLOAT_BITS = 16
MAX_INTEGER_BITS = 8


def _check_bits(bits: int) -> int:
    if bits != FLOAT_BITS and not 2 <= bits <= MAX_INTEGER_BITS:
        raise ValueError(f"expected 2 to {MAX_INTEGER_BITS}, or {FLOAT_BITS} for fp16 without quantization, found {bits}")
    return bits


Bits = Annotated[int, AfterValidator(_check_bits)]
