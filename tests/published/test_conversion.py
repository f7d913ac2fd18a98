"""An imported model computes what the published one does: parameters by a mapping written out by hand, losses by a plain forward pass."""

import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.artifacts.checkpoint import Training
from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import save_metrics
from lib.artifacts.quantized import QuantizedModel, load_quantized, save_quantized
from lib.compression.coding import CODECS
from lib.compression.container import pack, unpack
from lib.model.config import ModelParams, parse_model
from lib.model.gpt import build_model
from lib.params import ParamsError
from lib.published.conversion import check_seed, convert_artifact, convert_checkpoint
from lib.published.reader import Published, read_published
from tests.artifacts.quantized_models import assert_same
from tests.evaluation.tiny import MODEL
from tests.published.published_files import (
    STARTING_SCRIPT,
    State,
    dequantize,
    dequantize_int8,
    make_state,
    quantize_int8,
    quantize_state,
    rename,
    to_artifact,
    to_bytes,
    to_project,
    write,
)
from tests.training import plain


def params_of(**changes: Any) -> ModelParams:
    return parse_model(MODEL | changes, "model.")


def read(folder: Path, content: bytes) -> Published:
    return read_published(write(folder / "published", content))


def clockwise(x: Tensor, dims: int, base: float) -> Tensor:
    """The rotation of the published scripts: the pair (a, b) becomes (a cos + b sin, b cos - a sin)."""
    half = dims // 2
    rotated = x.clone()
    for position in range(x.shape[1]):
        for pair in range(half):
            angle = position * base ** (-2 * pair / dims)
            a, b = x[:, position, pair], x[:, position, pair + half]
            rotated[:, position, pair] = a * math.cos(angle) + b * math.sin(angle)
            rotated[:, position, pair + half] = b * math.cos(angle) - a * math.sin(angle)
    return rotated


def published_loss(state: State, tokens: Tensor, model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> float:
    """Mean loss of the published model, in float64."""
    monkeypatch.setattr(plain, "rope", clockwise)
    return float(plain.mean_loss({name: tensor.double() for name, tensor in rename(state).items()}, tokens, model))


def loss_of(weights: State, tokens: Tensor, model: dict[str, Any]) -> float:
    gpt = build_model(model, weights)
    with torch.no_grad():
        return float(gpt(tokens[:, :-1], tokens[:, 1:]).mean())


TOKENS = torch.randint(2, MODEL["vocab_size"], (5, 9), generator=torch.Generator().manual_seed(3))
VARIANTS: list[dict[str, Any]] = [{}, {"num_kv_heads": 2, "rope_dims": 8, "num_layers": 4}, {"tied_head": False, "ln_scale": False}]


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_imported_checkpoint_computes_the_published_losses(tmp_path: Path, changes: dict[str, Any],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    state = make_state(MODEL | changes)
    checkpoint = convert_checkpoint(read(tmp_path, to_bytes(state)), params_of(**changes), 8)
    found, expected = (loss_of(checkpoint.weights, TOKENS, MODEL | changes), published_loss(state, TOKENS, MODEL | changes, monkeypatch))
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(loss_of(rename(state), TOKENS, MODEL | changes) - expected) > 1e-3 * expected, "the direction of the rotation matters"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_tensor_is_the_published_one(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in make_state().items()}
    content = to_bytes(state | {"mtp_heads.0.weight": torch.ones(2, 2)})
    published = read(tmp_path, content)
    checkpoint = convert_checkpoint(published, params_of(), 8)
    expected = rename(state)
    assert checkpoint.weights.keys() == expected.keys()
    for name, weight in checkpoint.weights.items():
        assert weight.dtype == torch.float32
        if name.endswith(("query.weight", "key.weight")):
            heads, published_heads = (tensor.float().reshape(-1, 8, 16) for tensor in (weight, expected[name]))
            assert torch.equal(heads[:, [0, 1, 4, 5, 6, 7]], published_heads[:, [0, 1, 4, 5, 6, 7]])
            assert torch.equal(heads[:, 2:4], -published_heads[:, 2:4])
        else:
            assert torch.equal(weight, expected[name].float())
    assert checkpoint.model == MODEL
    assert checkpoint.training == Training(
        sequence_tokens=8, imported="published", imported_bytes=len(content), imported_sha256=published.sha256)


def assert_has_the_weights(quantized: QuantizedModel, expected: State) -> None:
    weights = quantized.weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights.items())


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_an_imported_artifact_has_the_published_weights_bit_for_bit(tmp_path: Path, scale_dtype: torch.dtype) -> None:
    tensors, kinds = quantize_state(make_state())
    tensors = {name: tensor.to(scale_dtype) if name.endswith(".scale") and name.removesuffix(".scale") + ".q" in tensors else tensor
               for name, tensor in tensors.items()}
    tensors["smear.gate"], kinds["smear.gate"] = tensors["smear.gate"].float() + 1e-6, "passthrough_ctrl"
    quantized = convert_artifact(read(tmp_path, to_artifact(tensors, kinds)), params_of(), 8)
    expected = to_project(dequantize(tensors, kinds), MODEL)
    assert_has_the_weights(quantized, expected)
    save_quantized(tmp_path / "quantized.safetensors", quantized)
    assert_same(load_quantized(tmp_path / "quantized.safetensors"), quantized)
    for codec in CODECS:
        unpacked = unpack(pack(quantized, codec, 22).blob)
        assert_same(unpacked, quantized)
        assert_has_the_weights(unpacked, expected)
    assert torch.equal(quantized.matrices["blocks.0.mlp.up.weight"].codes, tensors["blocks.0.mlp.fc.weight.q"].short())
    scales = quantized.matrices["blocks.0.mlp.up.weight"].row_scales
    assert scales is not None and scales.dtype == (torch.float16 if scale_dtype == torch.float16 else torch.float32)
    assert (quantized.vectors["smear_gate.gate"].dtype, quantized.vectors["skip_weights"].dtype) == (torch.float32, torch.float16)


def test_bits_are_those_that_the_codes_need(tmp_path: Path) -> None:
    tensors, kinds = quantize_state(make_state())
    limits = {"c_q": (-15, 15, 5), "c_v": (-16, 15, 6), "proj": (-32, 31, 7), "fc": (-127, 127, 8)}
    for part, (low, high, _) in limits.items():
        name = f"blocks.0.{'mlp' if part == 'fc' else 'attn'}.{part}.weight.q"
        tensors[name] = tensors[name].clamp(low, high)
        tensors[name][0, :2] = torch.tensor([low, high], dtype=torch.int8)
    tensors["tok_emb.weight.q"][0, 0] = -128
    quantized = convert_artifact(read(tmp_path, to_artifact(tensors, kinds)), params_of(), 8)
    names = ("attention.query", "attention.value", "attention.output", "mlp.up")
    assert [quantized.matrices[f"blocks.0.{name}.weight"].bits for name in names] == [5, 6, 7, 8]
    assert quantized.matrices["token_embedding.weight"].bits is None
    assert_has_the_weights(unpack(pack(quantized, "range", 3).blob), to_project(dequantize(tensors, kinds), MODEL))


def test_an_imported_artifact_computes_the_published_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, kinds = quantize_state(make_state())
    quantized = convert_artifact(read(tmp_path, to_artifact(tensors, kinds)), params_of(), 8)
    expected = published_loss(dequantize(tensors, kinds), TOKENS, MODEL, monkeypatch)
    assert loss_of(quantized.weights(), TOKENS, MODEL) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("changes", "name", "own"), [
    ({"value_embedding_dim": 8}, "ve_shared.proj.weight", "value_embedding.projection.weight"),
    ({"bigram_dim": 16}, "bigram.proj.weight", "bigram.projection.weight")])
