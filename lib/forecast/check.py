"""The size of the artifact of a parameter file, before anything runs; what cannot meet its limit is refused.

torch is imported only where matrices have grids of fixed bits: with free steps the target is the size.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from lib.compression.budget import Part, list_remedies, summarize
from lib.compression.bundle import code_bytes
from lib.compression.config import CompressParams
from lib.model.config import ModelParams
from lib.quantization.config import FREE, QuantizeParams

CERTAIN = 0.9
"""Share of the forecast for Gaussian weights that weights of any form are taken to need; bench/RESULTS.md has what was measured."""
VANISHING = 2.0**-10  # times the usual spread: grids that follow the weights take as much as ever, a scale floor leaves zeros


class ForecastError(ValueError):
    """An artifact that will not meet its limit; the message has the key, the forecast and what would fit."""


def check_size(model: ModelParams, quantize: QuantizeParams, compress: CompressParams, root: Path) -> str:
    """Forecast the size of code and artifact.

    Args:
        model: the architecture.
        quantize: section ``quantize``.
        compress: section ``compress``.
        root: the folder of the project, whose code counts.

    Returns:
        A line that says what is expected.

    Raises:
        ForecastError: the limit, or the target of free steps, cannot be met whatever the weights will be.
    """
    code, target, limit = code_bytes(root), quantize.target_bytes, compress.limit_bytes
    key, room = ("compress.limit_bytes", limit) if target is None else ("quantize.target_bytes", target)
    if room <= code:
        raise ForecastError(f"{key}: expected more than the {code:,} bytes of the code alone, found {room:,}; raise it")
    if {*quantize.bits.model_dump().values(), *quantize.bits_of.values()} == {FREE}:
        return f"forecast: {room:,} bytes, which is what free steps are chosen for ({key}); the limit is {limit:,}"
    from lib.forecast.size import forecast_parts, sample_gaussian  # noqa: PLC0415 (loads torch, which takes seconds)
    samples = sample_gaussian(model)
    parts = forecast_parts(samples, model, quantize, compress, code)
    num_bytes = summarize(parts)["artifact_bytes"]
    if num_bytes <= room:
        return f"forecast: {num_bytes if target is None else target:,} bytes, at most {room:,} ({key})"
    least = summarize(forecast_parts(samples.scaled(VANISHING), model, quantize, compress, code))["artifact_bytes"]
    message = (f"{key}: expected at most {room:,} bytes of code and artifact, forecast {num_bytes:,} ("
               + ", ".join(f"{part.part} {part.num_bytes:,}" for part in parts) + ")")
    remedies = "what would fit, any one of: " + "; ".join([*list_widenings(parts, num_bytes, room), f"{key} {num_bytes}"])
    if CERTAIN * least > room:
        raise ForecastError(f"{message}, whatever the spread of the weights; {remedies}")
    return f"note: {message}, which depends on the weights; the progress of train shows it anew; {remedies}"


def list_widenings(parts: Sequence[Part], num_bytes: int, room: int) -> list[str]:
    """Bits, wider steps and free steps with which an artifact of `num_bytes` would take `room`; steps twice as wide save one bit each."""
    num_weights = sum(part.num_weights or 0 for part in parts)
    if not num_weights:
        return list_remedies(parts, num_bytes, room)
    wider = math.ceil(100 * 2 ** (8 * (num_bytes - room) / num_weights)) / 100
    return [*list_remedies(parts, num_bytes, room),
            f"steps {wider:g} times as wide (quantize.scale_factors [{wider:g}], or a scale floor)",
            f"all quantize.bits free and quantize.target_bytes {room}"]
