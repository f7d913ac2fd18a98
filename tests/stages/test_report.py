import json
from pathlib import Path

import pytest

from lib.artifacts.files import ArtifactError, write_bytes, write_json
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import stage_folder
from lib.submission.bundle import code_bytes
from stages import report
from tests.reporting.results import make_lock, write_lock, write_results


def outputs() -> dict[str, bytes]:
    folder = Path("artifacts/report")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_stage_writes_the_same_files_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_results([1, 2])
    write_bytes(Path("lib/submission/program.py"), b"import sys\n")
    Path("artifacts/tokenize/tokenizer.model").touch()
    for folder in (stage_folder("compress", seed) for seed in (1, 2)):
        (folder / "model.ptz").touch()
        write_json(folder / "metrics.json", load_metrics(folder) | {"code_bytes": code_bytes(Path()), "blob_bytes": 0})
    write_lock(make_lock([1, 2]))
    report.main()
    first = outputs()
    assert {name.split("/")[0] for name in first} == {"report.html", "metrics.json", "submission"}
    assert json.loads(first["metrics.json"])["evaluate"]["sliding_bpb"]["mean"] == 1.685
    assert len(first["submission/train_gpt.py"]) == code_bytes(Path())
    report.main()
    assert first == outputs()


def test_results_of_other_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_results([1, 2])
    lock = make_lock([1, 2])
    lock["stages"]["evaluate@2"]["params"]["params.yaml"]["evaluate"] = {"limit_seconds": 60.0}
    write_lock(lock)
    with pytest.raises(ArtifactError, match=r"evaluate@2: evaluate\.limit_seconds: expected 600\.0"):
        report.main()
    assert not Path("artifacts/report").exists()
