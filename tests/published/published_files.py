"""Files as the published scripts save them: names and layout written out by hand, sharing nothing with lib/published."""

import io
import re
from pathlib import Path
from typing import Any

import torch
import zstandard
from torch import Tensor

from tests.evaluation.tiny import MODEL

State = dict[str, Tensor]
STARTING_SCRIPT: dict[str, Any] = {  # what the challenge's starting script has not; it rotates whole heads
    "smear_gate": False, "bigram_rows": 0, "value_embedding_dim": 0, "value_embedding_layers": [], "num_xsa_layers": 0, "ln_scale": False,
    "rope_dims": 8}


def make_state(model: dict[str, Any] = MODEL, seed: int = 0) -> State:
    """Random parameters of a published model of this configuration."""
    dim, vocab, hidden, heads = (model[key] for key in ("model_dim", "vocab_size", "mlp_hidden_dim", "num_heads"))
    kv_dim = dim // heads * model["num_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"tok_emb.weight": (vocab, dim)}
    if model["bigram_rows"]:
        shapes |= {"bigram.embed.weight": (model["bigram_rows"], model["bigram_dim"]), "bigram.proj.weight": (dim, model["bigram_dim"]),
                   "bigram.scale": ()}
    if model["smear_gate"]:
        shapes["smear.gate"] = (dim,)
    if model["unet_skips"]:
        shapes["skip_weights"] = (model["num_layers"] // 2, dim)
    for layer in range(model["num_layers"]):
        block = f"blocks.{layer}."
        shapes |= {
            block + "attn.c_q.weight": (dim, dim), block + "attn.c_k.weight": (kv_dim, dim), block + "attn.c_v.weight": (kv_dim, dim),
            block + "attn.proj.weight": (dim, dim), block + "attn.q_gain": (heads,), block + "mlp.fc.weight": (hidden, dim),
            block + "mlp.proj.weight": (dim, hidden), block + "attn_scale": (dim,), block + "mlp_scale": (dim,)}
        if model["residual_mix"]:
            shapes[block + "resid_mix"] = (2, dim)
    if model["value_embedding_dim"]:
        shapes |= {"ve_shared.embed.weight": (vocab, model["value_embedding_dim"]),
                   "ve_shared.proj.weight": (kv_dim, model["value_embedding_dim"]), "ve_shared.scale": ()}
        shapes |= {f"ve_layer_scales.{number}": (1,) for number in range(len(model["value_embedding_layers"]))}
    if not model["tied_head"]:
        shapes["lm_head.weight"] = (vocab, dim)
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def quantize_state(state: State, keep: int = 40) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and kinds of an artifact; parameters of at most `keep` values stay fp16."""
    tensors: dict[str, Tensor] = {}
    kinds: dict[str, Any] = {}
    for name, value in state.items():
        if value.numel() <= keep:
            tensors[name], kinds[name] = value.half(), "passthrough"
        elif name.endswith(("resid_mix", "skip_weights")):
            tensors[name], kinds[name] = value.float(), "passthrough_ctrl"
        elif name.startswith("ve_shared.embed"):
            tensors[name], kinds[name] = value.half(), "passthrough_fp16"
        else:
            limit = 15 if ".mlp." in name or ".attn." in name else 127
            scale = (value.float().abs().amax(1) / limit).half()
            tensors[name + ".q"] = (value / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
            tensors[name + ".scale"], kinds[name] = scale, {"type": "int6" if limit == 15 else "int8"}
    return tensors, kinds


def quantize_int8(state: State, keep: int = 40) -> dict[str, Any]:
    """What the challenge's starting script saves: int8 codes, an fp16 scale for each row; controls in fp32, other small tensors in fp16."""
    saved: dict[str, Any] = {"quantized": {}, "scales": {}, "dtypes": {}, "passthrough": {}, "qmeta": {}, "passthrough_orig_dtypes": {}}
    for name, value in state.items():
        if name.endswith(("attn_scale", "mlp_scale", "resid_mix", "q_gain", "skip_weights")):
            saved["passthrough"][name] = value.float()
        elif value.numel() <= keep:
            saved["passthrough"][name], saved["passthrough_orig_dtypes"][name] = value.half(), "float32"
        else:
            scale = (value.float().abs().amax(1) / 127).clamp(min=1 / 127)
            saved["quantized"][name] = (value / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
            saved["scales"][name], saved["dtypes"][name], saved["qmeta"][name] = scale.half(), "float32", {"scheme": "per_row", "axis": 0}
    return {"__quant_format__": "int8_clean_per_row_v1"} | saved


def dequantize_int8(saved: dict[str, Any]) -> State:
    """The weights that the starting script evaluates, before it rounds them to their type, fp32."""
    return {name: tensor.float() for name, tensor in saved["passthrough"].items()} | {
        name: codes.float() * saved["scales"][name].float()[:, None] for name, codes in saved["quantized"].items()}


def dequantize(tensors: dict[str, Tensor], kinds: dict[str, Any]) -> State:
    """The weights that the published scripts evaluate, fp32."""
    return {name: tensors[name].float() if isinstance(kind, str) else
            tensors[name + ".q"].float() * tensors[name + ".scale"].float()[:, None] for name, kind in kinds.items()}


RENAMED = (
    ("tok_emb", "token_embedding"), ("bigram.embed", "bigram.table"), ("bigram.proj", "bigram.projection"),
    ("smear.gate", "smear_gate.gate"), ("ve_shared.embed", "value_embedding.table"), ("ve_shared.proj", "value_embedding.projection"),
    ("ve_shared.scale", "value_embedding.scale"), ("lm_head", "head"), ("attn.c_q", "attention.query"), ("attn.c_k", "attention.key"),
    ("attn.c_v", "attention.value"), ("attn.proj", "attention.output"), ("attn.q_gain", "attention.q_gain"), ("mlp.fc", "mlp.up"),
    ("mlp.proj", "mlp.down"), ("attn_scale", "attention_scale"), ("resid_mix", "residual_mix"))


def rename(state: State) -> State:
    """Parameters by this project's names, values as they are."""
    renamed = {}
    for name, tensor in state.items():
        for published, own in RENAMED:
            if name.startswith(f"{published}.") or re.search(rf"(^|\.){re.escape(published)}(\.|$)", name):
                renamed[name.replace(published, own)] = tensor
                break
        else:
            renamed[name] = tensor
    scales = [renamed.pop(name) for name in sorted(renamed) if name.startswith("ve_layer_scales")]
    return renamed | ({"value_embedding.layer_scales": torch.cat(scales)} if scales else {})


def to_project(state: State, model: dict[str, Any]) -> State:
    """Parameters of this project's model: of each rotated pair in queries and keys the second dimension negated."""
    head_dim, half = model["model_dim"] // model["num_heads"], model["rope_dims"] // 2
    weights = {name: weight.clone() for name, weight in rename(state).items()}
    for name, weight in weights.items():
        if name.endswith(("query.weight", "key.weight")):
            weight.view(-1, head_dim, model["model_dim"])[:, half:2 * half] *= -1
    return weights


def to_bytes(value: Any, **options: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def to_artifact(tensors: Any, kinds: Any) -> bytes:
    """A ``.ptz`` of the published layout."""
    return zstandard.ZstdCompressor(level=22).compress(to_bytes({"w": tensors, "m": kinds}))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


