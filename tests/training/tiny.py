"""A model, tokens and parameters with which a whole training run takes a second."""

from pathlib import Path
from typing import Any

import numpy as np

from lib.artifacts.tokens import Split, SplitWriter, load_split
from lib.model.config import parse_model
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.params import parse_params
from lib.training.config import TrainParams
from tests.evaluation.tiny import MODEL

TRAIN: dict[str, Any] = {
    "budget_steps": 30, "budget_seconds": None, "reserve_seconds": None, "reserve_distill_seconds": None, "sequence_tokens": 8,
    "row_tokens": None, "sequence_schedule": [], "data_order": "shuffled", "batch_sequences": 4, "loop_start": 0.0,
    "micro_batch_sequences": 4, "precision": "fp32", "compile": False,
    "optimizer": {"matrix_lr": 0.02, "embedding_lr": 0.02, "vector_lr": 0.01, "head_lr": 0.01,
                  "weight_decay": {"matrix": 0.04, "embedding": 0.03, "vector": 0.02, "head": 0.01}, "cautious_decay": False,
                  "momentum": 0.95,
                  "momentum_start": 0.85, "momentum_warmup": 0.3,
                  "orthogonalization": "newton_schulz", "orthogonalization_steps": 5, "normalize_rows": "none", "row_beta": 0.9,
                  "adam_betas": [0.9, 0.95], "adam_eps": 1e-8,
                  "grad_clip": 0.3, "warmdown": 0.5, "lr_floor": 0.0},
    "averaging": {"ema_decay": 0.9, "ema_every_steps": 1, "swa_below_lr": 0.5, "swa_every_steps": 2, "select": "heldout"},
    "qat": {"below_lr": 0.4, "bits": {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 5, "value_embedding": 5, "head": 8},
            "full_range": False, "clip_quantile": 0.95, "floor": 0.0},
    "heldout_curve": None,
}


def make_params(**changes: Any) -> TrainParams:
    """Parameters with some sections or values changed; sections are merged."""
    merged = {key: {**(TRAIN[key] or {}), **value} if isinstance(value, dict) else value for key, value in changes.items()}
    return parse_params({**TRAIN, **merged}, TrainParams, "train.")


def make_model(seed: int = 0, **changes: Any) -> GPT:
    """An initialised model."""
    model = GPT(parse_model({**MODEL, **changes}, "model."))
    initialize(model, seed)
    return model


def make_split(folder: Path, num_tokens: int = 600) -> Split:
    """Tokens that can be learned: each follows its predecessor by one of two steps."""
    steps = np.random.default_rng(0).integers(1, 3, num_tokens)
    writer = SplitWriter(folder, MODEL["vocab_size"], shard_tokens=400)
    writer.add((np.cumsum(steps) % MODEL["vocab_size"]).astype(np.uint16), num_tokens, num_tokens)
    writer.close()
    return load_split(folder, MODEL["vocab_size"])
