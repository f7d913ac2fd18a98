import json
from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError
from stages import report
from tests.reporting.results import write_results


def test_the_stage_writes_the_same_two_files_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_results([1, 2])
    report.main()
    first = {path.name: path.read_bytes() for path in Path("artifacts/report").iterdir()}
    assert first.keys() == {"report.html", "metrics.json"}
    assert json.loads(first["metrics.json"])["evaluate"]["sliding_bpb"]["mean"] == 1.685
    report.main()
    assert first == {path.name: path.read_bytes() for path in Path("artifacts/report").iterdir()}


def test_results_that_nothing_is_recorded_of_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_results([1, 2])
    Path("dvc.lock").unlink()
    with pytest.raises(ArtifactError, match=r"dvc\.lock: no such file"):
        report.main()
    assert not Path("artifacts/report").exists()
