"""Bits per byte against seconds: ways to score the artifact of the default run, on the HELD-OUT documents.

``python -m bench.curve`` after ``make repro``. Held-out documents are part of the training documents that no stage trained on, so that
settings of evaluate may be chosen by this table; validation text is not read. Every way runs twice and the faster run counts: other
work on the machine only adds time. A way is on the front (*) if no faster one has as few bits per byte.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from bench.evaluate import Stopwatch, run_once
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import load_split
from lib.compression.container import load_artifact
from lib.data.tokenizer import load_tokenizer
from lib.distributed import start_process
from lib.evaluation.bpb import make_score
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Outcome
from lib.evaluation.score import Forward, load_stream
from lib.evaluation.windows import find_documents
from lib.model.gpt import build_model
from lib.params import parse_params, read_params
from lib.progress import say
from lib.reporting.figures import STYLE

FIGURE = Path(__file__).with_suffix(".svg")
COLORS: dict[StrategyName, str] = {"plain": "#6b6b6b", "sliding": "#1f5fa8", "one_pass": "#3b8a4a", "score_first": "#d9661f",
                                   "lora": "#8a4f9e", "phased": "#b23a48"}


class Way(NamedTuple):
    """A strategy, what is changed in the section ``evaluate``, and the words for it."""

    strategy: StrategyName
    settings: str
    changes: dict[str, Any]


class Point(NamedTuple):
    """What a way takes and gives."""

    way: Way
    seconds: float
    bpb: float


def list_ways() -> list[Way]:
    """All that is compared."""
    ways = [Way("plain", "", {})]
    ways += [Way("sliding", f"window {window}, stride {stride}", {"window_tokens": window, "stride_tokens": stride})
             for window, stride in ((256, 128), (256, 64), (256, 32), (256, 16), (384, 128), (512, 256))]
    ways += [Way("one_pass", f"attention {attention}, segments {segment}", {"window_tokens": attention, "segment_tokens": segment})
             for attention, segment in ((256, 512), (256, 1024), (256, 2048), (320, 1024), (384, 1024))]
    ways += [Way("score_first", f"{windows}, chunk {chunk}, epochs {epochs}",
                 {"score_first": {"windows": windows, "chunk_tokens": chunk, "epochs": epochs}})
             for windows in ("sliding", "one_pass") for chunk in (256, 512, 1024) for epochs in (1, 2)]
    ways += [Way("score_first", f"one_pass, attention 384, chunk {chunk}, epochs 1",
                 {"window_tokens": 384, "score_first": {"windows": "one_pass", "chunk_tokens": chunk, "epochs": 1}})
             for chunk in (384, 768)]
    ways += [Way("lora", f"window {window}, chunk {chunk}", {"lora": {"window_tokens": window, "chunk_tokens": chunk}})
             for window in (256, 384) for chunk in (32, 64, 128)]
    return [*ways, Way("phased", "", {})]


def change(section: dict[str, Any], way: Way) -> EvaluateParams:
    """The section ``evaluate`` as one way has it, checked like a parameter file."""
    values = section | {"strategies": [way.strategy], "strategy": way.strategy}
    for key, value in way.changes.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    if "score_first" not in way.changes:
        values["score_first"] = values["score_first"] | {"chunk_tokens": values["window_tokens"]}  # not used, but must fit
    return parse_params(values, EvaluateParams, f"{way.strategy}: evaluate.")


def find_front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both seconds and bits per byte, by seconds."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.seconds, point.bpb)):
        if not front or point.bpb < front[-1].bpb:
            front.append(point)
    return front


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the figure, the front as a line."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.2), layout="constrained")
        axes = figure.subplots()
        front = find_front(points)
        axes.plot([point.seconds for point in front], [point.bpb for point in front], color="#bbbbbb", linewidth=1, zorder=1)
        for strategy, color in COLORS.items():
            some = [point for point in points if point.way.strategy == strategy]
            axes.plot([point.seconds for point in some], [point.bpb for point in some], "o", color=color, markersize=4, label=strategy)
        axes.set(xscale="log", xlabel="seconds", ylabel="bits per byte, held-out")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("{x:g}")
        axes.legend()
        figure.savefig(path, format="svg", metadata={"Date": None})


def run_ways(ways: Sequence[Way], run: Callable[[Way], Outcome], target_bytes: npt.NDArray[np.int64], stopwatch: Stopwatch,
             repeats: int) -> list[Point]:
    """Run all, one after the other, several times, and say what each run gave."""
    points: dict[int, Point] = {}
    for _ in range(repeats):
        for number, way in enumerate(ways):
            seconds, outcome = stopwatch.time(partial(run, way))
            best = min(seconds, points[number].seconds if number in points else math.inf)
            points[number] = Point(way, best, make_score(outcome.nats, target_bytes).bpb)
            say(f"{way.strategy} {way.settings}: {points[number].bpb:.4f} bpb in {seconds:.2f} s")
    return list(points.values())


def main() -> None:
    """Measure, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processor-time", action="store_true", help="count processor time, for a CPU that does other work as well")
    parser.add_argument("--repeats", type=int, default=2, help="runs of each way, of which the fastest counts")
    options = parser.parse_args()
    values = read_params()
    with start_process() as process:
        stopwatch = Stopwatch(process, options.processor_time)
        artifact = load_artifact(stage_folder("compress", values["seeds"][0]) / "model.ptz")
        model = build_model(artifact.model, artifact.weights()).to(process.device)
        tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
        tokens = load_split(TOKENIZE_FOLDER / "heldout", model.params.vocab_size).tokens()
        stream, documents = load_stream(tokens, process.device), find_documents(tokens, tokenizer.bos_id)

        def run(way: Way) -> Outcome:
            params = change(values["evaluate"], way)
            return run_once(way.strategy, Forward(model, params.precision), stream, documents, params=params, process=process)

        points = run_ways(list_ways(), run, tokenizer.target_bytes(tokens), stopwatch, options.repeats)
    front = find_front(points)
    print(f"{stopwatch.describe()}; {model.num_parameters:,} parameters, "
          f"{values['evaluate']['precision']}, not compiled; {len(tokens) - 1:,} held-out targets in {len(documents.start)} documents; "
          f"the faster of {options.repeats} runs")
    print(f"{'':2}{'strategy':13}{'settings':44}{'bpb':>8}{'seconds':>9}{'targets/s':>12}")
    for point in sorted(points, key=lambda point: point.seconds):
        print(f"{'* ' if point in front else '  '}{point.way.strategy:13}{point.way.settings:44}{point.bpb:8.4f}{point.seconds:9.2f}"
              f"{(len(tokens) - 1) / point.seconds:12,.0f}")
    draw(points, FIGURE)


if __name__ == "__main__":
    main()
