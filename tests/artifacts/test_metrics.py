import json
import os
import platform
import sys
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

from lib.artifacts.metrics import load_date, load_environment, load_metrics, load_timing, save_metrics


def save(folder: Path) -> None:
    save_metrics(folder, {"heldout_bpb": 1.5}, {"seconds": 1.23456, "tokens_per_second": 10.0})


def test_times_and_environment_are_kept_beside_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    save(tmp_path)
    assert load_metrics(tmp_path) == {"heldout_bpb": 1.5}
    assert load_timing(tmp_path) == {"seconds": 1.235, "tokens_per_second": 10.0}
    environment = load_environment(tmp_path)
    assert environment == [f"Python {platform.python_version()}",
                           *(f"{package} {version(package)}" for package in ("torch", "numpy", "sentencepiece")),
                           f"CPU {platform.machine()}, {os.cpu_count()} cores", "1 process"]


def test_the_device_is_that_of_a_stage_that_has_loaded_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    monkeypatch.setenv("WORLD_SIZE", "8")
    save(tmp_path)
    environment = load_environment(tmp_path)
    assert environment is not None
    assert environment[4:] == ["NVIDIA H100 80GB HBM3", "8 processes"]


def test_the_day_is_kept_where_it_was_recorded(tmp_path: Path) -> None:
    before = datetime.now(UTC).date()
    save(tmp_path)
    assert before <= date.fromisoformat(str(load_date(tmp_path))) <= datetime.now(UTC).date()
    values = json.loads((tmp_path / "timing.json").read_text())
    del values["date"]
    (tmp_path / "timing.json").write_text(json.dumps(values))
    assert load_date(tmp_path) is None
    assert load_timing(tmp_path) == {"seconds": 1.235, "tokens_per_second": 10.0}


def test_times_of_other_metrics_are_not_theirs(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "metrics.json").write_text('{"heldout_bpb": 1.4}')  # as DVC checks it out
    assert (load_timing(tmp_path), load_environment(tmp_path), load_date(tmp_path)) == (None, None, None)
    (tmp_path / "timing.json").unlink()
    assert (load_timing(tmp_path), load_environment(tmp_path), load_date(tmp_path)) == (None, None, None)