def test_a_projection_that_is_left_out_between_equal_widths_is_the_identity(tmp_path: Path, changes: dict[str, Any], name: str,
                                                                            own: str) -> None:
    whole = make_state(MODEL | changes)
    state = {key: tensor for key, tensor in whole.items() if key != name}
    checkpoint = convert_checkpoint(read(tmp_path, to_bytes(state)), params_of(**changes), 8)
    assert checkpoint.weights.keys() == rename(whole).keys() and torch.equal(checkpoint.weights[own], torch.eye(len(whole[name])))
    tensors, kinds = quantize_state(state)
    quantized = convert_artifact(read(tmp_path, to_artifact(tensors, kinds)), params_of(**changes), 8)
    expected = to_project(dequantize(tensors, kinds), MODEL | changes) | {own: torch.eye(len(whole[name]))}
    for codec in CODECS:
        assert_has_the_weights(unpack(pack(quantized, codec, 22).blob), expected)


def test_the_starting_script_s_artifact_computes_its_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MODEL | STARTING_SCRIPT
    saved = quantize_int8(make_state(model))
    published = read(tmp_path, zlib.compress(to_bytes(saved), 9))
    quantized = convert_artifact(published, params_of(**STARTING_SCRIPT), 8)
    expected = dequantize_int8(saved)
    assert_has_the_weights(unpack(pack(quantized, "range", 22).blob), to_project(expected, model))
    assert quantized.matrices["token_embedding.weight"].bits == 8
    neutral = {"bigram.embed.weight": torch.zeros(2, 4), "bigram.proj.weight": torch.zeros(16, 4), "bigram.scale": torch.zeros(()),
               "smear.gate": torch.full((16,), -torch.inf)}  # the plain forward pass always has them
    loss = published_loss(expected | neutral, TOKENS, model | {"bigram_rows": 2}, monkeypatch)
    assert loss_of(quantized.weights(), TOKENS, model) == pytest.approx(loss, rel=1e-5)


def test_files_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    published = read(tmp_path, to_bytes(make_state()))
    for convert in (convert_checkpoint, convert_artifact):
        with pytest.raises(ArtifactError, match=r"published: the file and params\.yaml contradict"):
            convert(published, params_of(mlp_hidden_dim=32), 8)


def test_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = make_state()
    artifact, checkpoint = read(tmp_path, to_artifact(*quantize_state(state))), read(tmp_path, to_bytes(state))
    for published in (artifact, checkpoint):
        check_seed(published, 3, [3, 4])
        with pytest.raises(ParamsError, match=r"params\.yaml: seeds: expected 5 among them, found \[3, 4\]; set seeds: \[5\]"):
            check_seed(published, 5, [3, 4])
    save_metrics(Path("artifacts/train/seed3"), {}, {})
    check_seed(checkpoint, 3, [3])
    with pytest.raises(ArtifactError, match="artifacts/train/seed3: expected no trained model for the seed of an artifact"):
        check_seed(artifact, 3, [3])
