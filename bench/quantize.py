"""Quantization methods at equal bytes, on the checkpoint of a run: ``python -m bench.quantize [--root FOLDER] [--targets BYTES ...]``.

FOLDER is a clone in which the pipeline has run up to calibrate; by default this one. The methods: round-to-nearest, GPTQ as entry #585
published it (2 % pruning, its floor under all scales, the inverse Hessian itself instead of its Cholesky factor, columns in ascending
order), correct GPTQ with the percentile clip rule, all int5 with int8 tables as in #585, and once with the token embedding as the only
int8 table, with zstandard; and free steps with the range coder, at the same bytes and at fractions of them. With targets, free steps at
those sizes instead, by each of `METHODS` that ``--methods`` names. With ``--curve`` the published procedure and correct GPTQ with 3 to 6
bits, and free steps at sizes from the smallest of these files to the largest: ``quantize.csv`` and ``quantize.svg`` beside this file. Bytes
are those of the packed model, without code.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint, load_checkpoint
from lib.artifacts.files import read_csv, write_bytes, write_csv
from lib.artifacts.hessians import Hessians, load_hessians
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, exponents_of, scales_of
from lib.artifacts.tokens import load_split
from lib.compression.container import pack, unpack
from lib.data.loader import Loader
from lib.data.tokenizer import load_tokenizer
from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.heldout import HeldoutComparison, compare_heldout
from lib.model.gpt import build_model
from lib.model.parts import parts_of
from lib.params import Params, parse_params, read_params
from lib.quantization.assessment import list_tensors, summarize
from lib.quantization.clipping import row_scales
from lib.quantization.config import QuantizeParams
from lib.quantization.distillation import distill
from lib.quantization.grid import round_to_grid
from lib.quantization.policy import quantize_model
from lib.quantization.quantizer import smallest
from lib.reporting.figures import follow_color_scheme, plot_panels

INT8_TABLES = {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 8, "value_embedding": 8, "head": 8}  # #585
INT5_TABLES = INT8_TABLES | {"bigram": 5, "value_embedding": 5}
FREE = dict.fromkeys(INT8_TABLES, "free")
FLOOR, PRUNED, DAMPING, TABLE_PERCENTILE = 1.0, 0.02, 0.01, 0.9999984  # #585
LEVEL = 22
FRACTIONS = (0.75, 0.6, 0.5)
METHODS: dict[str, tuple[float | None, bool]] = {
    "gptq": (None, False), "feedback": (0.1, False), "distilled": (None, True), "feedback,distilled": (0.1, True)}
"""Name -> `feedback_damping`, and whether distilled, with the settings of ``quantize.distill`` and ``--steps``."""
CURVE_BITS, CURVE_SIZES = (3, 4, 5, 6), 8
TABLE, FIGURE = Path(__file__).with_suffix(".csv"), Path(__file__).with_suffix(".svg")
COLUMNS = ("method", "num_bytes", "heldout_kl")


class Result(NamedTuple):
    """One method: its model and bytes, seconds of quantization and packing, and seconds of unpacking."""

    quantized: QuantizedModel
    num_bytes: int
    seconds: float
    unpack_seconds: float


class Bench:
    """The run that methods are compared on."""

    def __init__(self, root: Path, seed: int, heldout_tokens: int, process: Process) -> None:
        self.root, self.seed = root, seed
        checkpoint = root / stage_folder("train", seed) / "checkpoint.safetensors"
        self.checkpoint: Checkpoint = load_checkpoint(checkpoint)
        self.hessians: Hessians = load_hessians(root / stage_folder("calibrate", seed) / "hessians.safetensors", checkpoint)
        self.model = build_model(self.checkpoint.model, self.checkpoint.weights).to(process.device)
        self.heldout = load_split(root / TOKENIZE_FOLDER / "heldout", self.model.params.vocab_size)
        self.tokenizer = load_tokenizer(root / TOKENIZE_FOLDER / "tokenizer.model")
        self.heldout_tokens, self.process = heldout_tokens, process
        moments = self.hessians.calibration.hessians
        sizes = [(source, self.checkpoint.weights[name].numel()) for source, names in self.hessians.inputs.items() for name in names]
        self.num_weights = sum(size for _, size in sizes)
        self.num_live = sum(size * float((moments[source].diagonal() > 0).float().mean()) for source, size in sizes)

    def params(self, **changes: Any) -> QuantizeParams:
        """Section quantize of this project's params.yaml, changed."""
        class Changed(Params):
            quantize: QuantizeParams

        return parse_params({"quantize": read_params()["quantize"] | changes}, Changed, "bench: ").quantize

    def clipped(self, method: str, bits: dict[str, int]) -> Result:
        """Grids that clip with the percentile rule."""
        params = self.params(target_bytes=None, method=method, bits=bits, rate_weight=0.0, damping=DAMPING)
        return self._run(lambda: self._quantize(params, lambda _: 0), "zstd")

    def free(self, num_bytes: int, method: str = "gptq", steps: int = 0) -> Result:
        """Free steps that meet a size, by one of `METHODS` and with so many steps of distillation."""
        feedback_damping, is_distilled = METHODS[method]
        distill = read_params()["quantize"]["distill"] | {"steps": steps if is_distilled else 0}
        params = self.params(target_bytes=num_bytes, bits=FREE, feedback_damping=feedback_damping, distill=distill)
        return self._run(lambda: self._quantize(params, lambda model: len(pack(model, "range", LEVEL).blob)), "range")

    def _quantize(self, params: QuantizeParams, measure: Callable[[QuantizedModel], int]) -> QuantizedModel:
        start, _ = quantize_model(self.checkpoint, parts_of(self.model), self.hessians, params, process=self.process, measure=measure)
        if not params.distill.steps:
            return start
        text = load_split(self.root / TOKENIZE_FOLDER / "train", self.model.params.vocab_size)
        loader = Loader(text, self.checkpoint.training.sequence_tokens, params.distill.batch_sequences, self.seed)
        return distill(self.model, self.model.logits, lambda step: loader.batch(step)[:, :-1], start, params, process=self.process,
                       measure=measure)[0]

    def published(self, bits: int = 5) -> Result:
        """The procedure of #585, which has 5 bits; tables have 8 in any case."""
        return self._run(lambda: self._quantize_as_published(bits), "zstd")

    def _quantize_as_published(self, bits: int) -> QuantizedModel:
        sources = {name: source for source, names in self.hessians.inputs.items() for name in names}
        tables = {f"{name}.weight" for name, module in self.model.named_modules() if isinstance(module, torch.nn.Embedding)}
        clip, matrices = self.params().clip.model_copy(update={"floor": FLOOR}), {}
        table_clip = clip.model_copy(update={"rule": "percentile", "percentiles": (TABLE_PERCENTILE,)})
        for name, source in sources.items():
            weight = self.checkpoint.weights[name].to(self.process.device)
            if name in tables:
                matrices[name] = make_matrix(weight, 8, row_scales(weight, 8, table_clip), None)
            else:
                weight = weight.masked_fill(smallest(weight, PRUNED), 0)
                hessian = self.hessians.calibration.hessians[source].to(weight.device)
                matrices[name] = make_matrix(weight, bits, row_scales(weight, bits, clip), hessian)
        vectors = {name: weight.half() for name, weight in self.checkpoint.weights.items() if name not in sources}
        return QuantizedModel(self.checkpoint.model, self.checkpoint.training, matrices, vectors)

    def _run(self, quantize: Callable[[], QuantizedModel], codec: str) -> Result:
        start = time.perf_counter()
        quantized = quantize()
        blob = pack(quantized, codec, LEVEL).blob
        middle = time.perf_counter()
        unpack(blob)
        return Result(quantized, len(blob), middle - start, time.perf_counter() - middle)

    def report(self, name: str, result: Result) -> HeldoutComparison:
        """Print one line of the table."""
        rows = list_tensors(self.checkpoint.weights, parts_of(self.model), self.hessians, result.quantized, self.params(), dampings={},
                            coded_bytes={}, device=self.process.device)
        figures = summarize(rows)
        model = build_model(self.checkpoint.model, result.quantized.weights()).to(self.process.device)
        compared = compare_heldout(model.logits, self.model.logits, self.heldout, self.tokenizer, process=self.process, batch_windows=16,
                                   window_tokens=self.checkpoint.training.sequence_tokens, max_tokens=self.heldout_tokens)
        bits, error, predicted = 8 * result.num_bytes, figures["relative_error"], figures["predicted_loss"]
        print(f"{name:44}{result.num_bytes:>12,}{bits / self.num_weights:>9.2f}{bits / self.num_live:>9.2f}{error:>10.5f}"
              f"{predicted:>11.6f}{compared.kl:>11.6f}{compared.loss_increase:>+11.6f}{result.seconds:>9.1f}{result.unpack_seconds:>8.2f}",
              flush=True)
        return compared


