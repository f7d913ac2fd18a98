"""Every parameter file of the repository is complete and valid, and the presets are the published systems."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.model.gpt import GPT
from lib.params import ParamsError, parse_params, read_params
from lib.presets import apply_preset, list_presets
from lib.schema import PipelineParams

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def load(path: Path) -> PipelineParams:
    return parse_params(read_params(path), PipelineParams, f"{path.name}: ")


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return set()
    return {key for name, value in values.items() for key in {prefix + name} | keys(value, f"{prefix}{name}.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_valid_and_has_the_key_tree_of_params_yaml(path: Path) -> None:
    load(path)
    assert keys(read_params(path)) == keys(read_params(ROOT / "params.yaml"))


@pytest.mark.parametrize(("preset", "num_parameters"), [("pr585", 33_580_124), ("pr410", 26_993_756), ("pr410-qat", 25_779_281)])
def test_presets_have_the_published_parameter_counts(preset: str, num_parameters: int) -> None:
    with torch.device("meta"):
        assert GPT(load(ROOT / f"presets/{preset}.yaml").model).num_parameters == num_parameters


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat"])
def test_presets_train_on_the_published_batch_and_quantize_what_they_trained_for(preset: str) -> None:
    params = load(ROOT / f"presets/{preset}.yaml")
    assert params.train.batch_sequences * params.train.sequence_tokens == 786_432
    assert params.train.batch_sequences % 8 == 0
    assert params.train.qat.model_dump(include={"bits", "clip"}) == params.quantize.model_dump(include={"bits", "clip"})
    assert not params.quantize.bits_of and params.quantize.target_bytes is None
    assert params.compress.limit_bytes == 16_000_000


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat"])
def test_presets_evaluate_as_the_logged_runs(preset: str) -> None:
    """On eight processes 8 rows of each are a step of #585, one for each epoch and chunk, and 64 of each a step of #410."""
    evaluate = load(ROOT / f"presets/{preset}.yaml").evaluate
    assert (evaluate.window_tokens, evaluate.stride_tokens) == (2048, 32)
    score_first = evaluate.score_first.model_dump()
    assert score_first == {
        "windows": "sliding", "chunk_tokens": 131_072, "epochs": 3, "lr": 1e-4, "lr_schedule": "cosine", "optimizer": "adamw",
        "momentum": 0.9, "weight_decay": 0.0, "grad_clip": 1.0, "batch_sequences": 64, "trainable": ("last_2_blocks", "scales")}
    assert score_first["batch_sequences"] * evaluate.window_tokens == score_first["chunk_tokens"]
    common = {"lr_schedule": "cosine", "momentum": 0.9, "weight_decay": 0.0, "grad_clip": None, "batch_sequences": 512, "drop_last": True}
    assert evaluate.two_phase.model_dump() == {
        "recalibration": common | {"epochs": 100, "lr": 1e-2, "optimizer": "adamw", "trainable": ("block_scales", "residual_mix")},
        "selective": common | {"epochs": 25, "lr": 5e-3, "optimizer": "sgd",
                               "trainable": ("last_3_blocks", "block_scales", "residual_mix", "embedding")}}


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat", "pr585-free"])
def test_presets_take_the_published_tokens_and_state_what_is_known_of_them(preset: str) -> None:
    tokenize = load(ROOT / f"presets/{preset}.yaml").tokenize
    assert (tokenize.source, tokenize.hub.repo, tokenize.hub.dataset) == ("hub", "willdepueoai/parameter-golf", "fineweb10B_sp1024")
    assert (tokenize.hub.start, tokenize.hub.train_shards) == ("shards", 80)
    assert tokenize.expect.model_dump() == {"val_documents": 50_000, "val_bytes_per_token": 2.43592}
    assert (ROOT / tokenize.path).is_file()


def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "presets/pr585.yaml").read_text().replace("stride_tokens:", "strid_tokens:"))
    result = subprocess.run([sys.executable, "-m", "lib.schema", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{path}: evaluate.strid_tokens: unknown key" in result.stderr
    assert f"{path}: evaluate.stride_tokens: missing" in result.stderr


def test_sections_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "presets/pr585.yaml").read_text().replace("vocab_size: 1024", "vocab_size: 2048", 1))
    with pytest.raises(ValueError, match=r"params\.yaml: model\.vocab_size: expected tokenize\.vocab_size 1024, found 2048"):
        load(path)


def test_the_target_is_below_the_limit(tmp_path: Path) -> None:
    params = read_params(ROOT / "params.yaml")
    limit, target = params["compress"]["limit_bytes"], params["quantize"]["target_bytes"]
    path, text = tmp_path / "params.yaml", (ROOT / "params.yaml").read_text()
    path.write_text(text.replace(f"target_bytes: {target}", f"target_bytes: {limit}"))
    assert load(path).quantize.target_bytes == limit
    path.write_text(text.replace(f"target_bytes: {target}", f"target_bytes: {limit + 1}"))
    with pytest.raises(ValueError, match=rf"quantize\.target_bytes: expected at most compress\.limit_bytes {limit}, found {limit + 1}"):
        load(path)


def test_the_committed_parameters_are_those_of_the_default_preset() -> None:
    shown = [subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True).stdout
             for name in ("params.yaml", "presets/default.yaml")]
    assert shown[0] == shown[1]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with params.yaml and the presets."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    for command in ("init --quiet", "add --all", "-c user.name=test -c user.email=test@example.org commit --quiet --message start"):
        subprocess.run(["git", *command.split()], check=True)
    return tmp_path


def test_a_preset_replaces_what_git_or_another_preset_has(workspace: Path) -> None:
    for name, path in list_presets().items():
        apply_preset(name)
        assert (workspace / "params.yaml").read_bytes() == path.read_bytes()
    (workspace / "params.yaml").unlink()
    apply_preset("pr585")
    assert (workspace / "params.yaml").read_bytes() == (ROOT / "presets/pr585.yaml").read_bytes()


def test_a_preset_does_not_replace_work(workspace: Path) -> None:
    edited = (workspace / "params.yaml").read_text().replace("damping: 0.003", "damping: 0.004")
    (workspace / "params.yaml").write_text(edited)
    with pytest.raises(ParamsError, match=r"found some that are not committed; commit them, or drop them with `git restore params\.yaml`"):
        apply_preset("pr585")
    assert (workspace / "params.yaml").read_text() == edited


def test_a_preset_that_is_unknown_or_wrong_changes_nothing(workspace: Path) -> None:
    before = (workspace / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=r"NAME: expected one of default, jsonl, .*pr585, found 'pr584'"):
        apply_preset("pr584")
    (workspace / "presets/pr585.yaml").write_text((workspace / "presets/pr585.yaml").read_text().replace("num_layers: 11", "num_layers: 0"))
    with pytest.raises(ParamsError, match=r"presets/pr585\.yaml: model\.num_layers"):
        apply_preset("pr585")
    assert (workspace / "params.yaml").read_bytes() == before
