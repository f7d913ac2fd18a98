"""Presets: merged into complete files that DVC leaves as they are; every one valid, and the published ones the published systems."""

import difflib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML

from lib.model.attention import make_rotation
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.params import ParamsError, read_params, read_yaml
from lib.presets import compose_preset, describe_preset, list_presets, load_settings, read_preset
from lib.quantization.policy import choose_bits
from lib.reporting.runs import flatten

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "presets"
PRESETS = list_presets(FOLDER)
DIFFERENCES = sorted(set(PRESETS) - {"default"})


def compose(name: str, path: Path) -> Path:
    path.write_text(compose_preset(name, FOLDER))
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_the_complete_file_has_the_values_that_are_read(preset: str, tmp_path: Path) -> None:
    assert read_params(compose(preset, tmp_path / "params.yaml")) == read_preset(preset, FOLDER)


@pytest.mark.parametrize("preset", PRESETS)
def test_dvc_changes_one_line_of_the_complete_file(preset: str, tmp_path: Path) -> None:
    """By the function behind ``dvc exp run --set-param``."""
    before = compose(preset, path := tmp_path / "params.yaml").read_text()
    changes = {"model.rope_base": "20000.5", "tokenize.tokenizer": "mine.model", "train.qat.bits.mlp": "7",
               "evaluate.score_first.lr": "0.25", "report.record.loss": "1.5"}
    apply_overrides(path, [f"{key}={value}" for key, value in changes.items()])
    lines = [line for line in difflib.ndiff(before.splitlines(), path.read_text().splitlines()) if line[0] in "+-"]
    assert [line.split(":")[0].split()[0] for line in lines] == ["-", "+"] * len(changes)
    assert [re.split(r"[: ]+", line)[1:3] for line in lines[1::2]] == [[key.split(".")[-1], value] for key, value in changes.items()]


def get(values: Any, path: Sequence[str]) -> Any:
    for part in path:
        values = values[part]
    return values


def test_the_committed_parameters_are_those_of_the_default_preset() -> None:
    shown = [subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=True).stdout
             for name in ("params.yaml", "presets/default.yaml")]
    assert shown[0] == shown[1] == compose_preset("default", FOLDER).encode()


@pytest.mark.parametrize("preset", DIFFERENCES)
def test_a_preset_holds_only_what_differs_and_where_it_comes_from(preset: str) -> None:
    default, complete = (dict(flatten(read_preset(name, FOLDER))) for name in ("default", preset))
    for key, value in flatten(read_yaml(PRESETS[preset])):
        assert key not in default or (value, type(value)) != (default[key], type(default[key])), key
        assert complete[key] == value
    values = YAML().load(PRESETS[preset].read_text())
    assert not list(find_unexplained(values)) and set(values["report"]) == {"title"}


def find_unexplained(values: Any) -> Iterator[str]:
    """Keys without a comment in parentheses, on their own line or on that of a mapping around them."""
    for key, value in values.items():
        token = (values.ca.items.get(key) or [None] * 3)[2]
        if not (token and re.match(r"# \(.+\)$", token.value.split("\n")[0])) and key != "report":
            yield from find_unexplained(value) if isinstance(value, dict) else [key]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_what_it_is_and_what_it_needs(preset: str) -> None:
    what, *others = describe_preset(PRESETS[preset])
    assert len(what) < 130 and what.endswith(".")
    assert [line for line in others if line.startswith("Needs ")] and others[-1].startswith("Run it with: ")


MINE = """\
# A preset of this test.

model:
  num_layers: 3                  # (tried)
  num_xsa_layers: 0

quantize:
  bits:                          # (fixed)
    mlp: 5
  bits_of: {blocks.0.mlp.up.weight: 16} # (the most sensitive)

evaluate:
  strategies: [plain]            # (fast)
  strategy: plain
  score_first:
    epochs: 1
    weight_decay: 1e-3           # (a try)
    grad_clip: null

report:
  record:
    loss: 1.5                    # (of last year)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A default with an exception by name, and one preset."""
    text = PRESETS["default"].read_text()
    assert "bits_of: {}      " in text
    (tmp_path / "default.yaml").write_text(text.replace("bits_of: {}      ", "bits_of:         ").replace(
        "  free_rows:", "    head.weight: 8\n  free_rows:"))
    (tmp_path / "mine.yaml").write_text(MINE)
    return tmp_path


