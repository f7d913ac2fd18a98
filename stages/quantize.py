"""Quantize: checkpoint, Hessians, train and held-out shards, tokenizer -> integer codes and steps, errors of every matrix."""

import time
from dataclasses import astuple, fields
from functools import partial

from lib.artifacts.checkpoint import load_checkpoint
from lib.artifacts.files import write_csv
from lib.artifacts.hessians import load_hessians
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import save_quantized
from lib.artifacts.tokens import load_split
from lib.audit.isolation import withhold_validation
from lib.compression.budget import artifact_bytes
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.heldout import compare_heldout
from lib.model.gpt import build_model
from lib.model.parts import parts_of
from lib.params import load_params, parse_seed
from lib.quantization.assessment import TensorRow, list_tensors, summarize
from lib.quantization.config import QuantizeParams
from lib.quantization.quantization import quantize


def main(seed: int) -> None:
    """Run the stage for one seed."""
    start, folder = time.monotonic(), stage_folder("quantize", seed)
    sources = stage_folder("train", seed) / "checkpoint.safetensors", stage_folder("calibrate", seed) / "hessians.safetensors"
    with start_process() as process:
        params, coding = load_params("quantize", QuantizeParams), load_params("compress", CompressParams)
        checkpoint, hessians = load_checkpoint(sources[0]), load_hessians(sources[1], checkpoint=sources[0])
        reference, window_tokens = build_model(checkpoint.model, checkpoint.weights).to(process.device), checkpoint.training.sequence_tokens
        vocab_size = reference.params.vocab_size
        distilled, dampings = quantize(checkpoint, hessians, params, lambda: load_split(TOKENIZE_FOLDER / "train", vocab_size), seed=seed,
                                       process=process, measure=partial(artifact_bytes, coding), folder=folder)
        quantized = distilled.quantized
        model = build_model(checkpoint.model, quantized.weights()).to(process.device)
        comparison = compare_heldout(model.logits, reference.logits, load_split(TOKENIZE_FOLDER / "heldout", vocab_size),
                                     load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model"), window_tokens=window_tokens,
                                     max_tokens=params.heldout_tokens, batch_windows=16, process=process)
        if process.is_main:
            rows = list_tensors(checkpoint.weights, parts_of(reference), hessians, quantized, params, dampings=dampings,
                                coded_bytes=pack(quantized, coding.codec, coding.level).matrix_bytes, device=process.device)
            save_quantized(folder / "quantized.safetensors", quantized, sources)
            write_csv(folder / "tensors.csv", [field.name for field in fields(TensorRow)], map(astuple, rows))
            save_metrics(folder, comparison.metrics() | summarize(rows) | distilled.metrics,
                         distilled.timing | {"seconds": time.monotonic() - start})
            if distilled.state:
                distilled.state.unlink(missing_ok=True)


if __name__ == "__main__":
    withhold_validation("quantize", seed := parse_seed(__doc__))
    main(seed)
