"""Figures of a stage: `metrics.json` is a function of the inputs and part of the stage's outputs; `timing.json` is not.

Keeping what a clock measured in its own file leaves every output of the pipeline reproducible byte for byte, so that a
repeated run gives the same `dvc.lock`.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib.artifacts.files import read_json, write_json

METRICS_FILE = "metrics.json"
TIMING_FILE = "timing.json"


def save_metrics(folder: Path, metrics: Mapping[str, Any], timing: Mapping[str, float]) -> None:
    """Write the figures of a stage.

    Args:
        folder: the stage's output folder.
        metrics: figures that depend on the inputs alone.
        timing: ``seconds`` and whatever else a clock decides; stored with the checksum of the metrics that it goes with.
    """
    write_json(folder / METRICS_FILE, metrics)
    rounded = {key: round(value, 3) for key, value in timing.items()}
    write_json(folder / TIMING_FILE, {**rounded, "metrics_sha256": _checksum(folder)})


def load_metrics(folder: Path) -> dict[str, Any]:
    """The figures in `metrics.json`.

    Raises:
        ArtifactError: missing or damaged.
    """
    metrics: dict[str, Any] = read_json(folder / METRICS_FILE)
    return metrics


def load_timing(folder: Path) -> dict[str, float] | None:
    """The measured times, or None where they belong to other metrics (the outputs came from the cache, not from a run)."""
    if not (folder / TIMING_FILE).exists():
        return None
    timing: dict[str, Any] = read_json(folder / TIMING_FILE)
    return timing if timing.pop("metrics_sha256") == _checksum(folder) else None


def _checksum(folder: Path) -> str:
    return hashlib.sha256((folder / METRICS_FILE).read_bytes()).hexdigest()
