"""Published parameters and this project's: their names, what their shapes tell of the architecture, whether they fit a configuration."""

from collections.abc import Mapping
from typing import Any

import torch

from lib.artifacts.files import ArtifactError
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.published.reader import LAYER_SCALES

Shapes = Mapping[str, tuple[int, ...]]

IDENTITIES = ("bigram.proj.weight", "ve_shared.proj.weight")  # projections that the scripts leave out between equal widths
ABSENT = {"smear_per_token": False, "skip_gates": False, "attention_gate": False, "parallel_from": None}
"""Keys of parameters that the scripts have not."""
SHOWN = 5  # tensors of a model of another kind
PUBLISHED_NAMES = {
    "token_embedding.weight": "tok_emb.weight",
    "bigram.table.weight": "bigram.embed.weight",
    "bigram.projection.weight": "bigram.proj.weight",
    "bigram.scale": "bigram.scale",
    "smear_gate.gate": "smear.gate",
    "skip_weights": "skip_weights",
    "value_embedding.table.weight": "ve_shared.embed.weight",
    "value_embedding.projection.weight": "ve_shared.proj.weight",
    "value_embedding.scale": "ve_shared.scale",
    "value_embedding.layer_scales": LAYER_SCALES,
    "head.weight": "lm_head.weight",
}
PUBLISHED_NAMES_IN_BLOCKS = {
    "attention.query.weight": "attn.c_q.weight",
    "attention.key.weight": "attn.c_k.weight",
    "attention.value.weight": "attn.c_v.weight",
    "attention.output.weight": "attn.proj.weight",
    "attention.q_gain": "attn.q_gain",
    "mlp.up.weight": "mlp.fc.weight",
    "mlp.down.weight": "mlp.proj.weight",
    "attention_scale": "attn_scale",
    "mlp_scale": "mlp_scale",
    "residual_mix": "resid_mix",
}


def published_name(name: str) -> str:
    """The published name of a parameter of `GPT`."""
    if not name.startswith("blocks."):
        return PUBLISHED_NAMES[name]
    blocks, layer, rest = name.split(".", maxsplit=2)
    return f"{blocks}.{layer}.{PUBLISHED_NAMES_IN_BLOCKS[rest]}"


def infer_model(shapes: Shapes) -> dict[str, int | None]:
    """What shapes tell of the section ``model``.

    Args:
        shapes: published name -> shape.

    Returns:
        Key of `ModelParams` -> value; for ``value_embedding_layers`` only how many there are.

    Raises:
        ArtifactError: no language model of the published layout.
    """
    def size(name: str, dimension: int, num_dimensions: int = 2) -> int:
        if len(shapes.get(name, ())) != num_dimensions or not shapes[name][dimension]:
            others = [f"{other} {shape}" for other, shape in shapes.items() if other != name]
            more = f", and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
            raise ArtifactError(f"a checkpoint of another model than #585, #410 and the starting script: {name}: expected {num_dimensions} "
                                f"dimensions, none empty, found {shapes.get(name, 'nothing')}; there are "
                                f"{', '.join(others[:SHOWN]) or 'no other tensors'}{more}")
        return shapes[name][dimension]

    model_dim, num_heads = size("tok_emb.weight", 1), size("blocks.0.attn.q_gain", 0, 1)
    layers = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    inferred: dict[str, int | None] = ABSENT | {
        "vocab_size": size("tok_emb.weight", 0), "num_layers": len(layers), "model_dim": model_dim, "num_heads": num_heads,
        "num_kv_heads": size("blocks.0.attn.c_k.weight", 0) * num_heads // model_dim, "mlp_hidden_dim": size("blocks.0.mlp.fc.weight", 0),
        "smear_gate": "smear.gate" in shapes, "bigram_rows": 0, "value_embedding_dim": 0,
        "value_embedding_layers": size(LAYER_SCALES, 0, 1) if LAYER_SCALES in shapes else 0,
        "residual_mix": "blocks.0.resid_mix" in shapes,
        "tied_head": "lm_head.weight" not in shapes, "unet_skips": "skip_weights" in shapes,
    }
    if "bigram.embed.weight" in shapes:
        inferred |= {"bigram_rows": size("bigram.embed.weight", 0), "bigram_dim": size("bigram.embed.weight", 1)}
    if "ve_shared.embed.weight" in shapes:
        inferred["value_embedding_dim"] = size("ve_shared.embed.weight", 1)
    return inferred


def check_model(shapes: Shapes, model: ModelParams) -> None:
    """That parameters of these shapes are exactly those of a configuration; square `IDENTITIES` may be missing.

    Args:
        shapes: published name -> shape.
        model: section ``model``.

    Raises:
        ArtifactError: every key that contradicts the shapes; or, where none does, every name that is unknown or missing and every other
            shape.
    """
    inferred = infer_model(shapes)
    contradictions = [f"model.{key}: the file has {_name(key, value)}, found {_name(key, found)}"
                      for key, value in inferred.items() if _count(found := getattr(model, key)) != value]
    if contradictions:
        raise ArtifactError("\n".join(["the file and params.yaml contradict each other; change these keys, or take the preset of its model "
                                       "by `make preset`:", *contradictions]))
    with torch.device("meta"):
        expected = {published_name(name): tuple(parameter.shape) for name, parameter in GPT(model).named_parameters()}
    differences = [f"{name}: expected {expected.get(name, 'nothing')}, found {shapes.get(name, 'nothing')}"
                   for name in sorted(expected.keys() | shapes.keys()) if expected.get(name) != shapes.get(name)
                   and not (name in IDENTITIES and name not in shapes and len(set(expected[name])) == 1)]
    if differences:
        raise ArtifactError("\n".join(["the file does not hold the parameters of a model as params.yaml describes it:", *differences]))


def _count(value: Any) -> int:
    return len(value) if isinstance(value, tuple) else value


def _name(key: str, value: Any) -> str:
    return f"{_count(value)} layers" if key == "value_embedding_layers" else str(value)
