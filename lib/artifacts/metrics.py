"""Figures of a stage: `metrics.json` is a function of the inputs and part of the stage's outputs; `timing.json` is not.

Keeping what a clock measured, and on what, in its own file leaves the outputs of these stages reproducible byte for byte, so
that a repeated run gives the same `dvc.lock`.
"""

import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lib.artifacts.files import read_json, write_json

METRICS_FILE = "metrics.json"
TIMING_FILE = "timing.json"
NOT_REPRODUCED = "text is not reproduced"
"""What summary, report and audit say of a validation text that its tokens do not give back; how ``text`` of tokenize's figures begins."""

_CHECKSUM, _ENVIRONMENT, _DATE = "metrics_sha256", "environment", "date"  # lists, which `dvc metrics` passes over


def save_metrics(folder: Path, metrics: Mapping[str, Any], timing: Mapping[str, float]) -> None:
    """Write the figures of a stage.

    Args:
        folder: the stage's output folder.
        metrics: figures that depend on the inputs alone.
        timing: ``seconds`` and whatever else a clock decides; stored with the day (UTC), with what the stage ran on and with the checksum
            of the metrics that it goes with.
    """
    write_json(folder / METRICS_FILE, metrics)
    rounded = {key: round(value, 3) for key, value in timing.items()}
    write_json(folder / TIMING_FILE, {**rounded, _DATE: [datetime.now(UTC).date().isoformat()], _ENVIRONMENT: describe_environment(),
                                      _CHECKSUM: [_checksum(folder)]})


def load_metrics(folder: Path) -> dict[str, Any]:
    """The figures in `metrics.json`.

    Raises:
        ArtifactError: missing or damaged.
    """
    metrics: dict[str, Any] = read_json(folder / METRICS_FILE)
    return metrics


def load_timing(folder: Path) -> dict[str, float] | None:
    """The measured times, or None where they belong to other metrics (the outputs came from the cache, not from a run)."""
    record = _load_record(folder)
    return None if record is None else {key: value for key, value in record.items() if key not in (_DATE, _ENVIRONMENT, _CHECKSUM)}


def load_environment(folder: Path) -> list[str] | None:
    """What the stage ran on: versions, device, number of processes; None as in `load_timing`."""
    record = _load_record(folder)
    return None if record is None else record[_ENVIRONMENT]


def load_date(folder: Path) -> str | None:
    """The day on which the stage ran, as 2026-04-09 (UTC); None as in `load_timing`, and where none was recorded."""
    dates: list[str] = (_load_record(folder) or {}).get(_DATE, [])
    return next(iter(dates), None)


def describe_environment() -> list[str]:
    """Versions, device, number of processes; no names of machines."""
    device = f"CPU {platform.machine()}, {os.cpu_count()} cores"
    if (torch := sys.modules.get("torch")) and torch.cuda.is_available():  # a stage that has no use for torch ran on the CPU
        device = torch.cuda.get_device_name()
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
    return [f"Python {platform.python_version()}", *(f"{package} {version(package)}" for package in ("torch", "numpy", "sentencepiece")),
            device, f"{num_processes} process{'es' if num_processes > 1 else ''}"]


def _load_record(folder: Path) -> dict[str, Any] | None:
    if not (folder / TIMING_FILE).exists():
        return None
    record: dict[str, Any] = read_json(folder / TIMING_FILE)
    return record if record[_CHECKSUM] == [_checksum(folder)] else None


def _checksum(folder: Path) -> str:
    return hashlib.sha256((folder / METRICS_FILE).read_bytes()).hexdigest()
