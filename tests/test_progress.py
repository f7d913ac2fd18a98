"""What a person sees of long work where there is no terminal."""

import pytest

import lib.progress
from lib.progress import Progress, track


def test_lines_name_the_work_its_state_and_its_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lib.progress, "LINE_INTERVAL_SECONDS", 0.0)
    with Progress("train", 4, "step") as progress:
        progress.update(3, loss=1.23456, kernel="sdpa")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2  # one for the update, one at the end
    assert lines[0].startswith("train:  75% 3.00/4.00 [")
    assert lines[0].endswith("step/s, loss 1.235 kernel sdpa]")


def test_lines_are_rare(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "read", 3, "doc")) == ["a", "b", "c"]
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(iter("abc"), "read", 3, "doc", enabled=False))
    assert capsys.readouterr().err == ""
