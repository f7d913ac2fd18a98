"""Quantization methods at equal bytes, on the checkpoint of a run: ``python -m bench.quantize [--targets BYTES ...] [--methods NAME ...]``.

The run is in the clone `--root`, by default this one, which has to be as far as calibrate. Methods are entries of `METHODS`:

    nearest, gptq-fixed   round-to-nearest, and correct GPTQ with the percentile clip rule; int5, int8 tables, zstd
    gptq-int5             the same with the token embedding as the only int8 table
    published             GPTQ as entry #585 published it: 2 % pruning, its floor under all scales, the inverse Hessian itself instead of
                          its Cholesky factor, columns in ascending order; int5, int8 tables, zstd
    std                   GPTQ as entry #1855 has it: clip at 13 standard deviations, MLP 11.5, tables 14; int6, int7 tables, brotli
    gptq, feedback        free steps within each output, or with feedback across outputs; range coder
    distilled             gptq, and distillation with the settings of ``quantize.distill`` and ``--steps``
    feedback,distilled    both
    MODULE:FUNCTION       a function of your own, as `find_method` says; range coder

With targets each method meets these sizes: std by the number of standard deviations, all of them scaled. Methods that have only a size of
their own, and all without targets, are printed as they are, followed by gptq at their bytes; without methods, all that have one are, and
gptq at fractions of the bytes of published. ``ratio`` is that of KL to the first method at the same target, or to the method whose bytes
they are. With ``--curve`` the published procedure and correct GPTQ with 3 to 6 bits, and free steps at sizes from the smallest of these
files to the largest: ``quantize.csv`` and ``quantize.svg`` beside this file. Bytes are those of the packed model, without code.
"""

import argparse
import importlib
import os
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint, load_checkpoint
from lib.artifacts.files import read_csv, write_bytes, write_csv
from lib.artifacts.hessians import Hessians, load_hessians
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.quantized import OCTAVE, QuantizedModel, QuantizedTensor, exponents_of, scales_of
from lib.artifacts.tokens import load_split
from lib.compression.container import pack, unpack
from lib.data.tokenizer import load_tokenizer
from lib.distributed import SINGLE_CPU, Process
from lib.errors import UserError
from lib.evaluation.heldout import compare_heldout
from lib.model.gpt import build_model
from lib.model.parts import parts_of
from lib.params import Params, parse_params, read_params
from lib.quantization.allocation import SizeSearch
from lib.quantization.assessment import list_tensors, summarize
from lib.quantization.clipping import row_scales
from lib.quantization.config import QuantizeParams
from lib.quantization.grid import round_to_grid
from lib.quantization.quantization import quantize
from lib.quantization.quantizer import smallest
from lib.reporting.figures import follow_color_scheme, plot_panels

