"""Whether grids of fixed bits can meet the limit of the artifact, and what would."""

from lib.compression.budget import list_remedies, summarize
from lib.compression.config import CompressParams
from lib.forecast.size import forecast_parts, sample_gaussian
from lib.model.config import ModelParams
from lib.quantization.config import QuantizeParams

CERTAIN = 0.9
"""Share of the forecast for Gaussian weights that trained weights are taken to need at least; bench/RESULTS.md has what was measured."""
FLOORS = (0.5, 1.0, 2.0, 4.0)  # of scales, that are proposed
VANISHING = 2.0**-10  # times the usual spread: grids that follow the weights take as much as ever, a scale floor leaves zeros


def forecast_grids(model: ModelParams, quantize: QuantizeParams, compress: CompressParams) -> tuple[str, bool]:
    """A line about the size of code and artifact, and whether they can meet the limit, or the target if other matrices have free steps.

    Where the limit is exceeded, it cannot be met if that would be so with weights of vanishing spread too: then no scale floor acts.

    Args:
        model: the architecture.
        quantize: section ``quantize``, with grids of fixed bits.
        compress: section ``compress``.

    Raises:
        ValueError: exceptions in ``quantize.bits_of`` for matrices that do not exist.
    """
    target, limit = quantize.target_bytes, compress.limit_bytes
    key, room = ("compress.limit_bytes", limit) if target is None else ("quantize.target_bytes", target)
    samples = sample_gaussian(model)
    parts = forecast_parts(samples, model, quantize, compress)
    num_bytes = summarize(parts)["artifact_bytes"]
    if num_bytes <= room:
        return f"forecast: {num_bytes if target is None else target:,} bytes, at most {room:,} ({key})", True
    least = summarize(forecast_parts(samples.scaled(VANISHING), model, quantize, compress))["artifact_bytes"]
    is_possible = CERTAIN * least <= room
    found = ", ".join(f"{part.part} {part.num_bytes:,}" for part in parts)
    remedies = list_remedies(parts, num_bytes, room)
    if any(part.num_weights for part in parts):
        fits = (floor for floor in FLOORS if floor > quantize.clip.floor and summarize(forecast_parts(
            samples, model, _with_floor(quantize, floor), compress))["artifact_bytes"] <= room)
        if (floor := next(fits, None)) is not None:
            remedies.append(f"wider steps (quantize.clip.floor {floor:g}, and the same in train.qat; #585 and #410 have 1)")
        remedies.append(f"all quantize.bits free and quantize.target_bytes {room}")
    remedies.append(f"{key} {num_bytes}")
    reason = "; trained weights may take less, which the progress of train shows" if is_possible else ", whatever the spread of the weights"
    message = f"{key}: expected at most {room:,} bytes of code and artifact, forecast {num_bytes:,} ({found}){reason}"
    return f"{'note: ' if is_possible else ''}{message}; what would fit, any one of: {'; '.join(remedies)}", is_possible


def _with_floor(quantize: QuantizeParams, floor: float) -> QuantizeParams:
    return quantize.model_copy(update={"clip": quantize.clip.model_copy(update={"floor": floor})})
