"""Which size of model the byte budget wants: ``python -m tools.size`` (``make size STEPS=400``).

Three short trainings on the shards of tokenize: the model of params.yaml, the same with more rows in its bigram table, which take bytes and
hardly any time, and the same with a wider MLP, which takes both. Each is quantized to the bytes that ``quantize.target_bytes`` leaves for
weights, and to fractions of them; `lib.forecast.operating_point` says what follows. Stages and their artifacts stay as they are; table and
figure are in ``artifacts/size/``.
"""

import argparse
import math
import tempfile
from collections.abc import Iterable, Mapping
from itertools import chain, count, takewhile
from pathlib import Path
from typing import NamedTuple, TypeVar

from lib.artifacts.files import read_json, write_bytes, write_csv
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.tokens import SPLIT_FILE, load_split
from lib.calibration.calibration import calibrate
from lib.calibration.config import CalibrateParams
from lib.compression.config import CompressParams
from lib.compression.container import pack
from lib.data.tokenizer import load_tokenizer
from lib.distributed import Process, start_process
from lib.evaluation.heldout import compare_heldout
from lib.forecast.check import check_size
from lib.forecast.corpus import check_corpus
from lib.forecast.operating_point import Direction, Point, fit_direction
from lib.model.config import ModelSection
from lib.model.gpt import build_model, outline
from lib.model.parts import parts_of
from lib.params import PARAMS_FILE, Params, ParamsError, parse_params, read_params
from lib.progress import say
from lib.quantization.config import QuantizeParams
from lib.quantization.policy import quantize_model
from lib.reporting.figures import plot_panels
from lib.reporting.table import align
from lib.training.checkpoint import Trained, train_checkpoint
from lib.training.config import TrainParams

SIZE_FOLDER = Path("artifacts/size")
SHARE = 4  # of the budget of params.yaml one part in so many, where no number of steps is given
FRACTIONS = (1.0, 0.85, 0.7, 0.6, 0.5)  # of the bytes for weights
GROWTH = 1.4  # the larger models have at least so many times the weights
SMALLEST, LARGEST = 0.5, 4.0  # among these multiples the best is looked for
FIRST_ROWS = 64  # where there is no bigram table
BATCH_WINDOWS = 16
NOW = "as it is"
DIRECTIONS = {"bigram_rows": "tables", "mlp_hidden_dim": "linear layers"}
COLUMNS = ("kind", "model", *Point._fields, "bits", "loss")
CAVEATS = """One seed: how much another one would change was not measured. Repeat with another first seed before you trust a small gain.
Short trainings understate what wide layers gain later, and overstate tables, which learn fast: settle it with runs of the whole budget."""

P = TypeVar("P", bound=Params)


class Model(NamedTuple):
    """A model of the grid: what it is called, its parameters, and its weights in matrices."""

    name: str
    section: ModelSection
    num_weights: int


class Measured(NamedTuple):
    """A model, trained, and in each of `FRACTIONS` of the bytes for weights."""

    name: str
    trained: Trained
    points: list[Point]


