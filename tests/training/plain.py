"""Training of pr585 and pr410 as plain functions in float64, one head and one matrix at a time: values that `lib.training` must give.

Written from the description of the two systems, and sharing no code with the project. A model is a dictionary of tensors by
name; settings are the sections ``model`` and ``train`` of a preset as plain data.

Shapes: B batch, T tokens, D model, E head, V vocabulary, R rows, C columns.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Settings = dict[str, Any]
Weights = dict[str, Tensor]

RMS_EPSILON = 2.0**-23  # of fp32, which RMSNorm adds where no other is given


def rms(x: Tensor) -> Tensor:
    """Divided by the root of the mean square over the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + RMS_EPSILON).sqrt()


def rope(x: Tensor, dims: int, base: float) -> Tensor:
    """Turn the pair of dimensions i and i + dims/2 of `x` (B, T, E), as a complex number, by the angle t * base^(-2i/dims)."""
    half = dims // 2
    angles = torch.outer(torch.arange(x.shape[1], dtype=x.dtype), base ** (-2 / dims * torch.arange(half, dtype=x.dtype)))
    turned = torch.complex(x[:, :, :half], x[:, :, half:dims]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, x[:, :, dims:]), -1)


def attention(w: Weights, name: str, x: Tensor, *, added_value: Tensor | float, hidden: Tensor, model: Settings, exclusive: bool) -> Tensor:
    """Attention of one layer, head by head: (B, T, D) -> (B, T, D), where (B, T, T) `hidden` says what each position does not see."""
    size = model["model_dim"] // model["num_heads"]
    q, k, v = (x @ w[f"{name}.{part}.weight"].T for part in ("query", "key", "value"))
    v = v + added_value
    heads = []
    for head in range(model["num_heads"]):
        shared = head * model["num_kv_heads"] // model["num_heads"]
        q_head = q[:, :, head * size:(head + 1) * size]
        k_head, v_head = (part[:, :, shared * size:(shared + 1) * size] for part in (k, v))
        q_head, k_head = (rope(rms(part), model["rope_dims"], model["rope_base"]) for part in (q_head, k_head))
        scores = w[f"{name}.q_gain"][head] * q_head @ k_head.mT / math.sqrt(size)  # (B, T, T)
        y = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v_head
        if exclusive:
            y = y - (y * v_head).sum(-1, keepdim=True) / (v_head * v_head).sum(-1, keepdim=True) * v_head
        heads.append(y)
    return torch.cat(heads, -1) @ w[f"{name}.output.weight"].T


def mean_loss(w: Weights, sequences: Tensor, model: Settings) -> Tensor:
    """Mean cross-entropy in nats of each token of `sequences` (B, T + 1) given those before it."""
    tokens, targets = sequences[:, :-1], sequences[:, 1:]
    num_tokens = tokens.shape[1]
    is_first = (tokens == model["bos_id"]) & model["document_mask"]
    is_first[:, 0] = True
    document = is_first.cumsum(1)
    hidden = torch.ones(num_tokens, num_tokens).triu(1).bool() | (document[:, :, None] != document[:, None])

    pairs = torch.cat((tokens[:, :1], 36313 * tokens[:, 1:] ^ 27191 * tokens[:, :-1]), 1) % (model["bigram_rows"] - 1)
    pairs[is_first] = model["bigram_rows"] - 1
    x = w["token_embedding.weight"][tokens]
    x = rms(x + w["bigram.scale"] * (w["bigram.table.weight"][pairs] @ w["bigram.projection.weight"].T))
    gate, previous = torch.sigmoid(w["smear_gate.gate"]), x.roll(1, 1)
    previous[is_first] = 0
    x = x0 = (1 - gate) * x + gate * previous

    outputs: list[Tensor] = []
    half = model["num_layers"] // 2
    for layer in range(model["num_layers"]):
        if half <= layer < 2 * half:
            x = x + w["skip_weights"][layer - half] * outputs[2 * half - 1 - layer]
        name = f"blocks.{layer}"
        norm_scale = 1 / math.sqrt(layer + 1) if model["ln_scale"] else 1.0
        added_value: Tensor | float = 0.0
        if layer in model["value_embedding_layers"]:
            scale = w["value_embedding.scale"] * w["value_embedding.layer_scales"][model["value_embedding_layers"].index(layer)]
            added_value = scale * w["value_embedding.table.weight"][tokens] @ w["value_embedding.projection.weight"].T
        x = w[f"{name}.residual_mix"][0] * x + w[f"{name}.residual_mix"][1] * x0
        y = attention(w, f"{name}.attention", norm_scale * rms(x), added_value=added_value, hidden=hidden, model=model,
                      exclusive=layer >= model["num_layers"] - model["num_xsa_layers"])
        x = x + w[f"{name}.attention_scale"] * y
        active = (norm_scale * rms(x) @ w[f"{name}.mlp.up.weight"].T).clamp(min=0) ** 2
        x = x + w[f"{name}.mlp_scale"] * (active @ w[f"{name}.mlp.down.weight"].T)
        outputs.append(x)

    head = w["token_embedding.weight"] if model["tied_head"] else w["head.weight"]
    logits = model["logit_softcap"] * torch.tanh(rms(x) @ head.T / model["logit_softcap"])  # (B, T, V)
    return (logits.logsumexp(-1) - logits.gather(-1, targets[:, :, None])[:, :, 0]).mean()


