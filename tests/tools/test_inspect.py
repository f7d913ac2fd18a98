import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lib.artifacts.files import write_bytes, write_csv
from lib.artifacts.quantized import QuantizedModel, scales_of
from lib.compression.container import pack
from tests.artifacts.quantized_models import TRAINING, make_quantized_tensor
from tests.evaluation.tiny import MODEL
from tools import inspect

ROOT = Path(__file__).parents[2]


def write_model(path: Path, name: str = "blocks.0.mlp.up.weight") -> None:
    quantized = QuantizedModel(MODEL, TRAINING, {name: make_quantized_tensor(4, 6, None)}, {"mix": torch.ones(2).half()})
    path.write_bytes(pack(quantized, "range", 3).blob)


def test_prints_what_is_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model.ptz")
    inspect.main([str(tmp_path / "model.ptz")])
    text = capsys.readouterr().out
    assert "codec range" in text and "blocks.0.mlp.up.weight" in text and "\nmlp " in text


COLUMNS = ("name", "method", "entropy_bits", "relative_error", "relative_error_rtn", "predicted_loss", "damping", "dead_columns")


def write_run(folder: Path, entropy_error: float = 0.0) -> Path:
    """Artifact and table of errors as a run leaves them, of two matrices in two layers, one with a correction, and one of 16 bits."""
    names = [f"blocks.{layer}.mlp.up.weight" for layer in (1, 13)]
    matrices = {name: make_quantized_tensor(4, 6, bits) for name, bits in zip(names, (None, 5), strict=True)}
    matrices[names[0]] = replace(matrices[names[0]], correction=(make_quantized_tensor(4, 1, 8), make_quantized_tensor(1, 6, 8)))
    vectors = {"blocks.1.mix": torch.ones(2, 3).half(), "head.weight": torch.ones(5, 4).half()}
    path = folder / "compress/seed3/model.ptz"
    write_bytes(path, pack(QuantizedModel({}, TRAINING, matrices, vectors), "range", 3).blob)
    rows = [(name, "gptq", matrix.entropy_bits() + entropy_error, 0.01, 0.04, loss, 0.003, 2)
            for (name, matrix), loss in zip(matrices.items(), (0.003, 0.001), strict=True)]
    write_csv(folder / "quantize/seed3/tensors.csv", COLUMNS, [*rows, ("head.weight", "fp16", None, 0.0, 0.0, 0.0, None, 0)])
    return path


def test_a_layer_tells_what_happened_to_its_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path)
    inspect.main([str(path), "--matrix", "blocks.1"])
    text = capsys.readouterr().out
    matrix = make_quantized_tensor(4, 6, None)
    steps = scales_of(matrix.row_exponents)
    coded = re.search(r"bytes   (\d+), (\S+) bits per weight; entropy ([\d.]+); and \d+ of a correction of rank 1", text)
    assert text.startswith("blocks.1.mlp.up.weight\n  size    4 x 6, 24 weights\n  bits    free, codes ")
    assert "blocks.13" not in text and "mix" not in text and ":left" not in text
    assert f"rows {float(steps.min()):.3g} to {float(steps.max()):.3g}, median {float(steps.median()):.3g}" in text
    assert coded is not None
    assert float(coded[2]) == pytest.approx(8 * int(coded[1]) / 24, abs=1e-3)
    assert coded[3] == f"{matrix.entropy_bits():.3f}"
    assert text.endswith("  method  gptq, damping 0.003, 2 dead columns\n"
                         "  error   0.01 of the outputs, relative; 0.25 of rounding to nearest, 0.04\n"
                         "  loss    0.003 nats per token, 75.0% of what all matrices cost\n")


@pytest.mark.parametrize(("wanted", "expected"), [
    ("mlp.up", ["blocks.1.mlp.up.weight", "blocks.13.mlp.up.weight"]), ("13", ["blocks.13.mlp.up.weight"]),
    ("head.weight", ["head.weight"])])
def test_matrices_are_named_by_parts_of_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], wanted: str,
                                                    expected: list[str]) -> None:
    inspect.main([str(write_run(tmp_path)), "--matrix", wanted])
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line and line[0] != " "] == expected
    assert ("kept at 16 bits, 40 bytes before compression" in text) == (wanted == "head.weight")


def test_costs_of_another_model_are_not_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path, entropy_error=0.01)
    inspect.main([str(path), "--matrix", "13"])
    assert "tensors.csv is of another model." in (text := capsys.readouterr().out) and "loss " not in text
    (tmp_path / "quantize/seed3/tensors.csv").unlink()
    inspect.main([str(path), "--matrix", "13"])
    assert "tensors.csv is not there." in (text := capsys.readouterr().out) and "5, codes " in text


def test_a_name_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"found blocks.2; there are blocks.1.mlp.up.weight, "):
        inspect.main([str(write_run(tmp_path)), "--matrix", "blocks.2"])


def test_errors_are_a_message_and_status_1(tmp_path: Path) -> None:
    path = tmp_path / "model.ptz"
    command = [sys.executable, "-m", "tools.inspect", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{path}: no such file; `dvc repro` makes it\n")


@pytest.mark.parametrize(("content", "message"), [(b"abc", r"not a \.ptz"), (None, "expected matrices of the model .*found other.weight")])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.ptz"
    write_model(path, "other.weight")
    if content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        inspect.main([str(path)])
