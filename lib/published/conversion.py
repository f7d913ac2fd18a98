"""From a published file to what train or quantize would have handed over.

The published scripts rotate queries and keys by minus the angle that lib/model/attention.py rotates them by. A rotation the other way
is the same with the second dimension of each pair negated, so that these rows of the query and key matrices change their sign here. Their
products, and thus the attention, stay the same to the last bit.

Shapes: R rows, C columns.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint, Training
from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import METRICS_FILE
from lib.artifacts.paths import stage_folder
from lib.artifacts.quantized import MAX_BITS, MIN_BITS, QuantizedModel, QuantizedTensor, clip_range
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.params import PARAMS_FILE, ParamsError
from lib.published.layout import check_model, published_name
from lib.published.reader import Published


def check_seed(published: Published, seed: int, seeds: Sequence[int]) -> None:
    """That a file can become outputs of a seed.

    Args:
        published: the file.
        seed: the seed whose outputs it will be.
        seeds: those of params.yaml, which the pipeline has stages for.

    Raises:
        ParamsError: not one of `seeds`.
        ArtifactError: an artifact for a seed that has a model of its own, so that results of two models would stand side by side.
    """
    if seed not in seeds:
        raise ParamsError(f"{PARAMS_FILE}: seeds: expected {seed} among them, found {seeds}; set seeds: [{seed}]")
    folder = stage_folder("train", seed)
    if published.is_quantized and (folder / METRICS_FILE).exists():
        raise ArtifactError(f"{folder}: expected no trained model for the seed of an artifact, whose results would be taken for that "
                            "model's; take a seed that was not used and set seeds: [it]")


def convert_checkpoint(published: Published, model: ModelParams, sequence_tokens: int) -> Checkpoint:
    """A float checkpoint in place of a trained one; values are those of the file, as fp32.

    Args:
        published: a float checkpoint.
        model: section ``model``.
        sequence_tokens: length of the sequences that it was trained with, as later stages use them.

    Raises:
        ArtifactError: the file does not fit `model`, as `check_model` says.
    """
    weights = {name: torch.eye(size) if source is None else _turn(name, published.floats[source].to(torch.float32), model)
               for name, source, size in _sources(published, model)}
    return Checkpoint(weights, model.model_dump(mode="json"), _training(published, sequence_tokens))


def convert_artifact(published: Published, model: ModelParams, sequence_tokens: int) -> QuantizedModel:
    """An artifact in place of a quantized model: the published codes, scales and floats, and thus the published weights, bit for bit.

    Codes get as many bits as a symmetric grid needs to hold them, None if it is more than `MAX_BITS`.

    Args, Raises:
        As `convert_checkpoint`.
    """
    matrices: dict[str, QuantizedTensor] = {}
    vectors: dict[str, Tensor] = {}
    for name, source, size in _sources(published, model):
        if source is None:
            matrices[name] = _make_matrix(torch.eye(size, dtype=torch.int16))
            continue
        if source in published.floats:
            tensor = published.floats[source]
            vectors[name] = _turn(name, tensor if tensor.dtype == torch.float16 else tensor.to(torch.float32), model)
            continue
        codes, scales = published.codes[source]
        matrices[name] = replace(_make_matrix(_turn(name, codes.to(torch.int16), model)), row_scales=scales)
    return QuantizedModel(model.model_dump(mode="json"), _training(published, sequence_tokens), matrices, vectors)


def describe_origin(published: Published) -> dict[str, Any]:
    """Figures that say where a model comes from, for metrics and metadata."""
    return {"imported": published.name, "imported_bytes": published.num_bytes, "imported_sha256": published.sha256}


def _sources(published: Published, model: ModelParams) -> list[tuple[str, str | None, int]]:
    """Name of every parameter, its published name or None for an identity that the file leaves out, and its rows."""
    shapes = published.shapes
    try:
        check_model(shapes, model)
    except ArtifactError as error:
        raise ArtifactError(f"{published.name}: {error}") from None
    with torch.device("meta"):
        parameters = dict(GPT(model).named_parameters())
    return [(name, source if (source := published_name(name)) in shapes else None, len(parameter) if parameter.ndim else 1)
            for name, parameter in parameters.items()]


def _make_matrix(codes: Tensor) -> QuantizedTensor:
    """`codes` (R, C) int16 with steps of 1."""
    bits = next((bits for bits in range(MIN_BITS, MAX_BITS + 1) if int(codes.abs().max()) <= clip_range(bits)), None)
    rows, columns = (torch.zeros(size, dtype=torch.int16) for size in codes.shape)
    return QuantizedTensor(codes, rows, columns, bits)


def _training(published: Published, sequence_tokens: int) -> Training:
    return Training(sequence_tokens=sequence_tokens, **describe_origin(published))


def _turn(name: str, weight: Tensor, model: ModelParams) -> Tensor:
    """`weight` (R, C), with the sign of the second rotated half of each head's rows changed if it makes queries or keys."""
    if not name.endswith(("attention.query.weight", "attention.key.weight")):
        return weight
    signs = torch.ones(len(weight) // model.head_dim, model.head_dim, dtype=weight.dtype)
    signs[:, model.rope_dims // 2:model.rope_dims] = -1
    return weight * signs.flatten()[:, None]
