"""The seam between evaluate and report: figures, curves and tables of every strategy, the record of what happened, the audit."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.artifacts.files import ArtifactError, read_csv, write_csv, write_json
from lib.artifacts.metrics import METRICS_FILE, TIMING_FILE, save_metrics

CURVES_FOLDER, CONTEXT_FOLDER, DOCUMENTS_FOLDER, LEDGER_FOLDER, UNFINISHED_FOLDER = "curves", "context", "documents", "ledger", "unfinished"
AUDIT_FILE = "audit.json"
COLUMNS = {
    CURVES_FOLDER: ("tokens", "bpb"),
    CONTEXT_FOLDER: ("context", "tokens", "loss"),
    DOCUMENTS_FOLDER: ("length", "documents", "bytes", "bpb"),
    LEDGER_FOLDER: ("step", "kind", "state", "first", "last", "num_steps", "lr"),
    UNFINISHED_FOLDER: ("tokens", "bpb"),
}

Tables = Mapping[Any, Iterable[Sequence[object]]]


def save_scores(folder: Path, metrics: Mapping[str, Any], timing: Mapping[str, float], *, curves: Tables, context: Tables,
                documents: Tables, ledgers: Tables) -> None:
    """Write the results of an evaluation, each table by the name of its strategy.

    The folders are made anew, so that no file of a strategy that is no longer used stays behind. Where there is no room for the new
    tables, the old results stay as they were.

    Args:
        folder: the stage's output folder.
        metrics: figures that depend on the inputs alone.
        timing: figures that a clock decides.
        curves: bits per byte of the first n scored targets, as pairs (n, bits per byte).
        context: rows (inputs before the target's own at most, targets, nats per token).
        documents: rows (tokens of the document at most, documents, bytes, bits per byte).
        ledgers: what was scored and trained on, in order; targets counted from 0, ranges inclusive, state -1 for the model itself
            and the number of a document for its own adapter.
    """
    parts = {CURVES_FOLDER: curves, CONTEXT_FOLDER: context, DOCUMENTS_FOLDER: documents, LEDGER_FOLDER: ledgers}
    _save_all({folder / part: (tables, COLUMNS[part]) for part, tables in parts.items()},
              stale=[folder / name for name in (METRICS_FILE, TIMING_FILE)])
    shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
    save_metrics(folder, metrics, timing)


def save_unfinished(folder: Path, curves: Tables) -> None:
    """Write the curves of an evaluation that ran out of time, as far as they go."""
    save_tables(folder / UNFINISHED_FOLDER, curves, COLUMNS[UNFINISHED_FOLDER])


def save_audit(folder: Path, audit: Mapping[str, Any]) -> None:
    """Write what was checked and found."""
    write_json(folder / AUDIT_FILE, audit)


def save_tables(folder: Path, tables: Tables, columns: Sequence[str]) -> None:
    """Make a folder anew with one CSV file for each table; losses with 8 digits."""
    _save_all({folder: (tables, columns)})


def _save_all(folders: Mapping[Path, tuple[Tables, Sequence[str]]], stale: Iterable[Path] = ()) -> None:
    """Make folders anew, all of them or none; `stale` are files that go with the old ones."""
    temporary = {folder: folder.with_name(f".{folder.name}.tmp") for folder in folders}
    try:
        for folder, (tables, columns) in folders.items():
            shutil.rmtree(temporary[folder], ignore_errors=True)
            temporary[folder].mkdir(parents=True)
            for name, rows in tables.items():
                rounded = ([round(value, 8) if isinstance(value, float) else value for value in row] for row in rows)
                write_csv(temporary[folder] / f"{name}.csv", columns, rounded)
    except OSError:
        for path in temporary.values():
            shutil.rmtree(path, ignore_errors=True)
        raise
    for path in stale:
        path.unlink(missing_ok=True)
    for folder, path in temporary.items():
        shutil.rmtree(folder, ignore_errors=True)
        path.replace(folder)


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