def measure_curve(bench: Bench) -> list[tuple[str, int, float]]:
    """Print a line for every point of the figure; returns rows with `COLUMNS`."""
    points: list[tuple[str, int, float]] = []

    def measure(method: str, note: str, result: Result) -> None:
        points.append((method, result.num_bytes, round(bench.report(f"{method}, {note}", result).kl, 8)))

    for bits in CURVE_BITS:
        measure("GPTQ as published (#585), zstd", f"int{bits}", bench.published(bits))
    for bits in CURVE_BITS:
        measure("correct GPTQ, zstd", f"int{bits}", bench.clipped("gptq", dict.fromkeys(INT8_TABLES, bits) | {"embedding": 8, "head": 8}))
    sizes = [num_bytes for _, num_bytes, _ in points]
    for size in np.geomspace(min(sizes), max(sizes), CURVE_SIZES):
        measure("free steps, range coder (Albatross)", f"{size:,.0f}", bench.free(int(size)))
    return points


def draw_curve(table: Path) -> str:
    """The figure of a table that ``--curve`` wrote, as SVG."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in read_csv(table, COLUMNS):
        curves.setdefault(row["method"], []).append((float(row["num_bytes"]), float(row["heldout_kl"])))
    label = "KL to the float model, nats per token"
    return follow_color_scheme(plot_panels({label: curves}, "bytes of the model", log=(label,)))


def make_matrix(weight: Tensor, bits: int, scales: Tensor, hessian: Tensor | None) -> QuantizedTensor:
    """Round-to-nearest without a Hessian; with one the published loop, which propagates with rows of the inverse itself."""
    rows = exponents_of(scales)
    scales = scales_of(rows)
    if hessian is None:
        codes = round_to_grid(weight, scales[:, None], bits)
    else:
        order = torch.argsort(hessian.diagonal())
        damped = hessian.double()[order][:, order]
        damped.diagonal().add_(DAMPING * damped.diagonal().mean())
        inverse = torch.linalg.inv(damped).float()
        columns, codes = weight.T[order].clone(), torch.empty_like(weight)
        for j in range(len(columns)):
            codes[:, order[j]] = round_to_grid(columns[j], scales, bits)
            error = (columns[j] - codes[:, order[j]] * scales) / inverse[j, j]
            columns[j + 1:].addr_(inverse[j, j + 1:], error, alpha=-1)
    zeros = torch.zeros(weight.shape[1], dtype=torch.int16)
    return QuantizedTensor(codes.to(torch.int16).cpu(), rows.cpu(), zeros, bits)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(), help="clone whose artifacts are used")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--heldout-tokens", type=int, default=100_000)
    parser.add_argument("--targets", type=int, nargs="+", default=[])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq"], help="of free steps at these targets")
    parser.add_argument("--steps", type=int, default=400, help="of distillation")
    parser.add_argument("--curve", action="store_true", help="measure the figure of the README instead")
    arguments = parser.parse_args()
    process = Process(0, 1, torch.device("cuda")) if torch.cuda.is_available() else SINGLE_CPU
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    os.environ.setdefault("TQDM_DISABLE", "1")
    bench = Bench(arguments.root, arguments.seed, arguments.heldout_tokens, process)
    print(f"torch {torch.__version__}, {device}; {bench.num_weights:,} weights in matrices, {bench.num_live:,.0f} of them with live inputs")
    print(f"{'':44}{'bytes':>12}{'bits/w':>9}{'live':>9}{'error':>10}{'predicted':>11}{'KL':>11}{'loss':>11}{'seconds':>9}{'unpack':>8}")
    for target, method in product(arguments.targets, arguments.methods):
        result = bench.free(target, method, arguments.steps)
        bench.report(f"{method}, {result.num_bytes / target - 1:+.3%} from {target:,}", result)
    if arguments.curve:
        write_csv(TABLE, COLUMNS, measure_curve(bench))
        write_bytes(FIGURE, draw_curve(TABLE).encode())
    if arguments.targets or arguments.curve:
        return
    published, gptq = "GPTQ as published (#585), zstd", "GPTQ int5, int8 tables, zstd"
    results = {"nearest int5, int8 tables, zstd": bench.clipped("rtn", INT8_TABLES), published: bench.published(),
               gptq: bench.clipped("gptq", INT8_TABLES), "GPTQ int5, zstd": bench.clipped("gptq", INT5_TABLES)}
    compared = {name: bench.report(name, result) for name, result in results.items()}
    for name, fraction in [*((name, 1.0) for name in results), *((published, fraction) for fraction in FRACTIONS)]:
        kl = bench.report(f"free steps, {fraction:.0%} of its bytes", bench.free(int(fraction * results[name].num_bytes))).kl
        print(f"{'':8}KL {kl / compared[name].kl:.3f} x that of {name}")


if __name__ == "__main__":
    main()
