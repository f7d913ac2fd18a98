"""Calibrate, quantize and compress, one after the other, on a checkpoint of random weights."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.hessians import load_hessians
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.paths import stage_folder
from lib.artifacts.quantized import load_quantized
from lib.compression.budget import BudgetError
from lib.compression.container import load_artifact
from lib.quantization.allocation import TargetError
from lib.quantization.student import Student
from lib.submission.bundle import code_bytes
from stages import calibrate, compress, quantize
from tests.artifacts.quantized_models import assert_same
from tests.evaluation.tiny import FRONTIER
from tests.stages.project import PARAMS, SEED, check_confined, landlock, write_inputs, write_params

METRIC_KEYS = {"heldout_bpb", "heldout_bpb_float", "heldout_kl", "heldout_loss_increase", "heldout_tokens", "entropy_bits", "coded_bits",
               "relative_error", "relative_error_rtn", "predicted_loss"}
FREE: dict[str, Any] = {
    "target_bytes": 14_000, "bits": dict.fromkeys(PARAMS["quantize"]["bits"], "free"), "rate_weight": 0.06,
    "bits_of": {"blocks.0.attention.key.weight": 5, "blocks.0.attention.value.weight": 16}, "low_rank": {"max_bytes": 300, "bits": 8}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    return tmp_path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def outputs(stage: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stage_folder(stage, SEED).iterdir() if path.name != "timing.json"}


@pytest.mark.parametrize("options", [{}, FRONTIER], ids=["default", "frontier"])
def test_the_three_stages(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, **options)
    for stage in (calibrate, quantize, compress):
        stage.main(SEED)
    folder = stage_folder("calibrate", SEED)
    hessians = load_hessians(folder / "hessians.safetensors", stage_folder("train", SEED) / "checkpoint.safetensors")
    assert hessians.inputs.keys() == hessians.calibration.hessians.keys() == hessians.verification.hessians.keys()
    assert not torch.equal(hessians.calibration.hessians["blocks.0.mlp.up"], hessians.verification.hessians["blocks.0.mlp.up"])
    assert load_metrics(folder) == {"num_tokens": 24 * 16, "num_hessians": len(hessians.inputs)}

    folder = stage_folder("quantize", SEED)
    metrics = load_metrics(folder)
    assert metrics.keys() == METRIC_KEYS
    assert 0 < metrics["relative_error"] < metrics["relative_error_rtn"] and metrics["heldout_bpb"] > 0
    assert metrics["heldout_tokens"] == 31 * 16  # 500 of them at most, in windows of 16
    assert 0 < metrics["heldout_kl"] < 1 and 0 < metrics["predicted_loss"] < 1
    quantized = load_quantized(folder / "quantized.safetensors")
    assert quantized.weights().keys() == load_checkpoint(stage_folder("train", SEED) / "checkpoint.safetensors").weights.keys()
    rows = read_csv(folder / "tensors.csv")
    assert [row["name"] for row in rows] == sorted(quantized.matrices)
    assert {row["method"] for row in rows} == {"gptq"} and all(int(row["coded_bytes"]) > 0 for row in rows)

    folder = stage_folder("compress", SEED)
    assert_same(load_artifact(folder / "model.ptz"), quantized)
    metrics, sizes = load_metrics(folder), read_csv(folder / "sizes.csv")
    assert metrics["blob_bytes"] == (folder / "model.ptz").stat().st_size
    assert metrics["code_bytes"] == code_bytes(tmp_path)
    assert metrics["artifact_bytes"] == metrics["blob_bytes"] + metrics["code_bytes"] == sum(int(row["num_bytes"]) for row in sizes)
    assert metrics["limit_bytes"] == 100_000

    for name in ("calibrate", "quantize", "compress"):
        timing = load_timing(stage_folder(name, SEED))
        assert timing is not None and timing["seconds"] > 0


def test_free_steps_meet_the_target_in_bytes_of_the_artifact(project: Path) -> None:
    """Of container and reserve for the code, with corrections and all."""
    write_params(project, "quantize", **FREE)
    for stage in (calibrate, quantize, compress):
        stage.main(SEED)
    target, sizes = FREE["target_bytes"], load_metrics(stage_folder("compress", SEED))
    assert 0.99 * target <= sizes["blob_bytes"] + PARAMS["compress"]["code_bytes"] <= target
    quantized = load_quantized(stage_folder("quantize", SEED) / "quantized.safetensors")
    assert_same(load_artifact(stage_folder("compress", SEED) / "model.ptz"), quantized)
    rows = {row["name"]: row for row in read_csv(stage_folder("quantize", SEED) / "tensors.csv")}
    for name, bits in {"blocks.0.attention.key.weight": "5", "blocks.0.attention.value.weight": "16"}.items():
        assert rows.pop(name)["bits"] == bits
    assert {row["bits"] for row in rows.values()} == {"free"} and any(int(row["rank"]) for row in rows.values())
    assert load_metrics(stage_folder("quantize", SEED)).keys() == METRIC_KEYS


def interrupt_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the stage until the first step of distillation is made."""
    step = Student.step

    def stop(student: Student, *arguments: float) -> None:
        step(student, *arguments)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Student, "step", stop)
        with pytest.raises(SystemExit):
            quantize.main(SEED)


