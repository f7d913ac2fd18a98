"""A model, tokens and parameters small enough to check by brute force."""

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Text
from lib.evaluation.job import Job
from lib.evaluation.limit import TimeLimit
from lib.evaluation.score import Forward, load_stream
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.tilt import Tilt
from lib.evaluation.windows import find_documents
from lib.model.config import NEUTRAL, parse_model
from lib.model.gpt import GPT
from lib.params import parse_params

MODEL: dict[str, Any] = NEUTRAL | {
    "vocab_size": 32, "num_layers": 3, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 24, "rope_dims": 4,
    "rope_base": 10000.0, "rope_trained_tokens": 8, "q_gain_init": 1.5, "num_xsa_layers": 1, "smear_gate": True, "bigram_rows": 16,
    "bigram_dim": 4, "value_embedding_dim": 4, "value_embedding_layers": [1, 2], "unet_skips": True, "residual_mix": True,
    "ln_scale": True, "tied_head": True, "logit_softcap": 30.0, "embedding_init_std": 0.005,
}
FRONTIER: dict[str, Any] = {
    "mlp_negative_slope": 0.5, "smear_per_token": True, "skip_gates": True, "attention_gate": True, "parallel_from": 2,
    "loop": {"first": 0, "last": 1, "passes": 2}}
"""What changes with the options of #1855."""
ADAPTATION: dict[str, Any] = {
    "epochs": 2, "lr": 0.01, "lr_schedule": "cosine", "optimizer": "adamw", "momentum": 0.9, "weight_decay": 0.01, "grad_clip": 1.0,
    "batch_sequences": 2, "trainable": ["last_1_blocks", "scales"]}
STRATEGIES: tuple[StrategyName, ...] = get_args(StrategyName)
EVALUATE: dict[str, Any] = {
    "strategies": list(STRATEGIES), "strategy": "score_first", "window_tokens": 8, "stride_tokens": 2, "segment_tokens": 16,
    "batch_tokens": 32, "precision": "fp32", "compile": False, "limit_seconds": 3600.0, "when_late": "fail", "audit": True, "tilt": None,
    "score_first": ADAPTATION | {"windows": "sliding", "chunk_tokens": 16},
    "lora": {"rank": 2, "alpha": None, "layers": ["query", "value", "head"], "window_tokens": 8, "chunk_tokens": 4, "steps": 1, "lr": 0.01,
             "adam_betas": [0.9, 0.95], "adam_eps": 1e-8, "weight_decay": 0.0, "warm_start": None, "batch_documents": 2},
    "phased": ADAPTATION | {"documents": 2, "boundaries": None},
    "two_phase": {"recalibration": ADAPTATION | {"drop_last": False, "trainable": ["block_scales", "residual_mix"]},
                  "selective": ADAPTATION | {"drop_last": False, "optimizer": "sgd"}},
}
BOS = 1


def merge(old: Any, new: Any) -> Any:
    return {**(old or {}), **{key: merge((old or {}).get(key), value) for key, value in new.items()}} if isinstance(new, dict) else new


def make_params(**changes: Any) -> EvaluateParams:
    """The section ``evaluate`` with some keys changed, nested ones too: ``make_params(score_first={"epochs": 1})``."""
    return parse_params(merge(EVALUATE, changes), EvaluateParams, "evaluate.")


def make_model(**changes: Any) -> GPT:
    """Every parameter random and large enough to matter."""
    model = GPT(parse_model(MODEL | changes, "model."))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def make_tokens(num_targets: int, seed: int = 0, starts: Sequence[int] = (0,)) -> npt.NDArray[np.uint16]:
    """Random tokens, with BOS where documents start and nowhere else."""
    tokens = np.random.default_rng(seed).integers(BOS + 1, MODEL["vocab_size"], num_targets + 1).astype(np.uint16)
    tokens[list(starts)] = BOS
    return tokens


def make_stream(num_targets: int, seed: int = 0, starts: Sequence[int] = (0,)) -> Tensor:
    return load_stream(make_tokens(num_targets, seed, starts), torch.device("cpu"))


def make_text(tokens: npt.NDArray[np.uint16]) -> Text:
    """Every target stands for one byte."""
    return Text.of(tokens, np.ones(len(tokens) - 1, np.int64), BOS)


def make_job(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams, process: Process = SINGLE_CPU, *,
             wants_last: bool = False) -> Job:
    """A job with a clock that already runs; nothing limits it but ``limit_seconds``."""
    limit = TimeLimit(params.limit_seconds, process)
    limit.plan(10**9)
    stream = load_stream(tokens, process.device)
    sheet = ScoreSheet(len(tokens) - 1, process.device, tilt=Tilt.of(stream, params.tilt), wanted=len(tokens) - 2 if wants_last else None)
    return Job(Forward(model, params.precision), stream, find_documents(tokens, BOS), params, process, limit, sheet)
