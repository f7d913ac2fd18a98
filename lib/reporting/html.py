"""``report.html``: one file that needs no other and no network, the same bytes for the same results."""

import base64
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup

from lib.artifacts.files import read_csv
from lib.artifacts.paths import stage_folder
from lib.artifacts.scores import load_curve, load_examples
from lib.reporting.audit import CONDITIONS, VERDICTS, format_verdicts, judge_strategies, load_audit, worst
from lib.reporting.config import ReportParams
from lib.reporting.figures import plot_curves, plot_dots, plot_points, plot_steps
from lib.reporting.passage import HIGHEST, PassagePart, templates
from lib.reporting.runs import UNRECORDED, flatten
from lib.reporting.scoring import (
    Curves,
    context_curves,
    differences,
    document_bins,
    document_curves,
    line_styles,
    running_curves,
)
from lib.reporting.statistics import compare_with_record
from lib.reporting.strategy_table import LEGAL, REFERENCE, WITHOUT_ADAPTATION, StrategyRow, find_strategies
from lib.reporting.summary import headline_rows, loss_row, seed_lines
from lib.reporting.table import Row, column_names, statistics_names
from lib.reporting.timing import list_environments, timing_rows

TEMPLATE = "report.html.j2"
TENSOR_COLUMNS = ("name", "role", "method", "rows", "columns", "bits", "step", "entropy_bits", "coded_bytes", "relative_error",
                  "relative_error_rtn", "sensitivity", "predicted_loss", "rank")
ERRORS: dict[str, Callable[[Mapping[str, str]], float]] = {
    "predicted loss, nats per token": lambda tensor: float(tensor["predicted_loss"]),
    "relative error of the outputs": lambda tensor: float(tensor["relative_error"]),
}
"""What is drawn of every matrix: label of the axis -> value, from its row of the table."""
TRAINING_CURVES = {"training": "loss.csv", "held-out": "heldout.csv"}
"""Text -> file of train with the loss on it."""
CANDIDATES = ("raw", "ema", "swa")
"""Weights that train chooses from."""
SIZE_COLUMNS = ("part", "num_tensors", "num_weights", "bits", "coded_bits", "num_bytes")


def make_report(report: ReportParams, params: Mapping[str, Any], metrics: Sequence[dict[str, dict[str, Any]]], *, recorded: bool) -> str:
    """The report on all seeds.

    Args:
        report: headline, and what the seeds are tested against.
        params: all of params.yaml.
        metrics: from `read_metrics`, in the order of ``seeds``.
        recorded: whether DVC's record was found to agree, from `check_runs`.

    Raises:
        ArtifactError: results that are missing or damaged.
    """
    seeds = params["seeds"]
    folders = [stage_folder("evaluate", seed) for seed in seeds]
    audits = [load_audit(folder) for folder in folders]
    strategies = find_strategies([of_seed["evaluate"] for of_seed in metrics], judge_strategies(audits))
    running, bins = running_curves(folders, strategies), document_bins(folders, strategies)
    tensors = read_csv(stage_folder("quantize", seeds[0]) / "tensors.csv", TENSOR_COLUMNS)
    sizes = read_csv(stage_folder("compress", seeds[0]) / "sizes.csv", SIZE_COLUMNS)
    trained = {f"{text}, seed {seed}": load_curve(stage_folder("train", seed) / name, ("tokens", "loss"))
               for text, name in TRAINING_CURVES.items() for seed in seeds}
    learning: Curves = {name: curve for name, curve in trained.items() if curve}
    measured = [name for name in learning if name.startswith("held-out")]
    examples = load_examples(folders[0])
    points = examples["documents"]["points"]
    change = f"bits per byte, difference to {REFERENCE}"
    headline, times = headline_rows(metrics), timing_rows(params)

    def plot(curves: Curves, x_label: str, y_label: str, *, unsettled: float = 0, octaves: bool = False) -> Markup | None:
        if not curves:
            return None
        dashes = line_styles(strategies) | dict.fromkeys(measured, "--")
        return _image(plot_curves(curves, x_label, y_label, unsettled=unsettled, octaves=octaves, dashes=dashes))

    return templates().get_template(TEMPLATE).render(
        title=report.title,
        unrecorded="" if recorded else UNRECORDED,
        seeds=seeds,
        columns=column_names(seeds),
        statistics=statistics_names(seeds),
        headline=headline,
        by_seed=seed_lines([*headline, *times], seeds),
        test=compare_with_record(loss_row(metrics), report.record),
        strategies=strategies,
        reference=REFERENCE,
        budget=_image(plot_steps(_budget(metrics, strategies), "bits per byte")),
        learning=plot(learning, "training tokens", "nats per token", unsettled=0.1),
        measured=measured,
        running=plot(running, "validation tokens scored", "bits per byte of all so far", unsettled=0.1),
        gains=plot(differences(running), "validation tokens scored", change, unsettled=0.1),
        context=plot(context_curves(folders, strategies), "inputs, at most", "nats per token", octaves=True),
        bins=bins,
        lengths=plot(differences(document_curves(bins)), "tokens of the document, at most", change, octaves=True),
        conditions=CONDITIONS,
        audit=audits[0],
        judged=judge_strategies(audits[:1]),
        words=LEGAL,
        verdicts=format_verdicts(audits),
        train=metrics[0]["train"],
        candidates=", ".join(f"{name} {metrics[0]['train'][key]:.4f}" for name in CANDIDATES
                             if (key := f"heldout_bpb_{name}") in metrics[0]["train"]),
        evaluate=metrics[0]["evaluate"],
        quantize=metrics[0]["quantize"],
        compress=metrics[0]["compress"],
        tensors=tensors,
        errors=_image(plot_dots(*_by_layer(tensors, ERRORS))),
        prices=_image(plot_dots(*_by_layer(tensors, {"bytes for each bit of predicted loss": bytes_per_bit}))),
        not_drawn=[tensor["name"] for tensor in tensors if not float(tensor["predicted_loss"])],
        written=examples["written"],
        passages=list_passages(examples["passage"]),
        place=examples["passage"],
        highest=HIGHEST,
        points=_image(plot_points([(length, bpb) for length, _, bpb in points], "tokens of the document", "bits per byte")),
        num_points=(len(points), examples["documents"]["total"]),
        sizes=sizes,
        times=times,
        environments=list_environments(seeds),
        kernels=list(dict.fromkeys(of_seed["train"]["attention"] for of_seed in metrics if "attention" in of_seed["train"])),
        params={section: [(key, _format(value)) for key, value in flatten(values)] for section, values in params.items()},
    )


