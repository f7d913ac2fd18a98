"""Forecast sizes beside those of artifacts that are really packed: ``python -m bench.forecast [CHECKPOINT]``.

Without a checkpoint the published presets in full size, with weights of three kinds; with one, its model in grids of 5, 6 and 8 bits.
Weights are rounded to nearest. Sizes are bytes of the artifact without code.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Training, load_checkpoint
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, exponents_of
from lib.compression.budget import summarize
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.forecast.size import SPREAD, Samples, forecast_parts, sample_gaussian, sample_weights
from lib.model.config import ModelParams, parse_model
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.params import parse_params
from lib.presets import load_settings, read_preset
from lib.quantization.clipping import row_scales
from lib.quantization.config import QuantizeParams
from lib.quantization.grid import round_to_grid
from lib.quantization.grid_config import FLOAT_BITS
from lib.quantization.policy import choose_bits

PRESETS = ("pr585", "pr410", "pr410-qat")
KINDS = ("normal", "rows", "student 5")


class Row(NamedTuple):
    """Bytes of one artifact: forecast before training, forecast from its weights, packed."""

    gaussian: int
    weights: int
    packed: int


def make_weights(model: ModelParams, kind: str) -> dict[str, Tensor]:
    """Weights of a whole model: normal; rows and columns of different spread (logarithms with a deviation of 0.5 and 0.3); or
    Student's t with 5 degrees of freedom."""
    shapes = {name: parameter.shape for name, parameter in outline(model.model_dump(mode="json")).named_parameters()}
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator) * SPREAD
        if kind == "student 5":
            weight /= torch.stack([torch.randn(shape, generator=generator).square() for _ in range(5)]).mean(0).sqrt()
        elif kind == "rows" and weight.ndim == 2:
            for size, spread in (((len(weight), 1), 0.5), ((1, weight.shape[1]), 0.3)):
                weight *= (spread * torch.randn(size, generator=generator)).exp()
        weights[name] = weight
    return weights


def pack_nearest(weights: Mapping[str, Tensor], model: ModelParams, params: QuantizeParams, coding: CompressParams) -> int:
    """Bytes of the artifact whose weights are the nearest on the grid of their row."""
    matrices = {}
    parts = parts_of(outline(model.model_dump(mode="json")))
    for name, bits in choose_bits(parts, params).items():
        if bits != FLOAT_BITS:
            scales = row_scales(weights[name], int(bits), params.clip.of_role(parts[name].role))
            codes = round_to_grid(weights[name], scales[:, None], int(bits)).to(torch.int16)
            matrices[name] = QuantizedTensor(codes, exponents_of(scales), torch.zeros(codes.shape[1], dtype=torch.int16), int(bits))
    vectors = {name: weight.half() for name, weight in weights.items() if name not in matrices}
    quantized = QuantizedModel(model.model_dump(mode="json"), Training(sequence_tokens=1), matrices, vectors)
    return len(pack(quantized, coding.codec, coding.level).blob)


def compare(weights: Mapping[str, Tensor], model: ModelParams, params: QuantizeParams, coding: CompressParams) -> Row:
    """Both forecasts, and what the weights take."""
    def forecast(samples: Samples) -> int:
        return summarize(forecast_parts(samples, model, params, coding))["blob_bytes"]

    samples = sample_weights(outline(model.model_dump(mode="json")), weights)
    return Row(forecast(sample_gaussian(model)), forecast(samples), pack_nearest(weights, model, params, coding))


def compare_presets() -> Iterator[tuple[str, Row]]:
    """The published presets with weights of each kind."""
    for name in PRESETS:
        params = load_settings(name)
        for kind in KINDS:
            model = params.model.architecture
            yield f"{name}, {kind}", compare(make_weights(model, kind), model, params.quantize, params.compress)


def compare_checkpoint(path: Path) -> Iterator[tuple[str, Row]]:
    """A trained model in grids of 5, 6 and 8 bits, with the codecs zstd and range."""
    checkpoint, values = load_checkpoint(path), read_preset("pr585")
    model = parse_model(checkpoint.model, f"{path}: ")
    for bits in (5, 6, 8):
        quantize = values["quantize"] | {"bits": dict.fromkeys(values["quantize"]["bits"], bits)}
        for codec in ("zstd", "range"):
            yield f"trained, int{bits}, {codec}", compare(
                checkpoint.weights, model, parse_params(quantize, QuantizeParams, "quantize."),
                parse_params(values["compress"] | {"codec": codec}, CompressParams, "compress."))


def main() -> None:
    """Print a table of Markdown."""
    print("| weights | packed | forecast from them | forecast before training |\n|---|---|---|---|")
    for name, row in compare_checkpoint(Path(sys.argv[1])) if len(sys.argv) > 1 else compare_presets():
        print(f"| {name} | {row.packed:,} | {row.weights:,} ({row.weights / row.packed - 1:+.1%}) | "
              f"{row.gaussian:,} ({row.gaussian / row.packed - 1:+.1%}) |", flush=True)


if __name__ == "__main__":
    main()
