"""Parameters of the calibrate and quantize stages."""

from typing import Annotated, Literal

from pydantic import Field

from lib.params import Fraction, Params, Positive, PositiveFloat
from lib.quantization.grid_config import BitsParams, ClipParams


class CalibrateParams(Params):
    """Section ``calibrate``."""

    num_sequences: Positive
    """Training sequences for the Hessians that GPTQ uses, and as many others for those that errors are reported with."""
    batch_sequences: Positive
    """Sequences per forward pass; more is faster and takes more memory."""


class QuantizeParams(Params):
    """Section ``quantize``."""

    method: Literal["gptq", "rtn"]
    """For weights of linear layers: GPTQ (arXiv:2210.17323) or round-to-nearest. Embedding tables are always rounded to nearest."""
    bits: BitsParams
    clip: ClipParams
    damping: Annotated[Fraction, Field(gt=0)]
    """GPTQ: fraction of the mean diagonal that is added to the Hessian's diagonal; raised tenfold where that is not enough."""
    block_size: Positive
    """GPTQ: columns between two updates of all later columns; changes speed, not results."""
    scale_factors: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]
    """GPTQ: each row is rounded with these multiples of the scale that the clip rule gives, and keeps the one with the least squared
    error of its outputs on the calibration sequences; [1.0] keeps the clip rule's. Time grows with their number."""
    act_order: bool
    """GPTQ: columns in descending order of the Hessian's diagonal, instead of in their own order."""