def make_metrics(report: ReportParams, seeds: Sequence[int], metrics: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Stage -> figure -> ``mean`` over the seeds and, with several seeds, ``std``; every figure that is a number for all seeds.

    And ``record``, the test of the seeds against the record of `report`, and ``audit`` with the ``verdict`` on all seeds.

    Raises:
        ArtifactError: an audit that is missing or damaged.
    """
    summary: dict[str, dict[str, Any]] = {}
    for stage, figures in metrics[0].items():
        summary[stage] = {}
        for key in figures:
            values = [of_seed[stage].get(key) for of_seed in metrics]
            if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
                row = Row(key, tuple(values), 0)
                statistics = {"mean": row.mean, "std": row.std}
                summary[stage][key] = {name: round(value, 8) for name, value in statistics.items() if value is not None}
    audits = [load_audit(stage_folder("evaluate", seed)) for seed in seeds]
    return summary | {"record": compare_with_record(loss_row(metrics), report.record).figures(),
                      "audit": {"verdict": VERDICTS[worst(*(audit and audit.legal for audit in audits))]}}


def _budget(metrics: Sequence[dict[str, dict[str, Any]]], strategies: Sequence[StrategyRow]) -> dict[str, dict[str, float]]:
    """Means of what follows from each other: float model to quantized model, and windows to the strategy that counts."""
    held_out = {name: fmean(of_seed["quantize"][key] for of_seed in metrics)
                for name, key in (("float", "heldout_bpb_float"), ("quantized", "heldout_bpb"))}
    wanted = (*WITHOUT_ADAPTATION, metrics[0]["evaluate"]["strategy"])
    return {"held-out": held_out, "validation": {each.name: each.bpb.mean for each in strategies if each.name in wanted and each.bpb.mean}}


def list_passages(passage: Mapping[str, Any]) -> dict[str, tuple[list[PassagePart], float]]:
    """Strategy -> the parts of a passage, and its bits per token, from ``examples.json``."""
    found = {}
    for number, strategy in enumerate(passage["strategies"]):
        parts = [PassagePart(text, bits[number], num_tokens) for text, num_tokens, *bits in passage["parts"]]
        found[strategy] = parts, sum(part.bits for part in parts) / max(1, sum(part.num_tokens for part in parts))
    return found


def bytes_per_bit(tensor: Mapping[str, str]) -> float:
    """Bytes of a matrix over the bits per token that quantizing it is predicted to cost; 0 where it costs none or has no bytes."""
    bits = float(tensor["predicted_loss"]) / math.log(2)
    return int(tensor["coded_bytes"]) / bits if bits > 0 and tensor["coded_bytes"] else 0.0


def _image(svg: str) -> Markup:
    return Markup("data:image/svg+xml;base64,{}").format(base64.b64encode(svg.encode()).decode())


def _by_layer(tensors: Sequence[Mapping[str, str]],
              values: Mapping[str, Callable[[Mapping[str, str]], float]]) -> tuple[dict[str, dict[str, dict[str, float]]], list[str]]:
    """Figure of values by layer and kind of matrix, and its rows: what is in no layer, then layer by layer."""
    panels: dict[str, dict[str, dict[str, float]]] = {label: {} for label in values}
    layers, others = set(), []
    for tensor in tensors:
        name = tensor["name"].removesuffix(".weight")
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layers.add(int(match[1]))
            row, kind = f"layer {match[1]}", match[2]
        else:
            others.append(name)
            row, kind = name, "in no layer"
        for label, value in values.items():
            panels[label].setdefault(kind, {})[row] = value(tensor)
    return panels, [*others, *(f"layer {number}" for number in sorted(layers))]


def _format(value: Any) -> str:
    elements = value if isinstance(value, list) else [value]
    return ", ".join(each if isinstance(each, str) else json.dumps(each) for each in elements)
