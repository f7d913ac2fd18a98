"""Where strategies differ: along the text, by what they could see, by length of document. Their tables, made ready for figures."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from lib.artifacts.files import ArtifactError, read_csv
from lib.artifacts.scores import COLUMNS, CONTEXT_FOLDER, CURVES_FOLDER, DOCUMENTS_FOLDER, load_curve
from lib.reporting.figures import Points
from lib.reporting.strategy_table import REFERENCE, StrategyRow

CURVE = ("tokens", "bpb")
MIN_SHARE = 0.01
"""Fraction of all targets, at least, that a point of the loss by context stands for: fewer have a mean that says little."""

Curves = dict[str, Points]
"""Label of the strategy -> curve, the mean over the seeds."""


class DocumentBin(NamedTuple):
    """Documents of similar length.

    Attributes:
        length: tokens of the longest of them, at most.
        documents: how many there are.
        num_bytes: bytes of all of them.
        bpb: label of the strategy -> bits per byte, mean over the seeds.
    """

    length: int
    documents: int
    num_bytes: int
    bpb: dict[str, float]


def line_styles(strategies: Sequence[StrategyRow]) -> dict[str, str]:
    """Label -> line style: dotted without adaptation, dashed where the score is not legal, else solid."""
    return {each.label: "--" if each.legal is False else "-" if each.adapts else ":" for each in strategies}


def running_curves(folders: Sequence[Path], strategies: Sequence[StrategyRow]) -> Curves:
    """Bits per byte of the first n targets; `folders` are those of evaluate, one for each seed.

    Raises:
        ArtifactError: a table that is missing or damaged. So do the other functions that take folders.
    """
    return {each.label: _average([load_curve(folder / CURVES_FOLDER / f"{each.name}.csv", CURVE) for folder in folders])
            for each in strategies}


def differences(curves: Curves) -> Curves:
    """Difference of each curve from that of `REFERENCE`, which has the same horizontal values; none where that was not run."""
    if REFERENCE not in curves:
        return {}
    return {name: [(x, y - base) for (x, y), (_, base) in zip(curve, curves[REFERENCE], strict=True)] for name, curve in curves.items()}


def context_curves(folders: Sequence[Path], strategies: Sequence[StrategyRow]) -> Curves:
    """Mean loss by the number of inputs that a prediction sees, from `join_bins`."""
    return {each.label: _average([join_bins(_load_rows(folder, CONTEXT_FOLDER, each.name)) for folder in folders]) for each in strategies}


def join_bins(bins: Sequence[Mapping[str, float]]) -> Points:
    """Points (most inputs, the target's own included; nats per token), two for each doubling where there are targets enough.

    Args:
        bins: ``context``, ``tokens`` and ``loss`` of each, in order of the context.
    """
    required = MIN_SHARE * sum(each["tokens"] for each in bins)
    points: list[tuple[float, float]] = []
    tokens = nats = 0.0
    for _, group in groupby(bins, lambda each: math.ceil(2 * math.log2(each["context"] + 1))):
        for each in group:
            tokens += each["tokens"]
            nats += each["tokens"] * each["loss"]
        if tokens >= required:  # or wait for more
            points.append((each["context"] + 1, nats / tokens))
            tokens = nats = 0.0
    return points


def document_bins(folders: Sequence[Path], strategies: Sequence[StrategyRow]) -> list[DocumentBin]:
    """Bits per byte by length of document, of all strategies."""
    tables = {each.label: [_load_rows(folder, DOCUMENTS_FOLDER, each.name) for folder in folders] for each in strategies}
    return [DocumentBin(int(row["length"]), int(row["documents"]), int(row["bytes"]),
                        {label: fmean(of_seed[number]["bpb"] for of_seed in table) for label, table in tables.items()})
            for number, row in enumerate(next(iter(tables.values()))[0])]


def document_curves(bins: Sequence[DocumentBin]) -> Curves:
    """Bits per byte against the length of documents, one curve for each strategy."""
    return {label: [(each.length, each.bpb[label]) for each in bins] for label in bins[0].bpb}


def _average(curves: Sequence[Points]) -> Points:
    """Means of curves that have the same horizontal values, as all seeds score the same targets in the same windows."""
    return [(points[0][0], fmean(y for _, y in points)) for points in zip(*curves, strict=True)]


def _load_rows(folder: Path, part: str, name: str) -> list[dict[str, float]]:
    path = folder / part / f"{name}.csv"
    try:
        return [{column: float(cell) for column, cell in row.items()} for row in read_csv(path, COLUMNS[part])]
    except ValueError as error:
        raise ArtifactError(f"{path}: expected numbers ({error}); `dvc repro -f` makes the file anew") from None
