"""A model that the script of entry #410 has trained, quantized and written gets the scores that the script's own functions give it.

The scores were computed by the script in fp32 on a CPU; tests/golden/pr410_small/README.md says what the files are.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from lib.artifacts.quantized import QuantizedModel
from lib.compression.coding import CODECS
from lib.compression.container import pack, unpack
from lib.data.shards import Stream
from lib.evaluation.config import StrategyName
from lib.evaluation.evaluation import run_strategy
from lib.evaluation.trainable import match_groups
from lib.model.config import parse_model
from lib.model.gpt import build_model, outline
from lib.model.parts import parts_of
from lib.published.conversion import convert_artifact
from lib.published.reader import Published, read_published
from tests.evaluation.tiny import make_job, make_params

FOLDER = Path(__file__).parent / "pr410_small"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
MODEL: dict[str, Any] = {key: value for key, value in EXPECTED["model"].items() if key != "note"} | {
    "q_gain_init": 1.5, "unet_skips": True, "residual_mix": True, "ln_scale": True, "tied_head": True, "logit_softcap": 30.0,
    "embedding_init_std": 0.005, "bos_id": 1, "document_mask": False}
NUM_BYTES = {8192: 20_324, 4096: 10_221}  # of the text of so many targets
PHASE = {"lr_schedule": "cosine", "momentum": 0.9, "weight_decay": 0.0, "grad_clip": None, "batch_sequences": 8, "drop_last": True}
SETTINGS: dict[str, Any] = {
    "window_tokens": 256, "stride_tokens": 64, "batch_tokens": 8192,
    "score_first": {
        "windows": "sliding", "chunk_tokens": 1024, "epochs": 2, "lr": 5e-4, "lr_schedule": "cosine", "optimizer": "adamw", "momentum": 0.9,
        "weight_decay": 0.0, "grad_clip": 1.0, "batch_sequences": 2, "trainable": ["last_2_blocks", "scales"]},
    "two_phase": {
        "recalibration": PHASE | {"epochs": 3, "lr": 1e-2, "optimizer": "adamw", "trainable": ["block_scales", "residual_mix"]},
        "selective": PHASE | {"epochs": 2, "lr": 5e-3, "optimizer": "sgd",
                              "trainable": ["last_3_blocks", "block_scales", "residual_mix", "embedding"]}}}


@pytest.fixture(scope="module")
def published() -> Published:
    return read_published(FOLDER / "final_model.int6.ptz")


@pytest.fixture(scope="module")
def quantized(published: Published) -> QuantizedModel:
    return convert_artifact(published, parse_model(MODEL, "model."), 1024)


def score(quantized: QuantizedModel, strategy: StrategyName, num_targets: int) -> tuple[float, npt.NDArray[np.float32]]:
    """Bits per byte, and nats of each target."""
    tokens, params = Stream([FOLDER / "fineweb_val_000000.bin"]).read(0, num_targets + 1), make_params(**SETTINGS)
    nats = run_strategy(strategy, make_job(build_model(quantized.model, quantized.weights()), tokens, params)).nats
    assert len(nats) == num_targets
    return float(nats.sum(dtype=np.float64)) / math.log(2) / NUM_BYTES[num_targets], nats


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "tolerance"), [("plain", 5e-7), ("sliding", 2e-8), ("score_first", 2e-8), ("two_phase", 2e-8)])
def test_scores_are_those_of_the_script(quantized: QuantizedModel, strategy: StrategyName, tolerance: float) -> None:
    """The script adds up plain losses in fp32, the others in fp64."""
    expected = EXPECTED[strategy]
    bpb, nats = score(quantized, strategy, expected["targets"])
    assert bpb == pytest.approx(expected["bpb"], abs=tolerance)
    assert nats.mean(dtype=np.float64) == pytest.approx(expected["loss"], abs=2 * tolerance)


def test_repacked_by_every_codec_it_has_the_same_weights_and_scores(quantized: QuantizedModel) -> None:
    weights, (bpb, nats) = quantized.weights(), score(quantized, "plain", 4096)
    for codec in CODECS:
        blob = pack(quantized, codec, 22).blob
        unpacked = unpack(blob)
        assert all(torch.equal(weight, weights[name]) for name, weight in unpacked.weights().items())
        if codec == "range":
            assert len(blob) < 0.95 * (FOLDER / "final_model.int6.ptz").stat().st_size
            again = score(unpacked, "plain", 4096)
            assert again[0] == bpb and np.array_equal(again[1], nats)


def test_parameters_are_those_of_the_script(published: Published, quantized: QuantizedModel) -> None:
    """Beside them this project has the projection of the value embedding as a matrix, the identity."""
    sizes = {name: weight.numel() for name, weight in quantized.weights().items()}
    assert torch.equal(quantized.weights()["value_embedding.projection.weight"], torch.eye(64))
    assert sum(sizes.values()) - 64 * 64 == published.num_parameters == 1_010_584
    two_phase = SETTINGS["two_phase"]
    for settings, expected in ((SETTINGS["score_first"], EXPECTED["score_first"]),
                               *((two_phase[phase], EXPECTED["two_phase"][phase]) for phase in two_phase)):
        members = match_groups(settings["trainable"], parts_of(outline(quantized.model)))
        assert sum(sizes[name] for name in {name for names in members.values() for name in names}) == expected["trained_parameters"]


def test_settings_are_those_that_the_numbers_were_made_with() -> None:
    for strategy in ("sliding", "score_first", "two_phase"):
        assert {EXPECTED[strategy][key] - SETTINGS[key] for key in ("window_tokens", "stride_tokens")} == {0}
    for found, expected in ((SETTINGS["score_first"], EXPECTED["score_first"]),
                            *((SETTINGS["two_phase"][phase], EXPECTED["two_phase"][phase]) for phase in ("recalibration", "selective"))):
        for key in ("epochs", "lr", "lr_schedule", "grad_clip", "batch_sequences", "trainable", "momentum", "weight_decay", "chunk_tokens"):
            assert found.get(key) == expected.get(key, found.get(key)), key
        assert expected["optimizer"].split()[0] == found["optimizer"]


def test_every_row_is_on_the_floor_of_the_published_scales(published: Published) -> None:
    """1/31 for matrices and 1/127 for tables, in fp16: one uniform step each."""
    tables = {name for name in published.codes if name.endswith(("tok_emb.weight", ".embed.weight"))}
    for names, step, num_rows in ((published.codes.keys() - tables, 1 / 31, 4608), (tables, 1 / 127, 3072)):
        scales = torch.cat([published.codes[name].scales for name in names])
        assert len(scales) == num_rows and set(scales.tolist()) == {torch.tensor(step).half().item()}
