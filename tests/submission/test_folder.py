import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import ArtifactError, read_json
from lib.artifacts.metrics import load_date, load_metrics, load_timing, save_metrics
from lib.artifacts.paths import stage_folder
from lib.artifacts.scores import save_audit
from lib.params import parse_params, read_params
from lib.reporting.config import ReportParams
from lib.reporting.summary import read_metrics
from lib.submission import description
from lib.submission.folder import Program, make_log, write_submission
from tests.reporting.results import write_results

REPORT: dict[str, Any] = {"title": "A run", "record": {"loss": None, "margin": 0.005, "p_value": 0.01},
                          "submission": {"author": "A. Author", "github_id": None, "blurb": "Small & quick."}}
PROGRAM = Program(b"# the program" + bytes(60_987), {"torch": "2.13.0", "ruamel.yaml": "0.19.1"})
FOLDER = Path("submission")


def write(seeds: list[int]) -> dict[str, bytes]:
    """The files of a submission, by name."""
    write_submission(FOLDER, parse_params(REPORT, ReportParams, "report."), read_params() | {"seeds": seeds}, read_metrics(seeds), PROGRAM)
    return {path.relative_to(FOLDER).as_posix(): path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_results([7, 8])
    Path("artifacts/tokenize/tokenizer.model").write_bytes(b"the tokenizer")
    for seed in (7, 8):
        metrics = load_metrics(stage_folder("compress", seed))
        (stage_folder("compress", seed) / "model.ptz").write_bytes(bytes([seed]) * metrics["blob_bytes"])


def test_the_folder_holds_program_artifact_and_results_and_nothing_of_an_earlier_run() -> None:
    FOLDER.mkdir()
    (FOLDER / "logs").write_text("left from something else")
    files = write([7, 8])
    assert files.keys() == {"train_gpt.py", "model.ptz", "tokenizer.model", "requirements.txt", "params.yaml", "submission.json",
                            "README.md", "train_seed7.log", "train_seed8.log"}
    assert files["requirements.txt"] == b"torch==2.13.0\nruamel.yaml==0.19.1\n"
    assert files["train_gpt.py"] == PROGRAM.content
    assert files["model.ptz"] == Path("artifacts/compress/seed7/model.ptz").read_bytes()
    assert (files["tokenizer.model"], files["params.yaml"]) == (b"the tokenizer", Path("params.yaml").read_bytes())
    assert write([7, 8]) == files
    assert write([8]).keys() == files.keys() - {"train_seed7.log"}


def test_submission_json_has_means_and_every_seed() -> None:
    values = json.loads(write([7, 8])["submission.json"])
    assert {key: values[key] for key in ("author", "github_id", "name", "blurb")} == {
        "author": "A. Author", "github_id": None, "name": "A run", "blurb": "Small & quick."}
    first, second = (values["seed_results"][seed] for seed in ("7", "8"))
    assert first == {"val_loss": 2.4, "val_bpb": 1.65, "artifact_bytes": 812345, "steps": 1500}
    assert values["seeds"] == [7, 8]
    assert (values["val_bpb"], second["val_bpb"]) == (1.655, 1.66)
    assert values["val_bpb_std"] == pytest.approx(0.01 / 2**0.5, abs=1e-8)
    assert (values["bytes_total"], values["bytes_code"]) == (812346, 61000)
    assert values["technique_summary"] == ("2 layers of width 64, 512 pieces; Muon and AdamW, weights: ema; gptq with grids of fixed bits, "
                                           "codec range; scored by score_first")
    assert values["attribution"].keys() == {"architecture", "muon", "quantization_aware_training", "gptq", "score_first_ttt"}
    assert values["hardware"].startswith("CPU") and values["hardware"].endswith("1 process")
    assert values["versions"]["torch"] == version("torch")
    alone = json.loads(write([8])["submission.json"])
    assert alone["val_bpb"] == second["val_bpb"]
    assert "val_bpb_std" not in alone


def test_submission_json_says_whether_the_limits_of_the_track_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = json.loads(write([7, 8])["submission.json"])
    assert found["compliance"] == {
        "train_seconds": 242.0, "train_under_600s": True, "artifact_under_16mb": True, "eval_seconds": 60.0, "eval_under_600s": True,
        "audit": "NOT CHECKED (21 passed, 1 not checked: this kernel <cannot>)", "audit_passed": None, "three_seeds": False}
    assert found["track"] == "non_record_16mb"
    assert found["date"] == load_date(stage_folder("evaluate", 8))
    monkeypatch.setattr(description, "load_environment", lambda _: ["torch 2.13.0", "NVIDIA H100 80GB HBM3", "8 processes"])
    monkeypatch.setattr(description, "RECORD_SEEDS", 2)
    assert json.loads(write([7, 8])["submission.json"])["track"] == "10min_16mb"  # with an audit that is left open
    audit = read_json(stage_folder("evaluate", 7) / "audit.json")
    for legal, track in ((False, "non_record_16mb"), (True, "10min_16mb")):
        for seed in (7, 8):
            save_audit(stage_folder("evaluate", seed), audit | {"legal": legal})
        audited = json.loads(write([7, 8])["submission.json"])
        assert (audited["compliance"]["audit_passed"], audited["track"]) == (legal, track)
    folder = stage_folder("calibrate", 7)
    save_metrics(folder, load_metrics(folder), {"seconds": 361.0})
    slow = json.loads(write([7, 8])["submission.json"])
    assert (slow["compliance"]["train_seconds"], slow["compliance"]["train_under_600s"], slow["track"]) == (601.0, False, "non_record_16mb")


def test_what_is_left_open_is_null_and_said() -> None:
    (stage_folder("train", 7) / "timing.json").unlink()
    files = write([7, 8])
    values = json.loads(files["submission.json"])
    assert [values[key] for key in ("github_id", "hardware", "versions")] == [None] * 3
    assert (values["compliance"]["train_seconds"], values["compliance"]["train_under_600s"]) == (None, None)
    assert ("Left open in `submission.json`: github_id, hardware, versions, compliance.train_seconds, compliance.train_under_600s, "
            "compliance.audit_passed." in files["README.md"].decode())


def test_readme_says_how_to_repeat_the_score_and_what_it_is_made_of() -> None:
    readme = write([7, 8])["README.md"].decode()
    assert readme.startswith("# A run\n\nSmall & quick.\n\n")
    for line in ("| val_bpb | 1.65000000 | 1.66000000 | 1.65500000 | 0.00707107 |", "| seconds, train | 240.0 | 240.0 | 240.0 | 0.0 |",
                 "pip install -r requirements.txt", "val_bpb: 1.65000000", "| mlp | 600 | 500,000 |", "| code |  | 61,000 |",
                 "| all | | 812,345 |", "| C1 | A score depends on the artifact and earlier tokens only. | passed |",
                 "| C3 | What is trained on has been scored before, and no score comes after training on its target. | passed |"):
        assert line in readme.splitlines()
    assert re.search(r"^two_phase +1\.6050 .* no: trains before scoring", readme, re.MULTILINE)
    assert "Audit: NOT CHECKED (21 passed, 1 not checked: this kernel <cannot>)." in readme
    assert "\n\n\n" not in readme and "A dash" not in readme


def test_readme_without_an_audit_says_so() -> None:
    for seed in (7, 8):
        (stage_folder("evaluate", seed) / "audit.json").write_text('{"legal": null}')
    files = write([7, 8])
    assert "Audit: not audited." in files["README.md"].decode() and "nothing was checked" in files["README.md"].decode()
    assert files["train_seed7.log"].decode().endswith("\n== audit\nnot audited\n")


def test_logs_have_every_recorded_number() -> None:
    log = write([7, 8])["train_seed8.log"].decode()
    lines = log.splitlines()
    assert lines[0].startswith("seed 8, Python 3") and lines[0].endswith("1 process")
    assert "when it trains with this seed, writes this file anew" in lines[1]
    assert [line for line in lines if line.startswith("==")] == [
        f"== {part}" for part in ("train", "calibrate", "quantize", "compress", "evaluate", "strategies", "audit")]
    losses = (stage_folder("train", 8) / "loss.csv").read_text().splitlines()[1:]
    found = [line for line in lines if line.startswith("tokens:")]
    assert len(found) == len(losses)
    tokens, loss = losses[-1].split(",")
    assert found[-1] == f"tokens:{tokens} train_loss:{float(loss):.4f}"
    for stage in ("train", "quantize", "compress", "evaluate"):
        figures = load_metrics(stage_folder(stage, 8)) | (load_timing(stage_folder(stage, 8)) or {})
        for key, value in figures.items():
            assert f"{key}: {value if isinstance(value, str) else json.dumps(value)}" in lines
    assert "two_phase: not legal" in lines and "  score before update: failed (scored before, trained targets: 0)" in lines
    assert "  files: not checked (this kernel <cannot>)" in lines


def test_a_time_that_was_not_measured_is_no_number() -> None:
    metrics = read_metrics([7])[0]
    (stage_folder("train", 7) / "metrics.json").write_text(json.dumps(metrics["train"]))  # from the cache: other bytes
    assert "seconds: not measured, from cache" in make_log(7, metrics).split("== calibrate")[0]
    readme = write([7, 8])["README.md"].decode()
    assert "| seconds, train | - | 240.0 | - | - |" in readme and "A dash stands for" in readme


@pytest.mark.parametrize(("key", "name"), [("code_bytes", "train_gpt.py"), ("blob_bytes", "model.ptz")])
def test_sizes_that_compress_did_not_count_are_refused_before_anything_is_written(key: str, name: str) -> None:
    folder = stage_folder("compress", 7)
    save_metrics(folder, load_metrics(folder) | {key: 60_000}, {"seconds": 1.0})
    with pytest.raises(ArtifactError, match=rf"{re.escape(name)}: expected 60,000 bytes, .* seed 7, found .*dvc repro -f compress"):
        write([7, 8])
    assert not FOLDER.exists()


def test_a_missing_artifact_is_named() -> None:
    (stage_folder("compress", 7) / "model.ptz").unlink()
    with pytest.raises(ArtifactError, match=r"artifacts/compress/seed7/model\.ptz: no such file; `dvc repro`"):
        write([7, 8])
