"""The size of an artifact before there is one: some rows of every matrix go through the real quantizer and codec, and are scaled up.

Inputs of matrices are taken to be white, because only calibration tells what they are. Low-rank corrections are taken to use all bytes
that they may, and matrices with free steps none: their steps are chosen for what the others leave of the target.

Shapes: R rows, C columns, n sampled rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Training
from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor
from lib.compression.budget import CODE, CONTAINER, SCALES, VECTORS, SizeRow
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.distributed import Process
from lib.model.config import ModelParams
from lib.model.gpt import GPT, outline
from lib.model.parts import Part, parts_of
from lib.quantization.config import FREE, QuantizeParams
from lib.quantization.grid_config import FLOAT_BITS
from lib.quantization.policy import choose_bits, truncate
from lib.quantization.quantizer import Quantizer

SAMPLED_WEIGHTS = 2**19  # of all matrices together, about
MIN_ROWS = 4  # of each matrix, where it has so many
SPREAD = 0.17
"""Standard deviation that trained weights are taken to have; it matters only where a scale floor acts. With it the int5 grid of #585, whose
rows are all at the floor, takes its published 15.4 MB."""
LOW_RANK = "low_rank"


@dataclass(frozen=True, eq=False)
class Samples:
    """Weights of a model, matrices by some of their rows.

    Attributes:
        weights: parameter name -> (n, C) fp32 for a matrix, the whole tensor for a vector.
        num_rows: name of a matrix -> R.
        parts: table of the model, from `lib.model.parts.parts_of`.
    """

    weights: dict[str, Tensor]
    num_rows: dict[str, int]
    parts: dict[str, Part]

    def scaled(self, factor: float) -> "Samples":
        """All weights times `factor`."""
        return replace(self, weights={name: weight * factor for name, weight in self.weights.items()})


class _Alone(Process):
    """This process without any others, and silent."""

    @property
    def is_main(self) -> bool:
        return False


@torch.no_grad()
def sample_weights(model: GPT, weights: Mapping[str, Tensor] | None = None) -> Samples:
    """Evenly spaced rows of each matrix of a model, and its vectors, on any device; `weights`, by name, in place of the model's own."""
    weights, parts = weights or dict(model.named_parameters()), parts_of(model)
    num_rows = {name: len(weights[name]) for name, part in parts.items() if part.is_matrix}
    stride = -(-sum(weights[name].numel() for name in num_rows) // SAMPLED_WEIGHTS)
    strides = {name: max(1, min(stride, rows // MIN_ROWS)) for name, rows in num_rows.items()}
    return Samples({name: weight[::strides.get(name, 1)] if weight.ndim else weight for name, weight in weights.items()}, num_rows, parts)


def sample_gaussian(model: ModelParams) -> Samples:
    """The same of a model with normal weights of the standard deviation `SPREAD`, always the same ones."""
    samples, generator = sample_weights(outline(model.model_dump(mode="json"))), torch.Generator().manual_seed(0)
    return replace(samples, weights={name: torch.randn(weight.shape, generator=generator) * SPREAD
                                     for name, weight in samples.weights.items()})


@torch.no_grad()
def forecast_parts(samples: Samples, model: ModelParams, params: QuantizeParams, coding: CompressParams) -> list[SizeRow]:
    """What takes how many bytes of code and artifact, as `lib.compression.budget.list_parts` gives it for an artifact that is there.

    Args:
        samples: samples of the weights, Gaussian ones or those of a model in training.
        model: the architecture.
        params: section ``quantize``.
        coding: section ``compress``.

    Raises:
        ValueError: exceptions in ``quantize.bits_of`` for matrices that do not exist.
    """
    weights = {name: weight.float().cpu() for name, weight in samples.weights.items()}
    bits, roles = choose_bits(samples.parts, params), {name: part.role for name, part in samples.parts.items()}
    coded = {name: int(kind) for name, kind in bits.items() if kind not in (FREE, FLOAT_BITS)}
    groups = _group(coded, weights, samples)
    white = Moments({first: torch.eye(weights[first].shape[1]) for first in groups}, {})
    plain = params.model_copy(update={"low_rank": params.low_rank.model_copy(update={"max_bytes": 0})})
    rounded = Quantizer(weights, Hessians(groups, white, white), coded, plain, roles=roles,
                        process=_Alone(0, 1, torch.device("cpu"))).round_clipped()
    vectors = {name: weight.half() if name in bits else truncate(weight, params.vector_mantissa_bits)
               for name, weight in weights.items() if bits.get(name, FLOAT_BITS) == FLOAT_BITS}
    matrices = {first: _join([rounded[name] for name in names]) for first, names in groups.items()}
    quantized = QuantizedModel(model.model_dump(mode="json"), Training(sequence_tokens=1), matrices, vectors)
    packed = pack(quantized, coding.codec, coding.level)
    shares = {name: samples.num_rows[name] / len(weights[name]) for name in bits}
    parts = []
    for role in sorted({roles[first] for first in groups}):
        members = {first: names for first, names in groups.items() if roles[first] == role}
        num_weights = sum(samples.num_rows[name] * weights[name].shape[1] for names in members.values() for name in names)
        num_bytes = round(sum(packed.matrix_bytes[first] * shares[first] for first in members))
        parts.append(SizeRow(role, sum(map(len, members.values())), num_weights, max(map(coded.__getitem__, members)),
                          round(8 * num_bytes / num_weights, 3), num_bytes))
    rows = sum(samples.num_rows[name] for name in coded) / max(1, sum(len(weights[name]) for name in coded))
    values = sum(vector.numel() * shares.get(name, 1) for name, vector in vectors.items()) / sum(map(Tensor.numel, vectors.values()))
    rest = len(packed.blob) - sum(packed.matrix_bytes.values()) - packed.exponents_bytes - packed.vectors_bytes
    sizes = {SCALES: round(packed.exponents_bytes * rows), VECTORS: round(packed.vectors_bytes * values), CONTAINER: rest,
             CODE: coding.code_bytes}
    if params.low_rank.max_bytes:
        sizes[LOW_RANK] = params.low_rank.max_bytes
    return [*parts, *(SizeRow(name, None, None, None, None, size) for name, size in sizes.items())]


def _group(coded: Mapping[str, int], weights: Mapping[str, Tensor], samples: Samples) -> dict[str, tuple[str, ...]]:
    """Matrices that are rounded and packed as one, so that frames of a codec are not too short: those of one role, shape and bits.

    The first of each group names it.
    """
    groups: dict[tuple[str, int, int, int], list[str]] = {}
    for name, bits in coded.items():
        groups.setdefault((samples.parts[name].role, samples.num_rows[name], weights[name].shape[1], bits), []).append(name)
    return {names[0]: tuple(names) for names in groups.values()}


def _join(matrices: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Matrices of one shape, one below the other."""
    return QuantizedTensor(torch.cat([matrix.codes for matrix in matrices]), torch.cat([matrix.row_exponents for matrix in matrices]),
                           matrices[0].column_exponents, matrices[0].bits)
