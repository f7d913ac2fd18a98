"""Every parameter file of the repository is complete and valid, and the presets are the published systems."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lib.model.attention import make_rotation
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.params import ParamsError, parse_params, read_params
from lib.quantization.policy import choose_bits
from lib.schema import PipelineParams
from tools.preset import apply_preset, list_presets

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]


def load(path: Path) -> PipelineParams:
    return parse_params(read_params(path), PipelineParams, f"{path.name}: ")


def keys(values: Any, prefix: str = "") -> set[str]:
    if not isinstance(values, dict):
        return set()
    return {key for name, value in values.items() if prefix != "quantize.bits_of."
            for key in {prefix + name} | keys(value, f"{prefix}{name}.")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_is_valid_and_has_the_key_tree_of_params_yaml(path: Path) -> None:
    load(path)
    assert keys(read_params(path)) == keys(read_params(ROOT / "params.yaml"))


@pytest.mark.parametrize(("preset", "num_parameters"), [("pr585", 33_580_124), ("pr410", 26_993_756), ("pr410-qat", 25_779_281),
                                                        ("pr585-free", 33_580_124), ("pr410-free", 26_993_756)])
def test_presets_have_the_published_parameter_counts(preset: str, num_parameters: int) -> None:
    model = load(ROOT / f"presets/{preset}.yaml").model.architecture
    assert outline(model.model_dump(mode="json")).num_parameters == num_parameters


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat"])
def test_presets_train_on_the_published_batch_for_the_published_limit(preset: str) -> None:
    params = load(ROOT / f"presets/{preset}.yaml")
    assert params.train.batch_sequences * params.train.sequence_tokens == 786_432
    assert params.train.batch_sequences % 8 == 0
    assert params.quantize.target_bytes is None and params.compress.limit_bytes == 16_000_000


TABLE = {  # of the reference on the three systems
    "pr585": {"train.qat.below_lr": 0.5, "train.qat.bits.attention": 5, "train.qat.bits.mlp": 5, "train.qat.clip_quantile": 0.9995,
              "quantize.method": "gptq", "quantize.clip.rule": "percentile",
              "quantize.bits.attention": 5, "quantize.bits.mlp": 5, "quantize.bits.embedding": 8, "quantize.prune_fraction": 0.02,
              "calibrate.num_sequences": 256, "train.averaging.select": "ema", "train.averaging.swa_below_lr": 0.2,
              "train.optimizer.matrix_lr": 0.025, "train.optimizer.embedding_lr": 0.035, "train.optimizer.vector_lr": 0.025,
              "fp16": {"bigram.projection.weight", "value_embedding.projection.weight"}},
    "pr410": {"train.qat.below_lr": 0.1, "train.qat.bits.attention": 6, "train.qat.bits.mlp": 6, "train.qat.clip_quantile": 1.0,
              "quantize.method": "rtn", "quantize.clip.rule": "max", "quantize.bits.attention": 6, "quantize.bits.mlp": 6,
              "quantize.bits.embedding": 8, "quantize.prune_fraction": 0.01, "train.averaging.swa_below_lr": 0.2,
              "train.optimizer.matrix_lr": 0.025, "train.optimizer.embedding_lr": 0.035, "train.optimizer.vector_lr": 0.025,
              "fp16": {"bigram.projection.weight", "value_embedding.projection.weight"}},
    "pr410-qat": {"train.qat.bits.attention": 6, "train.qat.bits.mlp": 5, "train.qat.clip_quantile": 1.0, "quantize.method": "rtn",
                  "quantize.clip.rule": "max", "quantize.bits.attention": 6, "quantize.bits.mlp": 5, "quantize.bits.bigram": 6,
                  "quantize.prune_fraction": 0.05, "train.averaging.swa_below_lr": 0.4, "train.optimizer.matrix_lr": 0.02,
                  "train.optimizer.embedding_lr": 0.03, "train.optimizer.vector_lr": 0.02,
                  "fp16": {"bigram.projection.weight", "blocks.8.attention.key.weight", "token_embedding.weight"}}}
COMMON = {**{f"train.optimizer.weight_decay.{group}": 0.04 for group in ("matrix", "embedding", "vector", "head")},
          "train.optimizer.momentum": 0.99, "train.optimizer.momentum_start": 0.92,
          "train.optimizer.orthogonalization": "newton_schulz", "train.optimizer.orthogonalization_steps": 5,
          "train.optimizer.adam_betas": [0.9, 0.95], "train.optimizer.adam_eps": 1e-8,
          "train.optimizer.grad_clip": 0.3, "train.averaging.ema_decay": 0.997, "train.averaging.ema_every_steps": 1,
          "train.averaging.swa_every_steps": 50, "train.qat.full_range": True, "train.qat.floor": 1.0, "quantize.clip.floor": 1.0,
          "compress.codec": "zstd", "compress.level": 22, "model.q_gain_init": 1.5, "model.logit_softcap": 30.0,
          "model.embedding_init_std": 0.005}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {key: value for name, inner in values.items()
            for key, value in (flatten(inner, f"{prefix}{name}.") if isinstance(inner, dict) and inner else {prefix + name: inner}).items()}


@pytest.mark.parametrize("preset", TABLE)
def test_presets_have_the_published_values(preset: str) -> None:
    params = load(ROOT / f"presets/{preset}.yaml")
    values, expected = flatten(params.model_dump(mode="json")), COMMON | TABLE[preset]
    fp16 = expected.pop("fp16")
    assert {key: values[key] for key in expected} == expected
    model = outline(params.model.architecture.model_dump(mode="json"))
    bits = choose_bits(parts_of(model), params.quantize)
    assert {name for name, kind in bits.items() if kind == 16} == fp16
    assert {name for name in bits if model.get_parameter(name).numel() <= 65_536} <= fp16, "the scripts keep these in fp16"
    if preset == "pr410-qat":
        assert params.train.qat.below_lr > 1, "from the first step"
    base, dims = (10_000, 64) if preset == "pr410-qat" else (10_000 * 2 ** (16 / 14), 16)
    for tokens in (1024, 2048) if preset == "pr410-qat" else (2048,):
        angles = torch.atan2(*reversed(make_rotation(params.model, tokens, None, torch.device("cpu"))))[1, 0]
        torch.testing.assert_close(angles, base ** (-torch.arange(0, dims, 2) / dims), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("preset", "free"), [("pr585", "pr585-free"), ("pr410", "pr410-free"), ("pr410-qat", "pr410-free")])
def test_the_block_of_a_published_preset_lists_what_differs_from_the_corrected_method(preset: str, free: str) -> None:
    text = (ROOT / f"presets/{preset}.yaml").read_text()
    block = text.split(f"the corrected method, presets/{free}.yaml,")[1].split("# Known differences")[0]
    listed = {key for keys in re.findall(r"^#   (\S.*?): ", block, re.MULTILINE) for key in keys.split(", ")}
    left, right = (flatten(load(ROOT / f"presets/{name}.yaml").model_dump(mode="json")) for name in (preset, free))
    differing = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)} - {"report.title"}
    found = {key: {name for name in listed if f"{key}.".startswith(f"{name}.")} for key in differing}
    assert all(found.values()), sorted(key for key, names in found.items() if not names)
    assert set().union(*found.values()) == listed


@pytest.mark.parametrize("free", ["pr585-free", "pr410-free"])
def test_free_presets_have_free_steps_at_the_limit_and_no_grid(free: str) -> None:
    params = load(ROOT / f"presets/{free}.yaml")
    assert params.quantize.target_bytes == params.compress.limit_bytes == 16_000_000
    assert set(params.quantize.bits.values()) == {"free"} and not params.quantize.bits_of
    assert params.train.qat.below_lr == 0


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


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat", "pr585-free", "pr410-free"])
def test_presets_take_the_published_tokens_and_state_what_is_known_of_them(preset: str) -> None:
    tokenize = load(ROOT / f"presets/{preset}.yaml").tokenize
    assert (tokenize.source, tokenize.hub.repo, tokenize.hub.dataset) == ("hub", "willdepueoai/parameter-golf", "fineweb10B_sp1024")
    assert (tokenize.hub.start, tokenize.hub.train_shards) == ("shards", 80)
    assert tokenize.expect.model_dump() == {"val_documents": 50_000, "val_bytes_per_token": 2.43592}
    assert (ROOT / tokenize.path).is_file()


def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "presets/pr585.yaml").read_text().replace("stride_tokens:", "strid_tokens:"))
    result = subprocess.run([sys.executable, "-m", "tools.check_params", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
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
