import re
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics, save_metrics
from lib.params import read_params
from lib.reporting.runs import check_runs, flatten
from tests.reporting.results import make_lock, write_lock, write_results

SEEDS = [1337, 42, 7]


@pytest.fixture(autouse=True)
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The stages that dvc.lock records of a run that is in order."""
    monkeypatch.chdir(tmp_path)
    write_results(SEEDS, names=("lora",))
    made = make_lock(SEEDS)
    stages: dict[str, Any] = made["stages"]
    return stages


def differences(stages: dict[str, Any]) -> list[str]:
    """What is found to differ, one line each; checksums shortened."""
    write_lock({"schema": "2.0", "stages": stages})
    with pytest.raises(ArtifactError) as error:
        check_runs(read_params())
    first, *lines = str(error.value).splitlines()
    assert first == "results do not belong together; run `dvc repro`, which makes those anew that differ:"
    return [re.sub(r"\b[0-9a-f]{32}(\.dir)?\b", "MD5", line.strip()) for line in lines]


def test_seeds_of_one_run_belong_together(lock: dict[str, Any]) -> None:
    check_runs(read_params())
    lock["train@99"] = {"cmd": "of a seed that is no longer listed"}
    write_lock({"stages": lock})
    check_runs(read_params())


def test_other_parameters_for_one_seed_are_named(lock: dict[str, Any]) -> None:
    lock["train@42"]["params"]["params.yaml"]["train"] = {
        "budget_steps": 150, "budget_seconds": 300.0, "reserve_distill_seconds": None, "qat": {"below_lr": 0.5}}
    lock["quantize@7"]["params"]["params.yaml"]["compress.codec"] = "zstd"
    assert differences(lock) == [
        "train@42: train.budget_steps: expected null as in params.yaml, found 150 in dvc.lock",
        "train@42: train.reserve_seconds: expected 10.0 as in params.yaml, found nothing in dvc.lock",
        'quantize@7: compress.codec: expected "range" as in params.yaml, found "zstd" in dvc.lock']


def test_parameters_that_changed_since_are_named_for_every_seed(lock: dict[str, Any]) -> None:
    path = Path("params.yaml")
    path.write_text(path.read_text().replace("bits_of: {}", "bits_of: {head.weight: 16}"))
    assert differences(lock) == [
        line for seed in SEEDS for line in (
            f"quantize@{seed}: quantize.bits_of.head.weight: expected 16 as in params.yaml, found nothing in dvc.lock",
            f"quantize@{seed}: quantize.bits_of: expected nothing as in params.yaml, found {{}} in dvc.lock")]


def test_other_code_for_one_seed_is_named(lock: dict[str, Any]) -> None:
    lock["calibrate@42"]["deps"][0]["md5"] = "0" * 32
    lock["evaluate@7"]["deps"].append({"path": "lib/evaluation/lora.py", "md5": "1" * 32})
    assert differences(lock) == ["calibrate@42: lib/params.py: expected MD5 as of calibrate@1337, found MD5 in dvc.lock",
                                 "evaluate@7: lib/evaluation/lora.py: expected nothing as of evaluate@1337, found MD5 in dvc.lock"]


@pytest.mark.parametrize(("stage", "writer", "path"), [
    ("train@42", "tokenize", "artifacts/tokenize/tokenizer.model"),
    ("calibrate@1337", "train@1337", "artifacts/train/seed1337/checkpoint"),
    ("evaluate@7", "compress@7", "artifacts/compress/seed7/model.ptz"),
])
def test_inputs_that_the_stage_before_has_replaced_are_named(lock: dict[str, Any], stage: str, writer: str, path: str) -> None:
    lock[stage]["deps"][-1]["md5"] = "0" * 32
    assert lock[stage]["deps"][-1]["path"] == path
    assert differences(lock) == [f"{stage}: {path}: expected MD5 as of {writer}, found MD5 in dvc.lock"]


@pytest.mark.parametrize(("stage", "path", "found"), [
    ("evaluate@42", "artifacts/evaluate/seed42/metrics.json", "MD5"),
    ("train@7", "artifacts/train/seed7/loss.csv", "MD5"),
    ("compress@7", "artifacts/compress/seed7/sizes.csv", "nothing"),
])
def test_files_that_are_not_of_the_recorded_run_are_named(lock: dict[str, Any], stage: str, path: str, found: str) -> None:
    if found == "nothing":
        Path(path).unlink()
    else:
        Path(path).write_text(Path(path).read_text() + "\n")
    assert differences(lock) == [f"{stage}: {path}: expected MD5 as in dvc.lock, found {found} on disk"]


@pytest.mark.parametrize("change", ["edited", "added", "removed"])
def test_folders_are_those_of_the_recorded_run(lock: dict[str, Any], change: str) -> None:
    folder = Path("artifacts/evaluate/seed7/curves")
    if change == "removed":
        (folder / "lora.csv").unlink()
    else:
        (folder / ("lora.csv" if change == "edited" else "new.csv")).write_text("tokens,bpb\n")
    assert differences(lock) == [f"evaluate@7: {folder}: expected MD5 as in dvc.lock, found MD5 on disk"]


def test_trained_and_imported_checkpoints_do_not_go_together() -> None:
    path = Path("artifacts/train/seed42")
    metrics = load_metrics(path)
    save_metrics(path, metrics | {"imported": "final_model.pt"}, {"seconds": 1.0})
    lock = make_lock(SEEDS)
    found = differences(lock["stages"])
    assert [line.split(";")[0] for line in found] == [
        "train@42: expected a checkpoint that was trained as that of train@1337, found one that was imported"]
    for seed in SEEDS:
        save_metrics(Path(f"artifacts/train/seed{seed}"), {"imported": f"final_model.{seed}.pt"}, {"seconds": 1.0})
    write_lock(make_lock(SEEDS))
    check_runs(read_params())


def test_stages_that_were_not_run_by_dvc_are_named(lock: dict[str, Any]) -> None:
    del lock["evaluate@42"], lock["tokenize"]
    write_lock({"stages": lock})
    with pytest.raises(ArtifactError, match=r"^dvc\.lock: .* found none of tokenize, evaluate@42; run `dvc repro`"):
        check_runs(read_params())


def test_without_a_record_the_results_are_not_recorded() -> None:
    assert check_runs(read_params())
    Path("dvc.lock").unlink()
    assert not check_runs(read_params())
    save_metrics(Path("artifacts/train/seed42"), {"imported": "final_model.pt"}, {"seconds": 1.0})
    with pytest.raises(ArtifactError, match=r"\n  train@42: .* found one that was imported"):
        check_runs(read_params())


@pytest.mark.parametrize("text", ["", "stages: {}", None])
def test_the_record_of_other_results_is_none_where_there_is_no_dvc(text: str | None, lock: dict[str, Any],
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    lock["train@42"]["params"]["params.yaml"]["train"] = {"budget_steps": 150}
    write_lock({"stages": lock})
    if text is not None:
        Path("dvc.lock").write_text(text)
    with pytest.raises(ArtifactError):
        check_runs(read_params())
    monkeypatch.setitem(sys.modules, "dvc", None)
    assert not check_runs(read_params())
    write_lock(make_lock(SEEDS))
    assert check_runs(read_params()), "a record that agrees is one"


@pytest.mark.parametrize("text", ["", "stages", "a: {", "schema: '2.0'"])
def test_a_damaged_record_is_an_error_with_its_name(text: str) -> None:
    Path("dvc.lock").write_text(text)
    with pytest.raises(ArtifactError, match=r"^dvc\.lock: not a record of DVC"):
        check_runs(read_params())


def test_many_differences_are_counted(lock: dict[str, Any]) -> None:
    for entry in lock.values():
        entry["params"]["params.yaml"] = {"seeds": [0]}
    found = differences(lock)
    assert (len(found), found[-1]) == (13, "and 4 more")


def test_flat_keys_are_those_of_the_leaves() -> None:
    text = "{a: {b: 1, c: {d: [1, 2], e: {}}}, f: null}"
    assert dict(flatten(YAML(typ="safe", pure=True).load(text))) == {"a.b": 1, "a.c.d": [1, 2], "a.c.e": {}, "f": None}
