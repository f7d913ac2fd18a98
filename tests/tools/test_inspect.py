import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lib.artifacts.quantized import QuantizedModel
from lib.compression.container import pack
from tests.artifacts.quantized_models import make_quantized_tensor
from tools import inspect

ROOT = Path(__file__).parents[2]


def write_model(path: Path, name: str = "blocks.0.mlp.up.weight") -> None:
    quantized = QuantizedModel({}, {}, {name: make_quantized_tensor(4, 6, None)}, {"mix": torch.ones(2).half()})
    path.write_bytes(pack(quantized, "range", 3).blob)


def test_prints_what_is_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "model.ptz")
    inspect.main([str(tmp_path / "model.ptz")])
    text = capsys.readouterr().out
    assert "codec range" in text and "blocks.0.mlp.up.weight" in text and "\nmlp " in text


def test_errors_are_a_message_and_status_1(tmp_path: Path) -> None:
    path = tmp_path / "model.ptz"
    command = [sys.executable, "-m", "tools.inspect", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"{path}: no such file; `dvc repro` makes it\n")


@pytest.mark.parametrize(("content", "message"), [(b"abc", r"not a \.ptz"), (None, "weight: no role")])
def test_foreign_files_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.ptz"
    write_model(path, "other.weight")
    if content:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        inspect.main([str(path)])
