"""The seam between evaluate and report: figures, running bits per byte, and the record of what adaptation did."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.artifacts.files import ArtifactError, read_csv, write_csv
from lib.artifacts.metrics import save_metrics

CURVES_FOLDER = "curves"
ADAPTATION_FOLDER = "adaptation"
CURVE_COLUMNS = ("tokens", "bpb")
ADAPTATION_COLUMNS = ("chunk", "first_scored", "last_scored", "first_trained", "last_trained", "num_steps", "lr")


def save_scores(folder: Path, metrics: Mapping[str, Any], timing: Mapping[str, float], curves: Mapping[str, Iterable[tuple[int, float]]],
                adaptations: Mapping[str, Iterable[Sequence[object]]]) -> None:
    """Write the results of an evaluation.

    The folders of ``curves/running_<name>.csv`` and ``adaptation/<name>.csv`` are made anew, so that no file of a strategy
    that is no longer used stays behind.

    Args:
        folder: the stage's output folder.
        metrics: figures that depend on the inputs alone.
        timing: figures that a clock decides.
        curves: name -> bits per byte of the first n scored targets, as pairs (n, bits per byte).
        adaptations: name -> one row of `ADAPTATION_COLUMNS` for each chunk; targets counted from 0, ranges inclusive, None for no target.
    """
    for part in (CURVES_FOLDER, ADAPTATION_FOLDER):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)  # outputs of the stage, which must exist even where there is nothing to say
    for name, curve in curves.items():
        write_csv(folder / CURVES_FOLDER / f"running_{name}.csv", CURVE_COLUMNS, ((n, round(bpb, 8)) for n, bpb in curve))
    for name, rows in adaptations.items():
        write_csv(folder / ADAPTATION_FOLDER / f"{name}.csv", ADAPTATION_COLUMNS, rows)
    save_metrics(folder, metrics, timing)


def load_curve(path: Path, columns: tuple[str, str]) -> list[tuple[float, float]]:
    """Two columns of numbers of a CSV file.

    Raises:
        ArtifactError: missing, without these columns, or not numbers.
    """
    rows = read_csv(path, columns)
    try:
        return [(float(row[columns[0]]), float(row[columns[1]])) for row in rows]
    except ValueError as error:
        raise ArtifactError(f"{path}: expected numbers ({error}); `dvc repro -f` makes the file anew") from None