class Bench:
    """What the trainings have in common.

    Raises:
        UserError: parameters with which no size can be met, or shards that are missing or too few.
    """

    def __init__(self, process: Process) -> None:
        self.process, self.values = process, read_params()
        self.seed = self.values["seeds"][0]
        self.calibrate, self.coding = self.parse("calibrate", CalibrateParams), self.parse("compress", CompressParams)
        quantize = self.parse("quantize", QuantizeParams)
        if quantize.target_bytes is None:
            raise ParamsError(f"{PARAMS_FILE}: quantize.target_bytes: expected a number, found null: no matrix has free steps, so that no "
                              "size can be met; set quantize.bits to free, and quantize.target_bytes to the size")
        self.now = self.model(NOW)
        section = self.now.section
        check_size(section.architecture, quantize, self.coding)
        self.num_bytes = quantize.target_bytes - self.coding.code_bytes
        self.text, self.heldout = (load_split(TOKENIZE_FOLDER / name, section.vocab_size) for name in ("train", "heldout"))
        check_corpus({name: read_json(TOKENIZE_FOLDER / name / SPLIT_FILE) for name in ("train", "heldout")})
        self.tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model", section.bos_id)

    def parse(self, name: str, kind: type[P], **changes: object) -> P:
        """A section of params.yaml with some keys changed."""
        return parse_params(self.values[name] | changes, kind, f"{PARAMS_FILE}: {name}.")

    def model(self, name: str, **changes: int) -> Model:
        """The model of params.yaml with some keys changed."""
        section = self.parse("model", ModelSection, **changes)
        gpt = outline(section.architecture.model_dump(mode="json"))
        return Model(name, section, sum(gpt.get_parameter(name).numel() for name, part in parts_of(gpt).items() if part.is_matrix))

    def models(self, key: str) -> list[Model]:
        """The grid: models with other values of a key, and the one as it is, by number of weights."""
        now, unit = self.values["model"][key], self.now.num_weights
        models = (self.now if value == now else self.model(f"{key} {value}", **{key: value}) for value in list_values(key, now))
        return [model for model in takewhile(lambda model: model.num_weights <= LARGEST * unit, models)
                if model.num_weights >= SMALLEST * unit]

    def budget(self, **budget: float) -> TrainParams:
        """Section ``train`` with ``budget_steps`` or ``budget_seconds``; without, with one part in `SHARE` of its own budget."""
        given = self.parse("train", TrainParams)
        if not budget and given.budget_seconds is not None:
            budget = {"budget_seconds": given.budget_seconds / SHARE}
        elif not budget:
            steps = given.budget_steps[-1][1] if isinstance(given.budget_steps, tuple) else given.budget_steps or 0
            budget = {"budget_steps": max(1, steps // SHARE)}
        none = dict.fromkeys(("budget_steps", "budget_seconds", "reserve_seconds", "reserve_distill_seconds"))
        return self.parse("train", TrainParams, **none | budget)

    def measure(self, model: Model, params: TrainParams) -> Measured:
        """Train, calibrate and quantize a model; nothing of it stays on disk."""
        say(f"size: {model.name}, {model.num_weights:,} weights", enabled=self.process.is_main)
        with tempfile.TemporaryDirectory() as folder:
            trained = train_checkpoint(model.section, params, self.text, self.heldout, self.tokenizer, seed=self.seed, process=self.process,
                                       resume_path=Path(folder) / "resume.pt", watch=lambda _: dict)
        checkpoint = trained.checkpoint
        hessians = calibrate(checkpoint, self.text, self.calibrate, self.seed, self.process).hessians
        reference, points = build_model(checkpoint.model, checkpoint.weights).to(self.process.device), []
        for fraction in FRACTIONS:
            quantize = self.parse("quantize", QuantizeParams, target_bytes=int(fraction * self.num_bytes),
                                  distill=self.values["quantize"]["distill"] | {"steps": 0})
            quantized, _ = quantize_model(checkpoint, parts_of(reference), hessians, quantize, process=self.process,
                                          measure=lambda found: len(pack(found, self.coding.codec, self.coding.level).blob))
            decoded = build_model(checkpoint.model, quantized.weights()).to(self.process.device)
            compared = compare_heldout(decoded.logits, reference.logits, self.heldout, self.tokenizer, process=self.process,
                                       window_tokens=params.sequence_tokens, max_tokens=quantize.heldout_tokens,
                                       batch_windows=BATCH_WINDOWS)
            num_bytes = len(pack(quantized, self.coding.codec, self.coding.level).blob)
            points.append(Point(model.num_weights, num_bytes, trained.metrics["heldout_loss"], compared.kl))
        return Measured(model.name, trained, points)


class Answer(NamedTuple):
    """What was found in one direction: a larger model, the fit, and for models of the grid what is predicted within the budget.

    Where a larger model has the higher loss, nothing is predicted of smaller ones: the line does not go on there.
    """

    larger: Measured
    direction: Direction
    predicted: dict[Model, Point]

    @property
    def best(self) -> Model:
        """The model with the least predicted loss."""
        return min(self.predicted, key=lambda model: self.predicted[model].loss)


def list_values(key: str, now: int) -> Iterable[int]:
    """Values of a key, ascending without end: rows of a table in powers of two times what they are, a width in quarters of it."""
    if key == "bigram_rows":
        return chain(sorted({now // 4, now // 2} - {1}), ((now or FIRST_ROWS) << n for n in count()))
    step = max(1, now // 4)
    return count(now % step or step, step)


def format_answers(first: Measured, answers: Mapping[str, Answer]) -> str:
    """The table of what was measured, the fits, the table of what is predicted, and the keys to set."""
    bpb_per_nat = first.trained.metrics["heldout_bpb"] / first.trained.metrics["heldout_loss"]

    def cells(point: Point) -> list[str]:
        return [f"{point.num_weights:,}", f"{point.bits:.2f}", *(f"{loss:.4f}" for loss in (
            point.float_loss, point.kl, point.loss, bpb_per_nat * point.loss))]

    figures = ["weights", "bits", "float loss", "KL", "loss", "bits per byte"]
    measured, predicted, fits, keys = [["measured", *figures, "steps", "seconds"]], [["predicted", *figures]], [], []
    for model in (first, *(answer.larger for answer in answers.values())):
        measured.append([model.name, *cells(model.points[0]), f"{model.trained.metrics['num_steps']:,}",
                         f"{model.trained.timing['seconds']:.1f}"])
    for key, answer in answers.items():
        label, direction, best, grid = DIRECTIONS[key], answer.direction, answer.best, list(answer.predicted)
        fits.append(f"{label}: float loss {direction.value:+.4f} lower for each unit of ln(weights); KL = {direction.scale:.3g} x "
                    f"2^(-{direction.rate:.3f} bits) x growth^({-direction.dilution:+.2f}), off by a factor of "
                    f"{math.exp(direction.residual):.2f} (root mean square)")
        predicted += [[f"{label}, {model.name}", *cells(answer.predicted[model])]
                      for model in dict.fromkeys((next(model for model in grid if model.name == NOW), best))]
        note = " as it is" if best.name == NOW else ", the end of the grid; measure again from there" if best in (grid[0], grid[-1]) else ""
        unknown = "" if direction.value > 0 else "; more weights lose here, and whether fewer gain was not measured"
        keys.append(f"{PARAMS_FILE}: model.{key}: {getattr(best.section, key)}{note}{unknown}")
    return "\n\n".join([align(measured, "lrrrrrrrr"), "\n".join(fits), align(predicted, "lrrrrrr"), "\n".join(keys)])


def save_answers(folder: Path, first: Measured, answers: Mapping[str, Answer]) -> None:
    """Write ``size.csv``, the measured points and the predicted ones, and ``size.svg``, the same over the bits per weight."""
    rows = [("measured", model.name, point) for model in (first, *(answer.larger for answer in answers.values())) for point in model.points]
    for key, answer in answers.items():
        rows += [(f"predicted, {DIRECTIONS[key]}", model.name, point) for model, point in answer.predicted.items()]
    write_csv(folder / "size.csv", COLUMNS, [(kind, name, *point, point.bits, point.loss) for kind, name, point in rows])
    divergences, losses = {}, {}
    for key, (larger, direction, predicted) in answers.items():
        for model in (first, larger):
            divergences[model.name] = [(point.bits, point.kl) for point in model.points]
            fitted = [direction.predict(point.num_weights, point.num_bytes) for point in model.points]
            divergences[f"{model.name}, fit of {DIRECTIONS[key]}"] = [(point.bits, point.kl) for point in fitted]
        losses[f"{DIRECTIONS[key]}, predicted"] = [(point.bits, point.loss) for point in predicted.values()]
        losses[f"{DIRECTIONS[key]}, measured"] = [(model.points[0].bits, model.points[0].loss) for model in (first, larger)]
    panels = {"KL, nats per token": divergences, "loss within the budget, nats per token": losses}
    write_bytes(folder / "size.svg", plot_panels(panels, "bits per weight", log=("KL, nats per token",)).encode())


def main() -> None:
    """Measure, print what follows, and write table and figure."""
    parser = argparse.ArgumentParser(prog="make size", usage="make size [STEPS=400] [EQUAL=steps]", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="optimizer steps of the first training")
    parser.add_argument("--equal", choices=("seconds", "steps"), default="seconds", help="what the other trainings have as many of")
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"STEPS: expected a number above 0, found {arguments.steps}")
    with start_process() as process:
        bench = Bench(process)
        grids = {key: bench.models(key) for key in DIRECTIONS}
        first = bench.measure(bench.now, bench.budget(**{} if arguments.steps is None else {"budget_steps": arguments.steps}))
        spent = {"seconds": first.trained.timing["seconds"], "steps": first.trained.metrics["num_steps"]}
        answers = {}
        for key, grid in grids.items():
            larger = next(model for model in grid if model.num_weights >= GROWTH * bench.now.num_weights)
            measured = bench.measure(larger, bench.budget(**{f"budget_{arguments.equal}": spent[arguments.equal]}))
            direction = fit_direction(first.points, measured.points)
            answers[key] = Answer(measured, direction, {model: direction.predict(model.num_weights, bench.num_bytes) for model in grid
                                                        if direction.value > 0 or model.num_weights >= bench.now.num_weights})
    if process.is_main:
        print(f"held-out text, seed {bench.seed}, equal {arguments.equal}, {bench.num_bytes:,} bytes for weights, nats per token\n")
        print(format_answers(first, answers), CAVEATS, sep="\n\n")
        save_answers(SIZE_FOLDER, first, answers)
        print(f"\n{SIZE_FOLDER / 'size.csv'}, {SIZE_FOLDER / 'size.svg'}")


if __name__ == "__main__":
    main()
