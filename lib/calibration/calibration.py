"""The whole calibration of a checkpoint: second moments of all its matrices, on time."""

import time
from typing import NamedTuple

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians
from lib.artifacts.tokens import Split
from lib.calibration.config import CalibrateParams
from lib.calibration.moments import check_reserve, collect_moments, draw_sequences
from lib.calibration.sums import matrix_inputs
from lib.distributed import Process
from lib.model.gpt import build_model
from lib.model.parts import parts_of


class Calibration(NamedTuple):
    """Second moments, figures that depend on the inputs alone, and what a clock measured."""

    hessians: Hessians
    metrics: dict[str, int]
    timing: dict[str, float]


def calibrate(checkpoint: Checkpoint, text: Split, params: CalibrateParams, seed: int, process: Process) -> Calibration:
    """Measure what an error in each matrix costs.

    Args:
        checkpoint: not changed.
        text: the training tokens.
        params: the section ``calibrate``.
        seed: decides the sequences and the labels that are drawn from the model.
        process: every process calls this and gets the whole result.

    Raises:
        UserError: too few sequences, or it took longer than training has left for it.
    """
    model = build_model(checkpoint.model, checkpoint.weights).to(process.device)
    start = time.monotonic()  # what training itself would have had to do: the model is there, the processes are connected
    sequences = draw_sequences(text, params.num_sequences, checkpoint.training.sequence_tokens, seed)
    moments = [collect_moments(model, model.logits, tokens, num_gradient_sequences=params.num_gradient_sequences,
                               batch_sequences=params.batch_sequences, precision=params.precision, seed=seed, process=process,
                               description=name, with_outputs=name == "calibrate")
               for name, tokens in zip(("calibrate", "verify"), sequences, strict=True)]
    seconds, = process.max(time.monotonic() - start)
    check_reserve(seconds, checkpoint.training.calibration_seconds)
    return Calibration(Hessians(matrix_inputs(parts_of(model)), *moments),
                       {"num_tokens": sequences[0].numel(), "num_hessians": len(moments[0].hessians)}, {"seconds": seconds})
