"""Quantize: checkpoint, Hessians, held-out shards, tokenizer -> integer codes and scales, errors of every tensor."""

import time
from dataclasses import astuple, fields

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.files import write_csv
from lib.artifacts.hessians import load_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import save_quantized
from lib.artifacts.tokens import load_split
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.heldout import score_heldout
from lib.model.gpt import build_model
from lib.params import load_params, parse_seed
from lib.progress import say
from lib.quantization.config import QuantizeParams
from lib.quantization.policy import TensorRow, list_grid_differences, quantize_model, summarize

BATCH_WINDOWS = 16  # changes speed, not results


def main(seed: int) -> None:
    """Run the stage for one seed."""
    params, folder, start = load_params("quantize", QuantizeParams), stage_folder("quantize", seed), time.monotonic()
    with start_process() as process:
        checkpoint = load_checkpoint(stage_folder("train", seed) / "checkpoint.safetensors")
        hessians = load_hessians(stage_folder("calibrate", seed) / "hessians.safetensors")
        trained_grid = checkpoint.training["qat"]
        if trained_grid is not None and (differences := list_grid_differences(trained_grid, params)):
            say(f"note: the checkpoint was trained for another grid than quantize exports: {'; '.join(differences)}")
        quantized, rows = quantize_model(checkpoint, hessians, params, process.device)
        model = build_model(quantized.model, quantized.weights()).to(process.device)
        heldout = load_split(TOKENIZE_FOLDER / "heldout", model.params.vocab_size)
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
        score = score_heldout(model, heldout, tokenizer, window_tokens=checkpoint.training["sequence_tokens"],
                              batch_windows=BATCH_WINDOWS, precision="fp32", process=process)
    save_quantized(folder / "quantized.safetensors", quantized)
    write_csv(folder / "tensors.csv", [field.name for field in fields(TensorRow)], map(astuple, rows))
    save_metrics(folder, {"heldout_bpb": round(score.bpb, 8), **summarize(rows)}, {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    main(parse_seed(__doc__))