def test_mappings_are_merged_and_lists_and_values_replaced(folder: Path) -> None:
    default, mine = (read_preset(name, folder) for name in ("default", "mine"))
    assert default["quantize"]["bits_of"] == {"head.weight": 8}
    changes = {"model.num_layers": 3, "model.num_xsa_layers": 0, "quantize.bits.mlp": 5,
               "quantize.bits_of": {"head.weight": 8, "blocks.0.mlp.up.weight": 16},
               "evaluate.strategies": ["plain"], "evaluate.strategy": "plain",
               "evaluate.score_first.weight_decay": 1e-3, "evaluate.score_first.grad_clip": None, "report.record.loss": 1.5}
    for key, value in changes.items():
        *parents, last = key.split(".")
        get(default, parents)[last] = value
    assert mine == default


def test_comments_say_what_a_key_means_and_where_its_value_comes_from(folder: Path) -> None:
    default, mine = (compose_preset(name, folder).splitlines() for name in ("default", "mine"))
    changed = [line[2:] for line in difflib.ndiff(default, mine) if line.startswith("+ ")]
    assert changed == [
        "# A preset of this test.",
        "  num_layers: 3                  # (tried)",
        "  num_xsa_layers: 0              # last layers with exclusive self-attention (#585: all)",
        "  bits:                          # by role: free, 2 to 8; 16 = fp16 (fixed)",
        "    mlp: 5",
        "  bits_of:                       # exceptions by name, such as blocks.0.mlp.up.weight: 16 (the most sensitive)",
        "    blocks.0.mlp.up.weight: 16",
        "  strategies:                    # among plain, sliding, one_pass, score_first, lora, phased, longest_first, two_phase (fast)",
        "  strategy: plain                # the one whose score is val_bpb (chosen on held-out documents)",
        "    weight_decay: 1e-3           # (a try)",
        "    grad_clip:                   # global gradient norm (#585); null = not clipped (#410)",
        "    loss: 1.5                    # nats per token; null = nothing (of last year)"]


@pytest.mark.parametrize(("old", "new", "message"), [
    ("num_layers", "num_layer", r"model\.num_layer: unknown key; did you mean model\.num_layers\?"),
    ("report:", "repart:", r"repart: unknown key; did you mean report\?"),
    ("num_layers: 3", "num_layers: 0", r"model\.num_layers: expected a number above 0, found 0"),
    ("model:\n", "model: 5\nother:\n", r"model: expected keys with values, found 5"),
    ("mlp: 5", "mlp: [", r", line \d+: not valid YAML 1\.2"),
])
def test_mistakes_in_a_preset_are_refused_with_its_name(folder: Path, old: str, new: str, message: str) -> None:
    (folder / "mine.yaml").write_text(MINE.replace(old, new))
    for read in (read_preset, compose_preset):
        with pytest.raises(ParamsError, match=rf"mine\.yaml(: )?{message}"):
            read("mine", folder)


@pytest.mark.parametrize(("name", "hint"), [("pr584", "did you mean pr585?"), ("nothing", "`make preset` lists them")])
def test_an_unknown_name_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ParamsError, match=rf"^NAME: expected a preset, found '{name}'; {re.escape(hint)}$"):
        read_preset(name, FOLDER)


@pytest.mark.parametrize(("preset", "num_parameters"), [("pr585", 33_580_124), ("pr410", 26_993_756), ("pr410-qat", 25_779_281),
                                                        ("pr585-free", 33_580_124), ("pr410-free", 26_993_756)])
