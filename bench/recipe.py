"""What late QAT, EMA and SWA buy: ``python -m bench.recipe [--root FOLDER] [--seeds SEED ...] [--below-lr SHARE]``.

Trains the model of params.yaml on the tokens of FOLDER, a clone in which tokenize has run, for every seed without and with
quantization-aware training from the learning-rate share `--below-lr` on. The raw, EMA and SWA weights of each run are scored on the
held-out documents as they are, on the grid of ``train.qat`` rounded to nearest and by GPTQ, and with free steps that meet
``quantize.target_bytes``. The last table has means over the seeds, and how far QAT lowers each figure (mean and standard deviation of
the differences, seed by seed).
"""

import argparse
import os
import tempfile
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from lib.artifacts.checkpoint import Checkpoint, Training
from lib.artifacts.hessians import Hessians
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.tokens import load_split
from lib.calibration.config import CalibrateParams
from lib.calibration.moments import collect_moments, draw_sequences
from lib.calibration.sums import matrix_inputs
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.data.tokenizer import load_tokenizer
from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.heldout import compare_heldout
from lib.model.config import ModelSection
from lib.model.gpt import GPT, build_model
from lib.model.initialization import initialize
from lib.model.kernels import choose_kernel
from lib.model.parts import parts_of
from lib.params import load_params, parse_params, read_params
from lib.quantization.config import QuantizeParams
from lib.quantization.policy import quantize_model
from lib.training.checkpoint import make_loader
from lib.training.config import TrainParams
from lib.training.loop import train

BATCH_WINDOWS = 16
AVERAGES = ("raw", "ema", "swa")
EXPORTS = ("float", "nearest", "GPTQ", "free")

Figures = dict[tuple[str, str], float]  # (average, export) -> held-out bits per byte


class Bench:
    """What all runs have in common."""

    def __init__(self, root: Path, process: Process) -> None:
        self.process = process
        self.section = load_params("model", ModelSection)
        self.folder = root / TOKENIZE_FOLDER
        self.splits = {name: load_split(self.folder / name, self.section.vocab_size) for name in ("train", "heldout")}
        self.tokenizer = load_tokenizer(self.folder / "tokenizer.model", self.section.bos_id)

    def run(self, seed: int, below_lr: float) -> Figures:
        """Train once, and score everything that comes of it."""
        values = read_params()["train"]
        params = parse_params(values | {"qat": values["qat"] | {"below_lr": below_lr}}, TrainParams, "train.")
        architecture = self.section.architecture
        kernel = choose_kernel(self.section.attention, architecture, params.precision, self.process.device)
        model = GPT(architecture, kernel).to(self.process.device)
        initialize(model, seed)
        loader = make_loader(params, self.splits["train"], architecture.bos_id, seed)
        with tempfile.TemporaryDirectory() as folder:
            candidates = train(model, params, loader, self.process, Path(folder) / "resume.pt", status=dict).candidates
        training = Training(sequence_tokens=params.sequence_tokens)
        figures: Figures = {}
        for average, weights in candidates.items():
            checkpoint = Checkpoint(weights, architecture.model_dump(mode="json"), training)
            figures |= {(average, export): bpb for export, bpb in self.score(checkpoint, params, seed).items()}
        return figures

    def score(self, checkpoint: Checkpoint, train_params: TrainParams, seed: int) -> dict[str, float]:
        """Held-out bits per byte by way of export."""
        calibrate = load_params("calibrate", CalibrateParams)
        reference = build_model(checkpoint.model, checkpoint.weights).to(self.process.device)
        sequences = draw_sequences(self.splits["train"], calibrate.num_sequences, train_params.sequence_tokens, seed)
        moments = [collect_moments(reference, reference.logits, tokens, num_gradient_sequences=calibrate.num_gradient_sequences, seed=seed,
                                   batch_sequences=calibrate.batch_sequences, precision=calibrate.precision, process=self.process,
                                   description=name, with_outputs=name == "calibrate")
                   for name, tokens in zip(("calibrate", "verify"), sequences, strict=True)]
        hessians = Hessians(matrix_inputs(parts_of(reference)), *moments)
        coding = load_params("compress", CompressParams)
        grid: dict[str, Any] = {"target_bytes": None, "bits": train_params.qat.bits,
                                "clip": read_params()["quantize"]["clip"] | {
                                    "rule": "percentile", "percentiles": [train_params.qat.clip_quantile],
                                    "floor": train_params.qat.floor}, "rate_weight": 0.0}
        changes = {"nearest": grid | {"method": "rtn"}, "GPTQ": grid, "free": {}}
        figures: dict[str, float] = {}
        for export, changed in changes.items():
            params = parse_params(read_params()["quantize"] | changed, QuantizeParams, "quantize.")
            quantized, _ = quantize_model(checkpoint, parts_of(reference), hessians, params, process=self.process,
                                          measure=lambda model: coding.code_bytes + len(pack(model, coding.codec, coding.level).blob))
            model = build_model(checkpoint.model, quantized.weights()).to(self.process.device)
            compared = compare_heldout(model.logits, reference.logits, self.splits["heldout"], self.tokenizer, process=self.process,
                                       window_tokens=train_params.sequence_tokens, batch_windows=BATCH_WINDOWS,
                                       max_tokens=params.heldout_tokens)
            figures |= {"float": compared.bpb_float, export: compared.bpb}
        return figures


def print_row(name: str, figures: Figures, average: str) -> None:
    """One line: a figure for each way of export."""
    print(f"{name:28}{average:6}" + "".join(f"{figures[average, export]:>10.4f}" for export in EXPORTS), flush=True)


def main() -> None:
    """Print a table for each run, and that of the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="clone whose tokens are used")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 7])
    parser.add_argument("--below-lr", type=float, default=0.5, help="learning-rate share below which QAT is on (#585: 0.5)")
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    bench = Bench(arguments.root, Process(0, 1, torch.device("cuda")) if torch.cuda.is_available() else SINGLE_CPU)
    print(f"torch {torch.__version__}, {bench.process.device}")
    print(f"{'held-out bits per byte':34}" + "".join(f"{export:>10}" for export in EXPORTS))
    runs: dict[float, list[Figures]] = {0.0: [], arguments.below_lr: []}
    for seed in arguments.seeds:
        for below_lr, found in runs.items():
            found.append(bench.run(seed, below_lr))
            for average in AVERAGES:
                print_row(f"seed {seed}, {'QAT' if below_lr else 'no QAT'}", found[-1], average)
    for below_lr, found in runs.items():
        means = {key: mean(figures[key] for figures in found) for key in found[0]}
        for average in AVERAGES:
            print_row(f"mean, {'QAT' if below_lr else 'no QAT'}", means, average)
    for average in AVERAGES:
        cells = []
        for export in EXPORTS:
            gains = [one[average, export] - other[average, export] for one, other in zip(*runs.values(), strict=True)]
            cells.append(f"{mean(gains):+.4f} ± {stdev(gains) if len(gains) > 1 else 0:.4f}")
        print(f"{'QAT lowers it by':28}{average:6}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