INT8_TABLES = {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 8, "value_embedding": 8, "head": 8}  # #585
INT5_TABLES = INT8_TABLES | {"bigram": 5, "value_embedding": 5}
STD_BITS = dict.fromkeys(INT8_TABLES, 7) | {"attention": 6, "mlp": 6}  # #1855
NUM_STD, NUM_STD_OF = 14.0, {"attention": 13.0, "mlp": 11.5}  # #1855: standard deviations, of tables and of other roles
FREE = dict.fromkeys(INT8_TABLES, "free")
FLOOR, PRUNED, DAMPING, TABLE_PERCENTILE = 1.0, 0.02, 0.01, 0.9999984  # #585; the damping also #1855
FEEDBACK_DAMPING = 0.1
LEVEL = 22
FRACTIONS = (0.75, 0.6, 0.5)
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

    def __init__(self, root: Path, seed: int, heldout_tokens: int, steps: int, process: Process) -> None:
        self.root, self.seed, self.steps, self.section = root, seed, steps, read_params()["quantize"]
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

    def params(self, *, steps: int = 0, **changes: Any) -> QuantizeParams:
        """Section quantize of this project's params.yaml, changed; with so many steps of distillation."""
        class Changed(Params):
            quantize: QuantizeParams

        section = self.section
        changed = section | {key: section[key] | value if key == "clip" else value for key, value in changes.items()}
        return parse_params({"quantize": changed | {"distill": section["distill"] | {"steps": steps}}}, Changed, "bench: ").quantize

    def clipped(self, method: str, bits: dict[str, int], **clip: Any) -> QuantizedModel:
        """Grids that clip, with the rule of params.yaml or another."""
        return self._quantize(self.params(target_bytes=None, method=method, bits=bits, rate_weight=0.0, damping=DAMPING, clip=clip))

    def free(self, num_bytes: int, *, feedback_damping: float | None = None, is_distilled: bool = False) -> QuantizedModel:
        """Free steps that meet a size."""
        return self._quantize(self.params(target_bytes=num_bytes, bits=FREE, feedback_damping=feedback_damping,
                                          steps=self.steps if is_distilled else 0))

    def std(self, scale: float = 1.0) -> QuantizedModel:
        """The quantizer of #1855 with its numbers of standard deviations times `scale`."""
        return self.clipped("gptq", STD_BITS, rule="std", floor=0.0, num_std=scale * NUM_STD,
                            num_std_of={role: scale * number for role, number in NUM_STD_OF.items()})

    def std_at(self, num_bytes: int) -> QuantizedModel:
        """The same with the scale at which it meets a size."""
        search, best = SizeSearch(num_bytes, self.num_weights / 8 / OCTAVE), None  # a bit for a weight less with twice the scale
        while (units := search.next_units) is not None:
            found = self.std(2.0 ** (units / OCTAVE))
            search.tell(len(pack(found, "brotli", LEVEL).blob))
            if search.best_units == units:
                best = found
        assert best is not None and search.best_units is not None
        print(f"{'':8}std: {2.0 ** (search.best_units / OCTAVE):.3f} x the standard deviations of #1855")
        return best

    def _quantize(self, params: QuantizeParams) -> QuantizedModel:
        text = partial(load_split, self.root / TOKENIZE_FOLDER / "train", self.model.params.vocab_size)
        distilled, _ = quantize(self.checkpoint, self.hessians, params, text, seed=self.seed, process=self.process, measure=packed_bytes)
        return distilled.quantized

    def published(self, bits: int = 5) -> QuantizedModel:
        """The procedure of #585, which has 5 bits; tables have 8 in any case."""
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

    def run(self, codec: str, make: Callable[[], QuantizedModel]) -> Result:
        """Make a model, pack it, unpack it."""
        start = time.perf_counter()
        quantized = make()
        blob = pack(quantized, codec, LEVEL).blob
        middle = time.perf_counter()
        unpack(blob)
        return Result(quantized, len(blob), middle - start, time.perf_counter() - middle)

    def report(self, name: str, result: Result, base: float | None = None) -> float:
        """Print one line of the table, with the ratio of KL to `base`; returns KL."""
        rows = list_tensors(self.checkpoint.weights, parts_of(self.model), self.hessians, result.quantized, self.params(), dampings={},
                            coded_bytes={}, device=self.process.device)
        figures = summarize(rows)
        model = build_model(self.checkpoint.model, result.quantized.weights()).to(self.process.device)
        compared = compare_heldout(model.logits, self.model.logits, self.heldout, self.tokenizer, process=self.process, batch_windows=16,
                                   window_tokens=self.checkpoint.training.sequence_tokens, max_tokens=self.heldout_tokens)
        bits, error, predicted = 8 * result.num_bytes, figures["relative_error"], figures["predicted_loss"]
        print(f"{name:44}{result.num_bytes:>12,}{bits / self.num_weights:>9.2f}{bits / self.num_live:>9.2f}{error:>10.5f}"
              f"{predicted:>11.6f}{compared.kl:>11.6f}{compared.loss_increase:>+11.6f}{result.seconds:>9.1f}{result.unpack_seconds:>8.2f}"
              + (f"{compared.kl / base:>8.3f}" if base else ""), flush=True)
        return compared.kl


class Method(NamedTuple):
    """A quantizer.

    Attributes:
        codec: entry of `lib.compression.coding.CODECS` that its models are packed with.
        own: makes a model of the size that the method itself has; None where it has none.
        met: makes a model of at most so many bytes; None where no size can be set.
    """

    codec: str
    own: Callable[[Bench], QuantizedModel] | None = None
    met: Callable[[Bench, int], QuantizedModel] | None = None


METHODS = {
    "nearest": Method("zstd", own=lambda bench: bench.clipped("rtn", INT8_TABLES)),
    "published": Method("zstd", own=Bench.published),
    "gptq-fixed": Method("zstd", own=lambda bench: bench.clipped("gptq", INT8_TABLES)),
    "gptq-int5": Method("zstd", own=lambda bench: bench.clipped("gptq", INT5_TABLES)),
    "std": Method("brotli", own=Bench.std, met=Bench.std_at),
    "gptq": Method("range", met=Bench.free),
    "feedback": Method("range", met=partial(Bench.free, feedback_damping=FEEDBACK_DAMPING)),
    "distilled": Method("range", met=partial(Bench.free, is_distilled=True)),
    "feedback,distilled": Method("range", met=partial(Bench.free, feedback_damping=FEEDBACK_DAMPING, is_distilled=True)),
}


def packed_bytes(quantized: QuantizedModel) -> int:
    """Size of a model with the range coder."""
    return len(pack(quantized, "range", LEVEL).blob)