def test_presets_have_the_published_parameter_counts(preset: str, num_parameters: int) -> None:
    model = load_settings(preset, FOLDER).model.architecture
    assert outline(model.model_dump(mode="json")).num_parameters == num_parameters


def test_1855_has_all_parameters_but_those_that_nothing_uses() -> None:
    """The published program stores the six factors of lanes for all layers; those before the first parallel one never get a gradient."""
    model = load_settings("pr1855", FOLDER).model.architecture
    assert model.parallel_from is not None
    assert outline(model.model_dump(mode="json")).num_parameters + 6 * model.parallel_from == 35_945_671


def test_the_large_model_does_what_1855_does_with_more_weights() -> None:
    """As many blocks in a pass, and in the same places skips and parallel ones."""
    small, free, large = (load_settings(name, FOLDER).model.architecture for name in ("pr1855", "pr1855-free", "pr1855-large"))
    assert small == free and large.parallel_from is not None and small.parallel_from is not None
    orders = [model.layer_order() for model in (small, large)]
    assert list(map(len, orders)) == [17, 17] and len(set(orders[1])) == len(set(orders[0])) + 3
    assert [[layer >= (model.parallel_from or 0) for layer in order] for model, order in zip((small, large), orders, strict=True)] == 2 * [
        [False] * 14 + [True] * 3]
    models = [outline(model.model_dump(mode="json")) for model in (small, large)]
    per_layer = sum(parameter.numel() for parameter in models[0].blocks[3].parameters())
    assert models[1].num_parameters == models[0].num_parameters + 3 * per_layer == 44_602_831