def test_distillation_meets_the_target_reads_the_training_text_and_says_how_long_it_took(project: Path,
                                                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(project, "quantize", **FREE | {"distill": PARAMS["quantize"]["distill"] | {"steps": 3}, "feedback_damping": 0.1,
                                           "low_rank": PARAMS["quantize"]["low_rank"]})
    calibrate.main(SEED)
    quantize.main(SEED)
    first = outputs("quantize")
    assert load_metrics(stage_folder("quantize", SEED)).keys() == METRIC_KEYS | {"distill_kept", "distill_kl", "undistilled_kl"}
    interrupt_distillation(monkeypatch)
    assert len(outputs("quantize").keys() - first.keys()) == 1, "the state"
    quantize.main(SEED)
    assert outputs("quantize") == first
    compress.main(SEED)
    sizes, timing = load_metrics(stage_folder("compress", SEED)), load_timing(stage_folder("quantize", SEED))
    assert 0.99 * FREE["target_bytes"] <= sizes["blob_bytes"] + PARAMS["compress"]["code_bytes"] <= FREE["target_bytes"]
    assert timing is not None and 0 < timing["distill_seconds"] < timing["seconds"]


def test_a_target_that_cannot_be_reached_fails_and_writes_nothing(project: Path) -> None:
    calibrate.main(SEED)
    write_params(project, "quantize", **FREE | {"target_bytes": 1000})
    with pytest.raises(TargetError, match=r"quantize\.target_bytes: expected at least 9,\d{3}, found 1,000"):
        quantize.main(SEED)
    assert not stage_folder("quantize", SEED).exists()


@pytest.mark.parametrize("changes", [{}, FREE], ids=["clipped", "free"])
def test_a_second_run_gives_the_same_bytes(project: Path, changes: dict[str, Any]) -> None:
    write_params(project, "quantize", **changes)
    stages = {"calibrate": calibrate, "quantize": quantize, "compress": compress}
    first = {}
    for name, stage in stages.items():
        stage.main(SEED)
        first[name] = outputs(name)
    for name, stage in stages.items():
        stage.main(SEED)
        assert outputs(name) == first[name]


def test_an_artifact_above_the_limit_fails_and_writes_nothing(project: Path) -> None:
    calibrate.main(SEED)
    quantize.main(SEED)
    write_params(project, "compress", limit_bytes=13_000)
    with pytest.raises(BudgetError, match=r"at most 13,000 bytes, found .* too many"):
        compress.main(SEED)
    assert not stage_folder("compress", SEED).exists()


@pytest.mark.parametrize("qat", [None, "same", "other"])
def test_a_checkpoint_trained_for_another_grid_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str], qat: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    export: dict[str, Any] = {"below_lr": 0.1, "full_range": False, "bits": PARAMS["quantize"]["bits"], "clip_quantile": 1.0, "floor": 0.0}
    write_inputs(tmp_path, {None: None, "same": export, "other": export | {"bits": export["bits"] | {"mlp": 6}}}[qat])
    write_params(tmp_path, "quantize", clip=PARAMS["quantize"]["clip"] | {"rule": "max"})
    calibrate.main(SEED)
    quantize.main(SEED)
    assert ("bits.mlp 6 in training, 5 here" in capsys.readouterr().err) == (qat == "other")


@pytest.mark.slow
@pytest.mark.skipif(not landlock(), reason="Landlock cannot be used here")
@pytest.mark.parametrize(("stage", "reads"), [("calibrate", "train"), ("quantize", "heldout")])
def test_a_confined_stage_works_and_cannot_read_the_validation_text(stage: str, reads: str, project: Path) -> None:
    if stage == "quantize":
        calibrate.main(SEED)
    check_confined(project, stage, SEED, reads)
    assert list(stage_folder(stage, SEED).glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not landlock(), reason="Landlock cannot be used here")
def test_confined_distillation_works_and_goes_on_from_its_state(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_params(project, "quantize", distill=PARAMS["quantize"]["distill"] | {"steps": 2})
    calibrate.main(SEED)
    quantize.main(SEED)
    first = outputs("quantize")
    interrupt_distillation(monkeypatch)
    check_confined(project, "quantize", SEED, "train")
    assert outputs("quantize") == first
