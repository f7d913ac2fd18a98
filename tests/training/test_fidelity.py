"""The presets train as published: small versions of them against an independent plain implementation, their start, their settings."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.artifacts.tokens import SplitWriter, load_split
from lib.data.loader import Loader
from lib.distributed import SINGLE_CPU
from lib.model.config import ModelParams, parse_model
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.params import parse_params
from lib.presets import read_preset
from lib.training.config import TrainParams
from lib.training.loop import train
from lib.training.schedule import lr_multiplier, muon_momentum
from tests.training.plain import Settings, train_plainly

ROOT = Path(__file__).parents[2]
PRESETS = ("pr585", "pr410", "pr410-qat")
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # preset, and what is changed: as the history of pr410 did, and options of the model
    **{preset: (preset, {}) for preset in PRESETS},
    "pr410-averages": ("pr410", {"averaging": {"ema_every_steps": 10, "ema_decay": 0.997**10, "swa_every_steps": 25}}),
    "pr585-options": ("pr585", {"model": {"tied_head": False, "document_mask": True}}),
}
NUM_STEPS = 24  # the fewest with which the late quantization of pr410 has begun at the last step
VOCAB_SIZE, SEQUENCE_TOKENS, BATCH_SEQUENCES = 64, 32, 8
WIDTH_RATIO, HEADS_RATIO, CADENCE_RATIO = 8, 2, 25


def shrink(preset: str, changes: dict[str, Any]) -> tuple[Settings, Settings]:
    """Sections model and train of a preset: sizes smaller in its proportions, a budget of `NUM_STEPS`; all else is the preset's."""
    params = read_preset(preset, ROOT / "presets")
    model = {key: value for key, value in params["model"].items() if key in ModelParams.model_fields} | changes.get("model", {})
    settings = params["train"]
    num_layers = 4 + model["num_layers"] % 2
    small_model = {
        "vocab_size": VOCAB_SIZE, "num_layers": num_layers, "model_dim": model["model_dim"] // WIDTH_RATIO,
        "num_heads": model["num_heads"] // HEADS_RATIO, "num_kv_heads": model["num_kv_heads"] // HEADS_RATIO,
        "mlp_hidden_dim": model["mlp_hidden_dim"] // WIDTH_RATIO, "rope_dims": model["rope_dims"] * HEADS_RATIO // WIDTH_RATIO,
        "rope_trained_tokens": SEQUENCE_TOKENS, "num_xsa_layers": round(num_layers * model["num_xsa_layers"] / model["num_layers"]),
        "bigram_rows": model["bigram_rows"] * VOCAB_SIZE // model["vocab_size"], "bigram_dim": model["bigram_dim"] // WIDTH_RATIO,
        "value_embedding_dim": model["value_embedding_dim"] // WIDTH_RATIO,
        "value_embedding_layers": [layer - model["num_layers"] + num_layers for layer in model["value_embedding_layers"]],
    }
    averaging = settings["averaging"] | changes.get("averaging", {})
    averaging["swa_every_steps"] //= CADENCE_RATIO
    without_clock = {key: None for key in settings if key.endswith("_seconds")}
    small_run = {"budget_steps": NUM_STEPS, "sequence_tokens": SEQUENCE_TOKENS, "batch_sequences": BATCH_SEQUENCES,
                 "loop_start": 0.0, "micro_batch_sequences": BATCH_SEQUENCES, "precision": "fp32", "compile": False, "averaging": averaging}
    return model | small_model, settings | without_clock | small_run


def make_loader(folder: Path) -> Loader:
    """Tokens that can be learned: each follows its predecessor by one of four steps; enough of them that no sequence repeats."""
    num_tokens = (NUM_STEPS * BATCH_SEQUENCES + 2) * SEQUENCE_TOKENS
    tokens = np.cumsum(np.random.default_rng(0).choice((1, 2, 5, 11), num_tokens)) % VOCAB_SIZE
    writer = SplitWriter(folder, VOCAB_SIZE, shard_tokens=num_tokens)
    writer.add(tokens.astype(np.uint16), num_tokens, num_tokens)
    writer.close()
    return Loader(load_split(folder, VOCAB_SIZE), SEQUENCE_TOKENS, BATCH_SEQUENCES, seed=5)


def make_model(model: Settings) -> GPT:
    gpt = GPT(parse_model(model, "model."))
    initialize(gpt, 1337)
    return gpt


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_weights_and_averages_of_every_step_are_those_of_the_plain_implementation(tmp_path: Path, variant: str) -> None:
    model, settings = shrink(*VARIANTS[variant])
    params, loader, gpt = parse_params(settings, TrainParams, "train."), make_loader(tmp_path / "train"), make_model(model)
    start = {name: parameter.detach().double() for name, parameter in gpt.named_parameters()}
    expected = train_plainly(start, [loader.batch(step) for step in range(NUM_STEPS)], model, settings)
    result = train(gpt, params, loader, SINGLE_CPU, tmp_path / "resume.pt", status=dict)

    optimizer = params.optimizer
    for step, (multiplier, momentum) in enumerate(zip(expected.multipliers, expected.momenta, strict=True)):
        fraction = step / NUM_STEPS
        assert lr_multiplier(fraction, optimizer.warmdown, optimizer.lr_floor) == pytest.approx(multiplier, rel=1e-12)
        assert muon_momentum(fraction, optimizer.momentum_start, optimizer.momentum, optimizer.momentum_warmup) == pytest.approx(momentum)
    # Without quantization fp32 stays within 2e-6 of float64. With it the two differ by codes that a rounding error has flipped, each
    # by a step of the grid, and by more of them with each step on the grid.
    num_quantized = np.cumsum([multiplier < params.qat.below_lr for multiplier in expected.multipliers])
    assert num_quantized[-1] > 0
    errors = np.abs(np.array(result.losses) / expected.losses - 1)
    assert (errors < 1e-5 + 2e-4 * num_quantized).all(), errors.tolist()

    assert result.candidates.keys() == {"raw", "ema", "swa"}
    for kind, weights in (("raw", expected.raw), ("ema", expected.ema), ("swa", expected.swa)):
        assert result.candidates[kind].keys() == weights.keys()
        for name, weight in weights.items():
            way = float((weight - start[name]).norm())
            tolerance = (1e-4 + 2.5e-4 * num_quantized[-1] ** 2) * way + 5e-7 * float(weight.norm())
            assert float((result.candidates[kind][name] - weight).norm()) < tolerance, (kind, name)


