"""A model, tokens and parameters small enough to check by brute force."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.evaluation.config import EvaluateParams
from lib.evaluation.score import load_stream
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.params import parse_params

MODEL: dict[str, Any] = {
    "vocab_size": 32, "num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 24, "rope_dims": 4,
    "rope_base": 10000.0, "rope_trained_tokens": 8, "q_gain_init": 1.5, "num_xsa_layers": 1, "smear_gate": True, "bigram_rows": 16,
    "bigram_dim": 4, "value_embedding_dim": 4, "value_embedding_layers": [1, 2], "unet_skips": True, "residual_mix": True,
    "ln_scale": True, "tied_head": True, "logit_softcap": 30.0, "embedding_init_std": 0.005,
}
EVALUATE: dict[str, Any] = {
    "strategies": ["plain", "sliding", "score_first"], "window_tokens": 8, "stride_tokens": 2, "batch_windows": 4, "precision": "fp32",
    "limit_seconds": 60.0,
    "score_first": {"chunk_tokens": 16, "epochs": 2, "lr": 0.01, "lr_schedule": "cosine", "optimizer": "adamw", "momentum": 0.9,
                    "weight_decay": 0.01, "grad_clip": 1.0, "batch_sequences": 2, "trainable": ["last_1_blocks", "scales"]},
}


def make_params(score_first: dict[str, Any] | None = None, **changes: Any) -> EvaluateParams:
    return parse_params(EVALUATE | changes | {"score_first": EVALUATE["score_first"] | (score_first or {})}, EvaluateParams, "evaluate.")


def make_model(**changes: Any) -> GPT:
    """Every parameter random and large enough to matter."""
    model = GPT(parse_params(MODEL | changes, ModelParams, "model."))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def make_tokens(num_targets: int, seed: int = 0) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(seed).integers(0, MODEL["vocab_size"], num_targets + 1).astype(np.uint16)


def make_stream(num_targets: int, seed: int = 0) -> Tensor:
    return load_stream(make_tokens(num_targets, seed), torch.device("cpu"))
