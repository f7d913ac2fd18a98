import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.files import sha256_of
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.quantized import load_quantized
from lib.compression.container import pack
from lib.params import SECTIONS
from tests.evaluation.tiny import MODEL
from tests.published.published_files import dequantize, make_state, quantize_state, to_artifact, to_bytes, write
from tests.training.tiny import TRAIN
from tools import import_published, inspect

ROOT, SEED = Path(__file__).parents[2], 5
PARAMS: dict[str, Any] = dict.fromkeys(SECTIONS) | {
    "seeds": [3, SEED], "model": MODEL | {"attention": "auto"}, "train": TRAIN,
    "compress": {"codec": "range", "level": 3, "limit_bytes": 1, "code_bytes": 1}}
STATE = make_state()


@pytest.fixture(autouse=True)
def _params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_params()


def write_params(**changes: Any) -> None:
    params = copy.deepcopy(PARAMS)
    params["model"] |= changes
    YAML(typ="safe", pure=True).dump(params, Path("params.yaml"))


def run(path: Path, seed: int = SEED) -> None:
    import_published.main([str(path), "--seed", str(seed)])


def test_a_checkpoint_becomes_the_output_of_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "final_model.pt", to_bytes(STATE))
    run(path)
    folder = Path(f"artifacts/train/seed{SEED}")
    checkpoint = load_checkpoint(folder / "checkpoint.safetensors")
    assert torch.equal(checkpoint.weights["smear_gate.gate"], STATE["smear.gate"]) and checkpoint.model == MODEL
    origin = {"imported": "final_model.pt", "imported_bytes": path.stat().st_size, "imported_sha256": sha256_of(path)}
    assert checkpoint.training.model_dump() == {"sequence_tokens": 8} | origin
    assert load_metrics(folder) == origin | {"num_parameters": sum(map(torch.numel, STATE.values())), "num_steps": None}
    assert (folder / "heldout.csv").read_text() == "tokens,loss,bpb\n"
    assert (folder / "loss.csv").read_text() == "tokens,loss\n" and load_timing(folder) is not None
    assert "  dvc commit --force train@5\n" in capsys.readouterr().out
    assert not Path("artifacts/quantize").exists()
    before = (folder / "checkpoint.safetensors").read_bytes()
    run(path)
    assert (folder / "checkpoint.safetensors").read_bytes() == before


def test_an_artifact_becomes_the_output_of_quantize(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, kinds = quantize_state(STATE)
    path = write(tmp_path / "final_model.int6.ptz", to_artifact(tensors, kinds))
    run(path)
    folder = Path(f"artifacts/quantize/seed{SEED}")
    quantized = load_quantized(folder / "quantized.safetensors")
    assert torch.equal(quantized.weights()["blocks.0.mlp.up.weight"], dequantize(tensors, kinds)["blocks.0.mlp.fc.weight"])
    assert load_metrics(folder)["imported"] == quantized.training.imported == "final_model.int6.ptz"
    packed_bytes, text = len(pack(quantized, "range", 3).blob), capsys.readouterr().out
    assert f"published file {path.stat().st_size:,} bytes, packed by compress {packed_bytes:,} bytes (" in text
    assert "  dvc repro --single-item compress@5 evaluate@5\n" in text
    assert not Path("artifacts/train").exists()


@pytest.mark.parametrize(("content", "seed", "message"), [
    (to_bytes(STATE), 4, "seeds: expected 4 among them"), (b"x\x9c", SEED, "found one that is cut off after 2 bytes; copy it anew"),
    (to_bytes(STATE | {"blocks.0.attn.vr_lambda": torch.ones(2)}), SEED, "final_model: .*\nblocks.0.attn.vr_lambda: expected nothing"),
])
def test_a_refusal_is_a_message_and_writes_nothing(tmp_path: Path, content: bytes, seed: int, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(write(tmp_path / "final_model", content), seed)
    assert not Path("artifacts").exists()


def test_contradictions_to_params_are_a_message_on_standard_error(tmp_path: Path) -> None:
    write_params(num_layers=2, value_embedding_layers=[0], num_xsa_layers=0)
    path = write(tmp_path / "final_model.pt", to_bytes(STATE))
    command = [sys.executable, "-m", "tools.import_published", str(path), "--seed", str(SEED)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env={"PYTHONPATH": str(ROOT)})
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[1:] == ["model.num_layers: the file has 3, found 2",
                                              "model.value_embedding_layers: the file has 2 layers, found 1 layers"]


def test_inspect_shows_published_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect.main([str(write(tmp_path / "x", to_artifact(*quantize_state(STATE))))])
    assert "kind        quantized artifact" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"expected a state dict of floats, .* found xz"):
        inspect.main([str(write(tmp_path / "x", b"\xfd7zXZ"))])
