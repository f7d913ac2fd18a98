"""Calibrate: checkpoint, train shards -> second moments of the inputs and output gradients of all matrices."""

import time

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.hessians import Hessians, save_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import load_split
from lib.audit.isolation import withhold_validation
from lib.calibration.config import CalibrateParams
from lib.calibration.moments import check_reserve, collect_moments, draw_sequences
from lib.calibration.sums import matrix_inputs
from lib.distributed import start_process
from lib.model.gpt import build_model
from lib.model.parts import parts_of
from lib.params import load_params, parse_seed


def main(seed: int) -> None:
    """Run the stage for one seed."""
    checkpoint_path = stage_folder("train", seed) / "checkpoint.safetensors"
    with start_process() as process:
        params, folder = load_params("calibrate", CalibrateParams), stage_folder("calibrate", seed)
        checkpoint = load_checkpoint(checkpoint_path)
        model = build_model(checkpoint.model, checkpoint.weights).to(process.device)
        split = load_split(TOKENIZE_FOLDER / "train", model.params.vocab_size)
        start = time.monotonic()  # what training itself would have had to do: the model is there, the processes are connected
        sequences = draw_sequences(split, params.num_sequences, checkpoint.training["sequence_tokens"], seed)
        moments = [collect_moments(model, model.logits, tokens, num_gradient_sequences=params.num_gradient_sequences,
                                   batch_sequences=params.batch_sequences, precision=params.precision, seed=seed, process=process,
                                   description=name)
                   for name, tokens in zip(("calibrate", "verify"), sequences, strict=True)]
        seconds, = process.max(time.monotonic() - start)
        check_reserve(seconds, checkpoint.training["calibration_seconds"])
        if process.is_main:
            save_hessians(folder / "hessians.safetensors", Hessians(matrix_inputs(parts_of(model)), *moments), checkpoint_path)
            metrics = {"num_tokens": sequences[0].numel(), "num_hessians": len(moments[0].hessians)}
            save_metrics(folder, metrics, {"seconds": seconds})


if __name__ == "__main__":
    withhold_validation("calibrate", seed := parse_seed(__doc__))
    main(seed)
