"""``report.html``: one file that needs no other and no network, the same bytes for the same results."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lib.artifacts.files import read_csv
from lib.artifacts.paths import stage_folder
from lib.artifacts.scores import CURVE_COLUMNS, CURVES_FOLDER, load_curve
from lib.reporting.figures import plot_curves, plot_steps
from lib.reporting.summary import Row, column_names, headline_rows

TEMPLATE = "report.html.j2"
RUNNING_CURVES = {"plain": "plain", "sliding": "sliding windows", "ttt": "score-first TTT"}
TENSOR_COLUMNS = ("name", "role", "method", "rows", "columns", "bits", "step", "entropy_bits", "coded_bytes", "relative_error",
                  "relative_error_rtn", "sensitivity", "predicted_loss", "rank")
SIZE_COLUMNS = ("part", "num_tensors", "num_weights", "bits", "coded_bits", "num_bytes")


def make_report(title: str, params: Mapping[str, Any], metrics: Sequence[dict[str, dict[str, Any]]]) -> str:
    """The report on all seeds.

    Args:
        title: headline.
        params: all of params.yaml.
        metrics: from `read_metrics`, in the order of ``seeds``.

    Raises:
        ArtifactError: results that are missing or damaged.
    """
    seeds = params["seeds"]
    rows = headline_rows(metrics)
    tensors = read_csv(stage_folder("quantize", seeds[0]) / "tensors.csv", TENSOR_COLUMNS)
    sizes = read_csv(stage_folder("compress", seeds[0]) / "sizes.csv", SIZE_COLUMNS)
    loss = [load_curve(stage_folder("train", seed) / "loss.csv", ("tokens", "loss")) for seed in seeds]
    running = {label: [load_curve(stage_folder("evaluate", seed) / CURVES_FOLDER / f"running_{name}.csv", CURVE_COLUMNS) for seed in seeds]
               for name, label in RUNNING_CURVES.items() if f"{name}_bpb" in metrics[0]["evaluate"]}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)
    return environment.get_template(TEMPLATE).render(
        title=title,
        seeds=seeds,
        columns=column_names(seeds),
        rows=rows,
        budget=_image(plot_steps(_budget(rows), "bits per byte")),
        loss=_image(plot_curves({"training loss": loss}, "training tokens", "nats per token")),
        running=_image(plot_curves(running, "validation tokens scored", "bits per byte of all so far", unsettled=0.1)),
        train=metrics[0]["train"],
        evaluate=metrics[0]["evaluate"],
        quantize=metrics[0]["quantize"],
        compress=metrics[0]["compress"],
        tensors=tensors,
        sizes=sizes,
        params={section: list(_flatten(values)) for section, values in params.items()},
    )


def make_metrics(metrics: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Stage -> figure -> ``mean`` over the seeds and, with several seeds, ``std``; every figure that is a number for all seeds."""
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for stage, figures in metrics[0].items():
        summary[stage] = {}
        for key in figures:
            values = [of_seed[stage].get(key) for of_seed in metrics]
            if all(isinstance(value, int | float) for value in values):
                row = Row(key, tuple(values), 0)
                statistics = {"mean": row.mean, "std": row.std}
                summary[stage][key] = {name: round(value, 8) for name, value in statistics.items() if value is not None}
    return summary


def _budget(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        group, separator, name = row.label.partition(" bpb, ")
        if separator and row.mean is not None:
            groups.setdefault(group, {})[name] = row.mean
    return groups


def _image(svg: str) -> Markup:
    return Markup("data:image/svg+xml;base64,{}").format(base64.b64encode(svg.encode()).decode())


def _flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if not isinstance(values, Mapping):
        elements = values if isinstance(values, list) else [values]
        yield prefix, ", ".join(value if isinstance(value, str) else json.dumps(value) for value in elements)
        return
    for key, value in values.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else key)
