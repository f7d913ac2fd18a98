"""Quantize: checkpoint, Hessians, held-out shards, tokenizer -> integer codes and steps, errors of every matrix."""

import time
from dataclasses import astuple, fields

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.files import write_csv
from lib.artifacts.hessians import load_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import save_quantized
from lib.artifacts.tokens import load_split
from lib.audit.isolation import withhold_validation
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.heldout import compare_heldout
from lib.model.gpt import build_model, outline
from lib.model.parts import parts_of
from lib.params import load_params, parse_seed
from lib.progress import say
from lib.quantization.assessment import TensorRow, list_tensors, summarize
from lib.quantization.config import QuantizeParams
from lib.quantization.policy import list_grid_differences, quantize_model

BATCH_WINDOWS = 16  # changes speed, not results


def main(seed: int) -> None:
    """Run the stage for one seed."""
    start = time.monotonic()
    sources = stage_folder("train", seed) / "checkpoint.safetensors", stage_folder("calibrate", seed) / "hessians.safetensors"
    with start_process() as process:
        params, folder = load_params("quantize", QuantizeParams), stage_folder("quantize", seed)
        coding = load_params("compress", CompressParams)
        checkpoint, hessians = load_checkpoint(sources[0]), load_hessians(sources[1], checkpoint=sources[0])
        parts = parts_of(outline(checkpoint.model))
        grid = checkpoint.training["qat"]
        if grid is not None and (differences := list_grid_differences(grid, params)):
            say("note: the checkpoint was trained for another grid than this one: " + "; ".join(differences), enabled=process.is_main)
        quantized, dampings = quantize_model(checkpoint, parts, hessians, params, process=process,
                                             measure=lambda model: coding.code_bytes + len(pack(model, coding.codec, coding.level).blob))
        model, reference = (build_model(checkpoint.model, weights).to(process.device)
                            for weights in (quantized.weights(), checkpoint.weights))
        heldout = load_split(TOKENIZE_FOLDER / "heldout", model.params.vocab_size)
        comparison = compare_heldout(model.logits, reference.logits, heldout, load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model"),
                                     window_tokens=checkpoint.training["sequence_tokens"], max_tokens=params.heldout_tokens,
                                     batch_windows=BATCH_WINDOWS, process=process)
        if process.is_main:
            rows = list_tensors(checkpoint.weights, parts, hessians, quantized, params, dampings=dampings,
                                coded_bytes=pack(quantized, coding.codec, coding.level).matrix_bytes, device=process.device)
            save_quantized(folder / "quantized.safetensors", quantized, sources)
            write_csv(folder / "tensors.csv", [field.name for field in fields(TensorRow)], map(astuple, rows))
            save_metrics(folder, comparison.metrics() | summarize(rows), {"seconds": time.monotonic() - start})


if __name__ == "__main__":
    withhold_validation("quantize", seed := parse_seed(__doc__))
    main(seed)
