"""Sizes of the published systems' grids in full size: ``python -m bench.published [--presets NAMES] [--std NUMBER]``.

Weights are Gaussian with one standard deviation for all matrices; with `STD` #585 takes the published 0.46 bytes per parameter. Gains and
scales are 1. Every preset is rounded to nearest on its own grid, with the floor under the scales and without, and packed. Bytes are those
of code and artifact together.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.forecast import pack_nearest
from lib.artifacts.quantized import clip_range
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.presets import PRESETS_FOLDER, load_settings
from lib.quantization.clipping import row_scales
from lib.quantization.config import FREE, ClipParams
from lib.quantization.grid_config import FLOAT_BITS
from lib.quantization.policy import choose_bits
from lib.quantization.quantizer import smallest
from lib.schema import PipelineParams

PRESETS = ("pr585", "pr410", "pr410-qat")
STD = 0.175
PUBLISHED = {"pr585": "15.28 - 15.53 MB"}


class Size(NamedTuple):
    """Bytes of the artifact, and the fraction of rows whose scale is the floor's."""

    num_bytes: int
    floored: float


def gaussian_weights(params: PipelineParams, std: float) -> dict[str, Tensor]:
    """Every parameter of the model, fp32: matrices ~ N(0, std^2), everything else 1."""
    model, generator = outline(params.model.architecture.model_dump(mode="json")), torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * std if part.is_matrix else torch.ones(shape)
            for name, part in parts_of(model).items() for shape in [model.get_parameter(name).shape]}


def measure(weights: dict[str, Tensor], params: PipelineParams, clip: ClipParams) -> Size:
    """Prune, round to nearest and pack."""
    settings = params.quantize.model_copy(update={"clip": clip})
    pruned, floored = dict(weights), []
    for name, bits in choose_bits(parts_of(outline(params.model.architecture.model_dump(mode="json"))), settings).items():
        if bits == FREE:
            raise ValueError(f"{name}: expected a grid with fixed bits, found free steps, whose size is quantize.target_bytes")
        if bits != FLOAT_BITS:
            pruned[name] = weights[name].masked_fill(smallest(weights[name], settings.prune_fraction), 0)
            floored.append(row_scales(pruned[name], int(bits), clip) == row_scales(torch.zeros_like(pruned[name][:1]), int(bits), clip))
    return Size(pack_nearest(pruned, params.model.architecture, settings, params.compress), float(torch.cat(floored).float().mean()))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--folder", type=Path, default=PRESETS_FOLDER)
    parser.add_argument("--std", type=float, default=STD)
    arguments = parser.parse_args()
    print(f"Gaussian weights, standard deviation {arguments.std}; with the reserve for code, compress.code_bytes")
    print(f"{'preset':12}{'parameters':>12}{'floor':>8}{'rows on it':>12}{'bytes':>13}{'of limit':>10}{'artifact per parameter':>24}"
          "  published")
    for name in arguments.presets:
        params = load_settings(name, arguments.folder)
        weights = gaussian_weights(params, arguments.std)
        code = params.compress.code_bytes
        num_parameters, bits = sum(weight.numel() for weight in weights.values()), params.quantize.bits["mlp"]
        for clip in (params.quantize.clip, params.quantize.clip.model_copy(update={"floor": 0.0})):
            size = measure(weights, params, clip)
            floor = f"1/{clip_range(int(bits)) / clip.floor:g}" if clip.floor else "none"
            print(f"{name:12}{num_parameters:>12,}{floor:>8}{size.floored:>12.1%}{code + size.num_bytes:>13,}"
                  f"{(code + size.num_bytes) / params.compress.limit_bytes:>10.2%}{size.num_bytes / num_parameters:>24.4f}"
                  f"  {PUBLISHED.get(name, '') if clip.floor else ''}".rstrip(), flush=True)


if __name__ == "__main__":
    main()