def find_method(name: str) -> tuple[str, Method]:
    """An entry of `METHODS`, or a function of somebody else's.

    That is called with a `lib.artifacts.checkpoint.Checkpoint`; the parts of its parameters, as of `lib.model.parts.parts_of`; a
    `lib.artifacts.hessians.Hessians`; the bytes that the packed model may have; and, as keywords, `measure`, which gives the
    bytes of a `lib.artifacts.quantized.QuantizedModel`, and `process`, which has the device. It returns a `QuantizedModel`.

    Args:
        name: name in the table, or ``module:function``.

    Raises:
        ArgumentTypeError: there is no such method, or it cannot be imported.
    """
    if name in METHODS:
        return name, METHODS[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"{name}: expected one of {' '.join(METHODS)}, or module:function")
    try:
        function = getattr(importlib.import_module(module), attribute)
        if not callable(function):
            raise TypeError(f"{type(function).__name__} is not callable")
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"{name}: expected a function that can be imported from here: {error}") from None

    def met(bench: Bench, num_bytes: int) -> QuantizedModel:
        found = function(bench.checkpoint, parts_of(bench.model), bench.hessians, num_bytes, measure=packed_bytes, process=bench.process)
        if not isinstance(found, QuantizedModel):
            raise UserError(f"--methods {name}: expected that it returns a QuantizedModel, found {type(found).__name__}")
        return found

    return name, Method("range", met=met)


def compare_own(bench: Bench, name: str, method: Method, fractions: tuple[float, ...]) -> None:
    """Print a method at its own size, and gptq at its bytes and at fractions of them."""
    assert method.own is not None
    base = bench.report(f"{name}, {method.codec}", result := bench.run(method.codec, partial(method.own, bench)))
    for fraction in (1.0, *fractions):
        num_bytes = int(fraction * result.num_bytes)
        bench.report(f"gptq, {fraction:.0%} of its bytes", bench.run("range", partial(bench.free, num_bytes)), base)


def compare_at(bench: Bench, target: int, methods: dict[str, Method]) -> None:
    """Print methods at one size."""
    base = None
    for name, method in methods.items():
        assert method.met is not None
        result = bench.run(method.codec, partial(method.met, bench, target))
        kl = bench.report(f"{name}, {result.num_bytes / target - 1:+.3%} from {target:,}", result, base)
        base = base or kl


def measure_curve(bench: Bench) -> list[tuple[str, int, float]]:
    """Print a line for every point of the figure; returns rows with `COLUMNS`."""
    points: list[tuple[str, int, float]] = []

    def measure(method: str, note: str, result: Result) -> None:
        points.append((method, result.num_bytes, round(bench.report(f"{method}, {note}", result), 8)))

    for bits in CURVE_BITS:
        measure("GPTQ as published (#585), zstd", f"int{bits}", bench.run("zstd", partial(bench.published, bits)))
    for bits in CURVE_BITS:
        grids = dict.fromkeys(INT8_TABLES, bits) | {"embedding": 8, "head": 8}
        measure("correct GPTQ, zstd", f"int{bits}", bench.run("zstd", partial(bench.clipped, "gptq", grids)))
    sizes = [num_bytes for _, num_bytes, _ in points]
    for size in np.geomspace(min(sizes), max(sizes), CURVE_SIZES):
        measure("free steps, range coder (Albatross)", f"{size:,.0f}", bench.run("range", partial(bench.free, int(size))))
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
    parser.add_argument("--targets", type=int, nargs="+", default=[], metavar="BYTES")
    parser.add_argument("--methods", type=find_method, nargs="+", default=[], metavar="METHOD", help=f"{' '.join(METHODS)} module:function")
    parser.add_argument("--steps", type=int, default=400, help="of distillation")
    parser.add_argument("--curve", action="store_true", help="measure the figure of the README instead")
    arguments = parser.parse_args()
    given = dict(arguments.methods or ([("gptq", METHODS["gptq"])] if arguments.targets else
                                       [(name, method) for name, method in METHODS.items() if method.own]))
    if not arguments.targets and (sizeless := [name for name, method in given.items() if not method.own]):
        parser.error(f"--targets: expected sizes for {', '.join(sizeless)}, found none")
    process = Process(0, 1, torch.device("cuda")) if torch.cuda.is_available() else SINGLE_CPU
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
    os.environ.setdefault("TQDM_DISABLE", "1")
    bench = Bench(arguments.root, arguments.seed, arguments.heldout_tokens, arguments.steps, process)
    print(f"torch {torch.__version__}, {device}; {bench.num_weights:,} weights in matrices, {bench.num_live:,.0f} of them with live inputs")
    print(f"{'':44}{'bytes':>12}{'bits/w':>9}{'live':>9}{'error':>10}{'predicted':>11}{'KL':>11}{'loss':>11}{'seconds':>9}{'unpack':>8}{'ratio':>8}")
    if arguments.curve:
        write_csv(TABLE, COLUMNS, measure_curve(bench))
        write_bytes(FIGURE, draw_curve(TABLE).encode())
        return
    for name, method in given.items():
        if not (method.met and arguments.targets):
            compare_own(bench, name, method, FRACTIONS if name == "published" and not arguments.methods else ())
    for target in arguments.targets:
        compare_at(bench, target, {name: method for name, method in given.items() if method.met})


if __name__ == "__main__":
    main()
