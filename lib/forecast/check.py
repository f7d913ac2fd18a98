"""The size of the artifact of a parameter file, before anything runs; what cannot meet its limit is refused.

torch is imported only where matrices have grids of fixed bits: with free steps the target is the size.
"""

from lib.compression.config import CompressParams
from lib.errors import UserError
from lib.model.config import ModelParams
from lib.quantization.config import FREE, QuantizeParams


class ForecastError(UserError):
    """An artifact that will not meet its limit; the message has the key, the forecast and what would fit."""


def check_size(model: ModelParams, quantize: QuantizeParams, compress: CompressParams) -> str:
    """Forecast the size of code and artifact.

    Args:
        model: the architecture.
        quantize: section ``quantize``.
        compress: section ``compress``.

    Returns:
        A line that says what is expected.

    Raises:
        ForecastError: the limit, or the target of free steps, cannot be met whatever the weights will be.
        ValueError: exceptions in ``quantize.bits_of`` for matrices that do not exist.
    """
    code, target, limit = compress.code_bytes, quantize.target_bytes, compress.limit_bytes
    key, room = ("compress.limit_bytes", limit) if target is None else ("quantize.target_bytes", target)
    if room <= code:
        raise ForecastError(f"{key}: expected more than compress.code_bytes {code:,}, the code alone, found {room:,}; raise it")
    if {*(quantize.bits[role] for role in model.roles), *quantize.bits_of.values()} == {FREE}:
        return f"forecast: {room:,} bytes, which is what free steps are chosen for ({key}); the limit is {limit:,}"
    from lib.forecast.grids import forecast_grids  # noqa: PLC0415 (loads torch, which takes seconds)
    message, is_possible = forecast_grids(model, quantize, compress)
    if not is_possible:
        raise ForecastError(message)
    return message
