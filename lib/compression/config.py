"""Parameters of the compress stage."""

from typing import Annotated, Literal

from pydantic import Field

from lib.params import Params, Positive


class CompressParams(Params):
    """Section ``compress``."""

    codec: Literal["zstd", "brotli", "range"]
    """How the integer codes are stored; an entry of CODECS. range, an adaptive range coder, is smallest."""
    level: Annotated[int, Field(ge=1, le=22)]
    """Level of zstandard, for codes (zstd) and for header and vectors (all codecs); 22 is the slowest and smallest. brotli ends at 11;
    range has no levels."""
    limit_bytes: Positive
    """Largest size of code and blob together; the stage fails above it. The challenge allows 16,000,000."""
    code_bytes: Positive
    """Reserve for the code: quantize counts on so many bytes, so that it does not depend on the code itself; the stage fails if the real
    code is larger."""
