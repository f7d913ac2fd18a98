"""Calibrate: checkpoint, train shards -> input Hessians of all linear layers."""

import time

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.hessians import Hessians, save_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import load_split
from lib.distributed import start_process
from lib.model.gpt import build_model
from lib.params import load_params, parse_seed
from lib.quantization.config import CalibrateParams
from lib.quantization.hessian import collect_hessians, draw_sequences


def main(seed: int) -> None:
    """Run the stage for one seed."""
    params, folder, start = load_params("calibrate", CalibrateParams), stage_folder("calibrate", seed), time.monotonic()
    with start_process() as process:
        checkpoint = load_checkpoint(stage_folder("train", seed) / "checkpoint.safetensors")
        model = build_model(checkpoint.model, checkpoint.weights).to(process.device)
        split = load_split(TOKENIZE_FOLDER / "train", model.params.vocab_size)
        sequences = draw_sequences(split, params.num_sequences, checkpoint.training["sequence_tokens"], seed)
        calibration, verification = (collect_hessians(model, tokens, params.batch_sequences, process.device, name)
                                     for name, tokens in zip(("calibrate", "verify"), sequences, strict=True))
    save_hessians(folder / "hessians.safetensors", Hessians(model.linear_inputs(), calibration, verification))
    save_metrics(folder, {"num_tokens": sequences[0].numel(), "num_hessians": len(calibration)}, {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    main(parse_seed(__doc__))