def test_1855_has_the_published_values() -> None:
    values = dict(flatten(load_settings("pr1855", FOLDER).model_dump(mode="json")))
    optimizer = {
        "matrix_lr": 0.026, "embedding_lr": 0.03, "vector_lr": 0.02, "weight_decay.matrix": 0.095, "weight_decay.embedding": 0.085,
        "weight_decay.vector": 0.02, "momentum_start": 0.92, "momentum": 0.97, "momentum_warmup": pytest.approx(1500 / 4945, abs=5e-4),
        "orthogonalization": "polar_express", "orthogonalization_steps": 5, "normalize_rows": "before", "cautious_decay": False,
        "adam_betas": [0.9, 0.99], "adam_eps": 1e-8, "grad_clip": 0.3, "warmdown": 0.85, "lr_floor": 0.1}
    lora = {
        "rank": 80, "alpha": 144.0, "layers": ["query", "key", "value", "attention", "mlp", "head"], "window_tokens": 2048,
        "chunk_tokens": 48, "steps": 1, "lr": 1e-4, "adam_betas": [0.0, 0.99], "adam_eps": 1e-10, "weight_decay": 0.5,
        "warm_start": 8 * 64, "batch_documents": 64}
    phased = {
        "boundaries": [833, 1666, 2500], "epochs": 1, "lr": 1e-3, "lr_schedule": "cosine", "optimizer": "sgd", "momentum": 0.9,
        "weight_decay": 0.0, "grad_clip": 1.0, "batch_sequences": 32_768 // 2048, "trainable": ["all"]}
    expected = {f"train.optimizer.{key}": value for key, value in optimizer.items()} | {
        "train.averaging.ema_decay": 0.9965, "train.averaging.select": "ema", "train.loop_start": 0.35, "train.qat.below_lr": 0.0,
        "train.row_tokens": 98_304, "train.sequence_tokens": 2048,
        "model.embedding_init_std": 0.005, "model.logit_softcap": 30.0, "model.rope_dims": 16, "model.rope_base": 10_000.0,
        "model.tied_head": True, "model.ln_scale": True, "model.residual_mix": True, "model.unet_skips": True, "model.smear_gate": True,
        "quantize.clip.num_std": 13.0, "quantize.clip.num_std_of.mlp": 11.5, "quantize.clip.num_std_of.embedding": 14.0,
        "quantize.clip.floor": 0.0, "quantize.damping": 0.01, "quantize.method": "gptq", "quantize.prune_fraction": 0.0,
        **{f"evaluate.lora.{key}": value for key, value in lora.items()},
        **{f"evaluate.phased.{key}": value for key, value in phased.items()},
        "evaluate.window_tokens": 2048}
    assert {key: values[key] for key in expected} == expected
    assert values["calibrate.num_sequences"] == 16 * 48


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat", "pr1855"])
def test_presets_train_on_the_published_batch_for_the_published_limit(preset: str) -> None:
    params = load_settings(preset, FOLDER)
    assert params.train.tokens_per_step == 786_432
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


@pytest.mark.parametrize("preset", TABLE)
def test_presets_have_the_published_values(preset: str) -> None:
    params = load_settings(preset, FOLDER)
    values, expected = dict(flatten(params.model_dump(mode="json"))), COMMON | TABLE[preset]
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
    left, right = (dict(flatten(load_settings(name, FOLDER).model_dump(mode="json"))) for name in (preset, free))
    differing = {key for key in left.keys() | right.keys() if left.get(key) != right.get(key)} - {"report.title"}
    found = {key: {name for name in listed if f"{key}.".startswith(f"{name}.")} for key in differing}
    assert all(found.values()), sorted(key for key, names in found.items() if not names)
    assert set().union(*found.values()) == listed


@pytest.mark.parametrize("free", ["pr585-free", "pr410-free", "pr1855-free", "pr1855-large"])
def test_free_presets_have_free_steps_at_the_limit_and_no_grid(free: str) -> None:
    params = load_settings(free, FOLDER)
    assert params.quantize.target_bytes == params.compress.limit_bytes == 16_000_000
    assert set(params.quantize.bits.values()) == {"free"} and not params.quantize.bits_of
    assert params.train.qat.below_lr == 0


@pytest.mark.parametrize("preset", ["pr585", "pr410", "pr410-qat"])
def test_presets_evaluate_as_the_logged_runs(preset: str) -> None:
    """On eight processes 8 rows of each are a step of #585, one for each epoch and chunk, and 64 of each a step of #410."""
    evaluate = load_settings(preset, FOLDER).evaluate
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
    tokenize = load_settings(preset, FOLDER).tokenize
    assert (tokenize.source, tokenize.hub.repo, tokenize.hub.dataset) == ("hub", "willdepueoai/parameter-golf", "fineweb10B_sp1024")
    assert (tokenize.hub.start, tokenize.hub.train_shards) == ("shards", 80)
    assert tokenize.expect.model_dump(exclude_none=True) == {"val_documents": 50_000, "val_bytes_per_token": 2.43592}
    assert (ROOT / tokenize.path).is_file()


def test_a_wrong_file_is_refused_before_anything_runs(tmp_path: Path) -> None:
    path = compose("pr585", tmp_path / "params.yaml")
    path.write_text(path.read_text().replace("stride_tokens:", "strid_tokens:"))
    result = subprocess.run([sys.executable, "-m", "tools.check_params", str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"{path}: evaluate.strid_tokens: unknown key" in result.stderr
    assert f"{path}: evaluate.stride_tokens: missing" in result.stderr


@pytest.mark.parametrize(("old", "new", "message"), [
    ("vocab_size: 1024", "vocab_size: 2048", r"model\.vocab_size: expected tokenize\.vocab_size 1024, found 2048"),
    (r"(target_bytes: \d+)", r"\g<1>0", r"quantize\.target_bytes: expected at most compress\.limit_bytes \d+, found \d+0")])
def test_sections_must_agree(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = compose("default", tmp_path / "params.yaml")
    load_settings(str(path))
    path.write_text(re.sub(old, new, path.read_text(), count=1))
    with pytest.raises(ParamsError, match=rf"params\.yaml: {message}"):
        load_settings(str(path))
