"""The forecast of the size beside closed forms and the sizes of artifacts that are really packed."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

from bench.forecast import make_weights, pack_nearest
from lib.compression.budget import SizeRow, summarize
from lib.forecast.size import MIN_ROWS, SPREAD, forecast_parts, sample_gaussian, sample_weights
from lib.model.gpt import outline
from lib.presets import load_settings
from lib.schema import PipelineParams
from tests.forecast.presets import FIXED, ROOT, make_pipeline


def gaussian_parts(params: PipelineParams, factor: float = 1.0) -> dict[str, SizeRow]:
    model = params.model.architecture
    parts = forecast_parts(sample_gaussian(model).scaled(factor), model, params.quantize, params.compress)
    return {part.part: part for part in parts}


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_codes_of_normal_weights_take_their_entropy(bits: int) -> None:
    """Codes are the integers nearest to x / step, step = num_std / clip_range standard deviations, and beyond the grid the last one."""
    clip = {"rule": "std", "percentiles": [1.0], "num_candidates": 1, "num_std": 9.0, "num_std_of": {"mlp": 3.0}, "floor": 0.0}
    params = make_pipeline(quantize=FIXED | {"bits": dict.fromkeys(FIXED["bits"], bits), "clip": clip}, compress={"codec": "range"})
    last = 2 ** (bits - 1) - 1
    edges = [(code + 0.5) * 3.0 / last for code in range(-last, last)]
    probabilities = np.diff([0.0, *map(NormalDist().cdf, edges), 1.0])
    entropy = -(probabilities * np.log2(probabilities)).sum()
    assert gaussian_parts(params)["mlp"].coded_bits == pytest.approx(entropy, rel=0.02)


@pytest.mark.parametrize("codec", ["zstd", "brotli", "range"])
@pytest.mark.parametrize(("changes", "tolerance"), [
    ({}, 0.015), ({"bits_of": {"token_embedding.weight": 16, "blocks.1.mlp.up.weight": 7}}, 0.03)], ids=["int5", "mixed"])
def test_weights_are_forecast_at_what_they_take_when_they_are_packed(codec: str, changes: dict[str, Any], tolerance: float) -> None:
    params = make_pipeline(quantize=FIXED | changes, compress={"codec": codec, "level": 19})
    model = params.model.architecture
    weights = make_weights(model, "rows")
    parts = forecast_parts(sample_weights(outline(model.model_dump(mode="json")), weights), model, params.quantize, params.compress)
    packed = pack_nearest(weights, model, params.quantize, params.compress)
    assert summarize(parts)["blob_bytes"] == pytest.approx(packed, rel=tolerance)
    assert {part.part: part.num_weights for part in parts if part.num_weights}["mlp"] == 4 * 128 * 512


def test_without_a_scale_floor_the_spread_of_the_weights_does_not_matter() -> None:
    params = make_pipeline(quantize=FIXED)
    sizes = [summarize([*gaussian_parts(params, factor).values()])["artifact_bytes"] for factor in (1.0, 2.0**-10)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_pruning_bits_and_low_rank_corrections_change_the_forecast() -> None:
    def size(**changes: Any) -> int:
        return summarize([*gaussian_parts(make_pipeline(quantize=FIXED | changes)).values()])["artifact_bytes"]

    num_weights = sum(part.num_weights or 0 for part in gaussian_parts(make_pipeline(quantize=FIXED)).values())
    assert size(bits=dict.fromkeys(FIXED["bits"], 6)) - size() == pytest.approx(num_weights / 8, rel=0.05)  # one bit for each
    assert size(prune_fraction=0.5) < 0.8 * size()
    assert size(rate_weight=1.0) < 0.995 * size()
    vectors = {bits: gaussian_parts(make_pipeline(quantize=FIXED | {"vector_mantissa_bits": bits}))["vectors"].num_bytes
               for bits in (2, 10)}
    num_values = sum(weight.numel() for name, weight in sample_gaussian(make_pipeline().model.architecture).weights.items()
                     if name.endswith(("scale", "scales", "gain", "mix", "gate", "skip_weights")))
    assert vectors[10] - vectors[2] == pytest.approx(num_values, rel=0.15)  # eight bits for each
    assert size(low_rank={"max_bytes": 5000, "bits": 8}) == size() + 5000


def test_the_grid_of_1855_is_forecast_below_the_limit() -> None:
    """Also part by part: 3.48, 3.30 and 4.22 bits are the entropies of normal weights."""
    params = load_settings("pr1855", ROOT / "presets")
    parts = gaussian_parts(params)
    assert summarize([*parts.values()])["artifact_bytes"] < 16_000_000
    assert [parts[role].coded_bits for role in ("mlp", "attention", "embedding")] == pytest.approx([3.48, 3.30, 4.22], rel=0.01)


def test_samples_are_rows_of_every_matrix_and_whole_vectors() -> None:
    model = make_pipeline().model.architecture
    weights = make_weights(model, "normal")
    samples = sample_weights(outline(model.model_dump(mode="json")), weights)
    assert samples.num_rows == {name: len(weight) for name, weight in weights.items() if "weight" in name and weight.ndim == 2
                                and "skip_weights" not in name}
    for name, sample in samples.weights.items():
        if name in samples.num_rows:
            assert MIN_ROWS <= len(sample) < len(weights[name]) and (weights[name] == sample[-1]).all(1).any()
        else:
            assert torch.equal(sample, weights[name])


def test_gaussian_samples_have_the_shapes_of_a_model_and_the_usual_spread() -> None:
    model = make_pipeline().model.architecture
    samples = sample_gaussian(model)
    assert samples.num_rows == sample_weights(outline(model.model_dump(mode="json"))).num_rows
    assert math.isclose(float(samples.weights["blocks.0.mlp.up.weight"].std()), SPREAD, rel_tol=0.05)
