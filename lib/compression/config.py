"""Parameters of the compress stage."""

from typing import Annotated, Literal

from pydantic import Field

from lib.params import Params, Positive


class CompressParams(Params):
    """Section ``compress``."""

    codec: Literal["zstd"]
    """How the integer codes are stored; an entry of CODECS."""
    level: Annotated[int, Field(ge=1, le=22)]
    """Of zstandard, for the codes and for everything else in the file; 22 is the slowest and smallest."""
    limit_bytes: Positive
    """Largest size of code and blob together; the stage fails above it. The challenge allows 16,000,000."""
