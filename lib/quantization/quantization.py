"""The whole quantization of a checkpoint: integer codes, and distillation on the training text if there is to be any."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.tokens import Split
from lib.data.loader import Loader
from lib.distributed import Process
from lib.model.gpt import build_model, outline
from lib.model.parts import parts_of
from lib.quantization.config import QuantizeParams
from lib.quantization.distillation import Distilled, distill
from lib.quantization.policy import quantize_model

FINGERPRINT_TOKENS = 1024  # of each shard


def quantize(checkpoint: Checkpoint, hessians: Hessians, params: QuantizeParams, text: Callable[[], Split], *, seed: int, process: Process,
             measure: Callable[[QuantizedModel], int], folder: Path | None = None) -> tuple[Distilled, dict[str, float]]:
    """Quantize a checkpoint of `lib.model.gpt.GPT`.

    Args:
        checkpoint: not changed.
        hessians: second moments of the same model.
        params: section ``quantize``.
        text: reads the training tokens; not called without steps of distillation.
        seed: order of the text.
        process: every process calls this and gets the whole result.
        measure: size of code and artifact in bytes with a model; called by the main process alone.
        folder: place of the state of an unfinished distillation; None where there is to be none.

    Returns:
        The result, without metrics, timing and state where nothing was distilled; and the dampings as of `quantize_model`.

    Raises:
        UserError: errors of `quantize_model`, `distill` and `Loader`.
        SystemExit: interrupted.
    """
    round_weights = partial(quantize_model, checkpoint, parts_of(outline(checkpoint.model)), hessians, process=process, measure=measure)
    start, dampings = round_weights(params)
    if not params.distill.steps:
        return Distilled(start, {}, {}, None), dampings
    tokens, model = text(), build_model(checkpoint.model, checkpoint.weights).to(process.device)
    loader = Loader(tokens, checkpoint.training.sequence_tokens, params.distill.batch_sequences, seed)
    return distill(model, model.logits, lambda step: loader.batch(step, process)[:, :-1], start, params, process=process, measure=measure,
                   undistilled=lambda: round_weights(params.undistilled)[0], folder=folder, data=f"{seed} {fingerprint(tokens)}"), dampings


def fingerprint(text: Split) -> str:
    """Tells texts apart: a hash of how long the shards are and how they end."""
    ends = [[len(shard), shard[-FINGERPRINT_TOKENS:].tolist()] for shard in text.shards]
    return hashlib.sha256(json.dumps(ends).encode()).hexdigest()
