"""Calibrate, quantize and compress, one after the other, on a checkpoint of random weights."""

import csv
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
from stages import calibrate, compress, quantize
from tests.artifacts.quantized_models import assert_same
from tests.stages.project import PARAMS, SEED, write_inputs, write_params


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


def test_the_three_stages(project: Path) -> None:
    for stage in (calibrate, quantize, compress):
        stage.main(SEED)
    folder = stage_folder("calibrate", SEED)
    hessians = load_hessians(folder / "hessians.safetensors")
    assert hessians.inputs.keys() == hessians.calibration.keys() == hessians.verification.keys()
    assert not torch.equal(hessians.calibration["blocks.0.mlp.up"], hessians.verification["blocks.0.mlp.up"])
    assert load_metrics(folder) == {"num_tokens": 24 * 16, "num_hessians": len(hessians.inputs)}

    folder = stage_folder("quantize", SEED)
    metrics = load_metrics(folder)
    assert metrics.keys() == {"heldout_bpb", "bits_per_weight", "entropy_bits", "relative_error", "relative_error_rtn"}
    assert 0 < metrics["relative_error"] < metrics["relative_error_rtn"] and metrics["heldout_bpb"] > 0
    quantized = load_quantized(folder / "quantized.safetensors")
    assert quantized.weights().keys() == load_checkpoint(stage_folder("train", SEED) / "checkpoint.safetensors").weights.keys()
    rows = read_csv(folder / "tensors.csv")
    assert [row["name"] for row in rows] == sorted(quantized.matrices)
    assert {row["method"] for row in rows} == {"gptq", "rtn"} and rows[0]["clip"] == "mse"

    folder = stage_folder("compress", SEED)
    assert_same(load_artifact(folder / "model.ptz"), quantized)
    metrics, sizes = load_metrics(folder), read_csv(folder / "sizes.csv")
    assert metrics["blob_bytes"] == (folder / "model.ptz").stat().st_size
    assert metrics["code_bytes"] == (project / "stages" / "evaluate.py").stat().st_size
    assert metrics["artifact_bytes"] == metrics["blob_bytes"] + metrics["code_bytes"] == sum(int(row["num_bytes"]) for row in sizes)
    assert metrics["limit_bytes"] == 100_000

    for name in ("calibrate", "quantize", "compress"):
        timing = load_timing(stage_folder(name, SEED))
        assert timing is not None and timing["seconds"] > 0


def test_a_second_run_gives_the_same_bytes(project: Path) -> None:
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
    write_params(project, "compress", limit_bytes=9000)
    with pytest.raises(BudgetError, match=r"at most 9,000 bytes, found .* too many"):
        compress.main(SEED)
    assert not stage_folder("compress", SEED).exists()


@pytest.mark.parametrize("qat", [None, "same", "other"])
def test_a_checkpoint_trained_for_another_grid_is_pointed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                              capsys: pytest.CaptureFixture[str], qat: str | None) -> None:
    monkeypatch.chdir(tmp_path)
    export: dict[str, Any] = {"below_lr": 0.1, **{key: PARAMS["quantize"][key] for key in ("bits", "clip")}}
    write_inputs(tmp_path, {None: None, "same": export, "other": export | {"bits": export["bits"] | {"mlp": 6}}}[qat])
    calibrate.main(SEED)
    quantize.main(SEED)
    assert ("bits.mlp 6 in training, 5 here" in capsys.readouterr().err) == (qat == "other")