def group_of(name: str) -> str:
    """The group of a parameter, whose learning rate is ``<group>_lr``."""
    if name == "head.weight":
        return "head"
    if name in ("token_embedding.weight", "bigram.table.weight", "value_embedding.table.weight"):
        return "embedding"
    return "matrix" if name.endswith((".query.weight", ".key.weight", ".value.weight", ".output.weight", ".up.weight", ".down.weight",
                                      ".projection.weight")) else "vector"


def bits_of(name: str, qat: Settings) -> int | None:
    """Bits of the grid that a parameter is trained for, None for vectors."""
    if group_of(name) == "vector":
        return None
    roles = [role for role in ("attention", "mlp", "bigram", "value_embedding", "head") if role in name.split(".")]
    bits = int(qat["bits"][roles[0] if roles else "embedding"])
    return None if bits == 16 else bits


def quantize(weight: Tensor, bits: int, qat: Settings) -> Tensor:
    """Each row of (R, C) on the grid -c .. c, or -c - 1 .. c, times its scale to 1/64 octave; no row reaches less far than the floor."""
    limit = 2 ** (bits - 1) - 1
    scales = (torch.quantile(weight.abs(), qat["clip_quantile"], dim=1).clamp(min=qat["floor"]) / limit).clamp(min=2.0**-24)
    rounded = 2 ** ((64 * scales.log2()).round() / 64)[:, None]
    return (weight / rounded).round().clamp(-limit - qat["full_range"], limit) * rounded


def newton_schulz(gradient: Tensor, num_steps: int) -> Tensor:
    """The matrix (R, C) divided by its Frobenius norm, its singular values s mapped to 3.4445 s - 4.775 s^3 + 2.0315 s^5 each step."""
    norm = gradient.square().sum().sqrt()
    if norm == 0:
        return gradient
    x = gradient / norm
    for _ in range(num_steps):
        cubed = x @ x.T @ x
        x = 3.4445 * x - 4.7750 * cubed + 2.0315 * (x @ x.T @ cubed)
    return x


@dataclass
class Trajectory:
    """A run: by step its loss, learning-rate multiplier and momentum; at the end its weights and their averages."""

    losses: list[float]
    multipliers: list[float]
    momenta: list[float]
    raw: Weights
    ema: Weights
    swa: Weights


def train_plainly(start: Weights, batches: Sequence[Tensor], model: Settings, train: Settings) -> Trajectory:
    """One optimizer step on each batch (B, T + 1), from `start` (float64)."""
    settings, averaging, qat = train["optimizer"], train["averaging"], train["qat"]
    beta1, beta2 = settings["adam_betas"]
    w = {name: weight.clone() for name, weight in start.items()}
    first, second = ({name: torch.zeros_like(weight) for name, weight in start.items()} for _ in range(2))
    ema = {name: weight.clone() for name, weight in start.items()}
    snapshots: list[Weights] = []
    losses, multipliers, momenta = [], [], []
    for k, sequences in enumerate(batches):
        fraction = k / len(batches)
        multiplier = 1.0 if fraction < 1 - settings["warmdown"] else (1 - fraction) / settings["warmdown"]
        warmth = min(fraction / settings["momentum_warmup"], 1.0)
        momentum = (1 - warmth) * settings["momentum_start"] + warmth * settings["momentum"]

        used = {name: weight.clone() for name, weight in w.items()}
        if multiplier < qat["below_lr"]:
            used |= {name: quantize(w[name], bits, qat) for name in w if (bits := bits_of(name, qat))}
        for weight in used.values():
            weight.requires_grad_()
        loss = mean_loss(used, sequences, model)
        gradients = dict(zip(used, torch.autograd.grad(loss, list(used.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        factor = min(1.0, settings["grad_clip"] / norm)

        for name, weight in w.items():
            gradient = factor * gradients[name]
            lr = multiplier * settings[f"{group_of(name)}_lr"]
            if group_of(name) == "matrix":
                first[name] = momentum * first[name] + gradient
                update = newton_schulz(gradient + momentum * first[name], settings["orthogonalization_steps"])
                update = update * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
            else:
                first[name] = beta1 * first[name] + (1 - beta1) * gradient
                second[name] = beta2 * second[name] + (1 - beta2) * gradient.square()
                mean, square = first[name] / (1 - beta1 ** (k + 1)), second[name] / (1 - beta2 ** (k + 1))
                update = mean / (square.sqrt() + settings["adam_eps"])
            w[name] = weight - lr * settings["weight_decay"][group_of(name)] * weight - lr * update

        if (k + 1) % averaging["ema_every_steps"] == 0:
            ema = {name: averaging["ema_decay"] * ema[name] + (1 - averaging["ema_decay"]) * w[name] for name in w}
        if multiplier < averaging["swa_below_lr"] and (k + 1) % averaging["swa_every_steps"] == 0:
            snapshots.append(dict(w))
        losses.append(float(loss.detach()))
        multipliers.append(multiplier)
        momenta.append(momentum)
    swa = {name: torch.stack([snapshot[name] for snapshot in snapshots]).mean(0) for name in w}
    return Trajectory(losses, multipliers, momenta, w, ema, swa)