CONSTANT = {  # tensors that start with one value
    "attention.output.weight": 0, "mlp.down.weight": 0, "value_embedding.projection.weight": 0, "bigram.table.weight": 0, "head.weight": 0,
    "smear_gate.gate": 0, "bigram.scale": 0.05, "value_embedding.scale": 0.1, "value_embedding.layer_scales": 1, "skip_weights": 1,
    "attention.q_gain": 1.5, "attention_scale": 1, "mlp_scale": 1,
}
NORMAL = {"token_embedding.weight": 0.005, "value_embedding.table.weight": 0.01}  # their standard deviation


@pytest.mark.parametrize("variant", [*PRESETS, "pr585-options"])
def test_the_start_is_the_published_one(variant: str) -> None:
    model = shrink(*VARIANTS[variant])[0] | {"vocab_size": 1024}
    seen: list[torch.Tensor] = []
    for name, parameter in make_model(model).named_parameters():
        weight = parameter.detach()
        part = name.split(".", 2)[2] if name.startswith("blocks.") else name
        if part in CONSTANT:
            assert (weight == CONSTANT[part]).all(), name
        elif part == "residual_mix":
            assert (weight[0] == 1).all() and (weight[1] == 0).all(), name
        elif part in NORMAL:
            within = [float((weight.abs() < sigmas * NORMAL[part]).double().mean()) for sigmas in (0.5, 1, 2, 3)]
            assert within == pytest.approx([math.erf(sigmas / math.sqrt(2)) for sigmas in (0.5, 1, 2, 3)], abs=0.015), name
            assert float(weight.mean()) == pytest.approx(0, abs=0.03 * NORMAL[part]), name
        else:
            square = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
            gain = 1 / math.sqrt(2 * model["num_layers"]) if part == "bigram.projection.weight" else 1
            torch.testing.assert_close(square, gain**2 * torch.eye(len(square)), atol=1e-5, rtol=0, msg=name)
            assert not any(torch.equal(weight, other) for other in seen), name
            seen.append(weight)


@pytest.mark.parametrize(("preset", "warmdown_steps", "qat_below_lr", "qat_bits", "swa_below_lr"),
                         [("pr585", 3500, 0.5, (5, 5), 0.2), ("pr410", 3000, 0.1, (6, 6), 0.2), ("pr410-qat", 3000, 2.0, (6, 5), 0.4)])
def test_presets_have_the_published_settings(preset: str, warmdown_steps: int, qat_below_lr: float, qat_bits: tuple[int, int],
                                             swa_below_lr: float) -> None:
    params = read_preset(preset, ROOT / "presets")
    model, optimizer, averaging, qat = params["model"], *(params["train"][key] for key in ("optimizer", "averaging", "qat"))
    matrix_lr, embedding_lr = (0.02, 0.03) if preset == "pr410-qat" else (0.025, 0.035)
    published = {"matrix_lr": matrix_lr, "embedding_lr": embedding_lr, "vector_lr": matrix_lr, "head_lr": 0.008, "momentum": 0.99,
                 "weight_decay": dict.fromkeys(("matrix", "embedding", "vector", "head"), 0.04), "cautious_decay": False,
                 "momentum_start": 0.92, "orthogonalization": "newton_schulz", "orthogonalization_steps": 5, "normalize_rows": "none",
                 "lr_floor": 0.0, "adam_betas": [0.9, 0.95], "adam_eps": 1e-8, "grad_clip": 0.3}
    assert {key: optimizer[key] for key in published} == published
    assert (averaging["ema_decay"], averaging["ema_every_steps"], averaging["swa_every_steps"]) == (0.997, 1, 50)
    assert averaging["swa_below_lr"] == swa_below_lr
    assert (qat["below_lr"], qat["bits"]["attention"], qat["bits"]["mlp"]) == (qat_below_lr, *qat_bits)
    assert model["logit_softcap"] == 30
    dims = model["rope_dims"]
    scaling = 1 if preset == "pr410-qat" else (2048 / 1024) ** (dims / (dims - 2))
    assert model["rope_base"] == pytest.approx(10000 * scaling, rel=1e-9)
    num_steps = 6100
    for step in range(0, num_steps, 50):
        multiplier = lr_multiplier(step / num_steps, optimizer["warmdown"], optimizer["lr_floor"])
        assert multiplier == pytest.approx(min(1, (num_steps - step) / warmdown_steps), abs=0.005)
        momentum = muon_momentum(step / num_steps, optimizer["momentum_start"], optimizer["momentum"], optimizer["momentum_warmup"])
        assert momentum == pytest.approx(0.92 + 0.07 * min(1, step / 1500), abs=1e-4)
