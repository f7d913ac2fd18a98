"""The whole measurement on a model that trains in a second: what it prints, writes, refuses, and leaves alone."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import read_csv, write_json
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.forecast.operating_point import Point
from lib.training.checkpoint import Trained
from tests.stages import project
from tests.stages.train_project import SECTION_MODEL
from tests.training.tiny import TRAIN
from tools import size

QUANTIZE = project.PARAMS["quantize"] | {"target_bytes": 13_000, "bits": dict.fromkeys(project.PARAMS["quantize"]["bits"], "free")}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which tokenize has run."""
    monkeypatch.chdir(tmp_path)
    project.write_inputs(tmp_path)
    write_params()
    return tmp_path


def write_params(**changes: dict[str, Any]) -> None:
    params = project.PARAMS | {
        "seeds": [7], "model": SECTION_MODEL | {"bigram_rows": 64}, "quantize": QUANTIZE,
        "train": TRAIN | {"sequence_tokens": 16, "qat": TRAIN["qat"] | {"below_lr": 0.0}}}
    write_json(Path("params.yaml"), params | {name: params[name] | section for name, section in changes.items()})  # JSON is YAML


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["size", *arguments])
    size.main()


def test_it_prints_and_writes_what_the_budget_wants_and_leaves_the_rest_alone(
        folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {"FRACTIONS": (1.0, 0.8), "GROWTH": 1.05, "LARGEST": 1.2}.items():
        monkeypatch.setattr(size, name, value)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run(monkeypatch, "--steps", "4", "--equal", "steps")
    measured, fits, predicted, keys = capsys.readouterr().out.split("\n\n")[1:5]
    names = ["as it is", "bigram_rows 256", "mlp_hidden_dim 36"]
    assert [line.split("  ")[0] for line in measured.splitlines()[1:]] == names
    assert [line.split()[-2] for line in measured.splitlines()[1:]] == ["4"] * 3
    assert [line.split(":")[0] for line in fits.splitlines()] == ["tables", "linear layers"]
    assert {line.split("  ")[0] for line in predicted.splitlines()} >= {"tables, as it is", "linear layers, as it is"}
    rows = read_csv(Path("artifacts/size/size.csv"), size.COLUMNS)
    points = [row for row in rows if row["kind"] == "measured"]
    assert [row["model"] for row in points] == [name for name in names for _ in size.FRACTIONS]
    assert all(0.98 * 6000 < int(row["num_bytes"]) / fraction <= 6000 for row, fraction in zip(points, 3 * size.FRACTIONS, strict=True))
    assert all(0 < float(more["kl"]) < float(fewer["kl"]) for more, fewer in zip(points[::2], points[1::2], strict=True))
    for line, key in zip(keys.splitlines(), size.DIRECTIONS, strict=True):
        grid = [row for row in rows if row["kind"] == f"predicted, {size.DIRECTIONS[key]}"]
        name = min(grid, key=lambda row: float(row["loss"]))["model"]
        expected = SECTION_MODEL["mlp_hidden_dim"] if key == "mlp_hidden_dim" else 64
        assert line.startswith(f"params.yaml: model.{key}: {expected if name == size.NOW else name.split()[1]}")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in after.keys() - before.keys()} == {"size.csv", "size.svg"}
    assert before.items() <= after.items()


def test_equal_seconds_and_what_is_said_of_weights_that_pay_and_that_do_not(
        folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    del folder
    budgets = []

    def measure(self: size.Bench, model: size.Model, params: Any) -> size.Measured:
        del self
        budgets.append((params.budget_steps, params.budget_seconds))
        loss = 2.0 + {"as": 0.0, "bigram_rows": -0.5, "mlp_hidden_dim": 0.5}[model.name.split()[0]]
        points = [Point(model.num_weights, num_bytes, loss, 2 ** (-16 * num_bytes / model.num_weights)) for num_bytes in (6000, 5000, 4000)]
        metrics = {"num_steps": 5, "heldout_loss": loss, "heldout_bpb": loss}
        trained = Trained(None, [], [], metrics, {"seconds": 1.5})  # type: ignore[arg-type]
        return size.Measured(model.name, trained, points)

    monkeypatch.setattr(size.Bench, "measure", measure)
    run(monkeypatch)
    assert budgets == [(7, None), (None, 1.5), (None, 1.5)]  # a quarter of 30 steps
    tables, layers = capsys.readouterr().out.split("\n\n")[4].splitlines()
    rows = read_csv(Path("artifacts/size/size.csv"), size.COLUMNS)
    grid = [row["model"] for row in rows if row["kind"] == "predicted, tables"]
    assert tables == f"params.yaml: model.bigram_rows: {grid[-1].split()[1]}, the end of the grid; measure again from there"
    assert layers == ("params.yaml: model.mlp_hidden_dim: 24 as it is; more weights lose here, and whether fewer gain was not measured")
    assert next(row["model"] for row in rows if row["kind"] == "predicted, linear layers") == size.NOW


@pytest.mark.parametrize(("key", "now", "expected"), [
    ("bigram_rows", 16, [4, 8, 16, 32, 64]), ("bigram_rows", 0, [0, 64, 128, 256]), ("bigram_rows", 6, [3, 6, 12]),
    ("mlp_hidden_dim", 512, [128, 256, 384, 512, 640]), ("mlp_hidden_dim", 510, [2, 129, 256, 383, 510]), ("mlp_hidden_dim", 1, [1, 2, 3])])
def test_the_grid_has_legal_values_and_the_present_one(key: str, now: int, expected: list[int]) -> None:
    assert list(itertools.islice(size.list_values(key, now), len(expected))) == expected


@pytest.mark.parametrize(("changes", "message"), [
    ({"quantize": project.PARAMS["quantize"]}, r"quantize\.target_bytes: expected a number, found null"),
    ({"quantize": {"target_bytes": 6000}}, r"quantize\.target_bytes: expected more than compress\.code_bytes 7,000"),
    ({"train": {"batch_sequences": 10**6}}, r"train\.batch_sequences: 1000000 sequences")])
def test_what_cannot_be_measured_is_refused_before_any_training(
        folder: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, dict[str, Any]], message: str) -> None:
    del folder
    write_params(**changes)
    monkeypatch.setattr(size, "train_checkpoint", None)
    with pytest.raises(ValueError, match=message):
        run(monkeypatch)


def test_missing_shards_are_named_with_what_makes_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / TOKENIZE_FOLDER / "train/split.json").unlink()
    with pytest.raises(ValueError, match=r"artifacts/tokenize/train/split\.json: no such file; `dvc repro` makes it"):
        run(monkeypatch)


def test_wrong_arguments_are_refused_with_the_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--steps", "0")
    assert capsys.readouterr().err == ("usage: make size [STEPS=400] [EQUAL=steps]\n"
                                       "make size: error: STEPS: expected a number above 0, found 0\n")
