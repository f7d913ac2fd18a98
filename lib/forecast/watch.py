"""The size of the artifact that a model in training would make, for the progress line.

It is shown and nothing else: it reads the sections ``quantize`` and ``compress``, on which the stage train must not depend, because
another number of bits would train anew. So this module, like `lib.progress`, is left out of the code that dvc.yaml declares for the stage,
and so is what only it imports.
"""

import time

from lib.compression.budget import summarize
from lib.compression.config import CompressParams
from lib.forecast.size import forecast_parts, sample_weights
from lib.model.gpt import GPT
from lib.params import load_params
from lib.progress import say
from lib.quantization.config import QuantizeParams

FIRST_SECONDS = 10.0  # before the first forecast
SHARE = 0.01  # of the time, at most, for all others


class SizeWatch:
    """Forecasts every now and then from the present weights of a model.

    Args:
        model: the model in training; read, never changed.
        enabled: pass ``process.is_main``.
    """

    def __init__(self, model: GPT, *, enabled: bool) -> None:
        self._model = model
        self._due = time.monotonic() + FIRST_SECONDS if enabled else float("inf")
        self._status: dict[str, str] = {}

    def status(self) -> dict[str, str]:
        """The latest forecast as figures of a progress line; none with free steps, which take what is left of the target."""
        start = time.monotonic()
        if start >= self._due:
            try:
                self._status = self._forecast()
            except ValueError as error:  # of parameters that training does not need
                say(f"train: the size of the artifact cannot be forecast: {error}")
                self._due = float("inf")
            else:
                self._due = time.monotonic() + (time.monotonic() - start) / SHARE if self._status else float("inf")
        return self._status

    def _forecast(self) -> dict[str, str]:
        params, coding = load_params("quantize", QuantizeParams), load_params("compress", CompressParams)
        if params.target_bytes is not None:
            return {}
        parts = forecast_parts(sample_weights(self._model), self._model.params, params, coding)
        return {"artifact": f"{summarize(parts)['artifact_bytes'] / 1e6:.2f} of {coding.limit_bytes / 1e6:.2f} MB"}
