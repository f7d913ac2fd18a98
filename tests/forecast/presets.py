"""Parameter files with some values changed."""

from pathlib import Path
from typing import Any

from lib.params import parse_params
from lib.presets import read_preset
from lib.schema import PipelineParams

ROOT = Path(__file__).parents[2]
FIXED: dict[str, Any] = {
    "target_bytes": None, "bits": dict.fromkeys(("attention", "mlp", "embedding", "bigram", "value_embedding", "head"), 5),
    "rate_weight": 0.0}


def make_pipeline(preset: str = "default", quantize: dict[str, Any] | None = None,
                  compress: dict[str, Any] | None = None) -> PipelineParams:
    """A preset with other values in two of its sections."""
    values = read_preset(preset, ROOT / "presets")
    if preset == "default":
        values["model"]["bigram_rows"] = 8192  # so that sizes in tests stay where the default changes
    values["quantize"] |= quantize or {}
    values["compress"] |= compress or {}
    return parse_params(values, PipelineParams, f"{preset}: ")
