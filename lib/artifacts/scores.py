"""The seam between evaluate and report: figures, curves and tables of every strategy, the record of what happened, the audit, examples."""

import io
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.artifacts.files import ArtifactError, read_csv, read_json, write_bytes, write_csv, write_json
from lib.artifacts.metrics import METRICS_FILE, TIMING_FILE, save_metrics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

CURVES_FOLDER, CONTEXT_FOLDER, DOCUMENTS_FOLDER, LEDGER_FOLDER, UNFINISHED_FOLDER = "curves", "context", "documents", "ledger", "unfinished"
NATS_FOLDER = "nats"
AUDIT_FILE = "audit.json"
EXAMPLES_FILE = "examples.json"
COLUMNS = {
    CURVES_FOLDER: ("tokens", "bpb"),
    CONTEXT_FOLDER: ("context", "tokens", "loss"),
    DOCUMENTS_FOLDER: ("length", "documents", "bytes", "bpb"),
    LEDGER_FOLDER: ("step", "kind", "state", "first", "last", "num_steps", "lr"),
    UNFINISHED_FOLDER: ("tokens", "bpb"),
}

Tables = Mapping[Any, Iterable[Sequence[object]]]
Writer = Callable[[Path], None]


def save_scores(folder: Path, metrics: Mapping[str, Any], timing: Mapping[str, float], *, curves: Tables, context: Tables,
                documents: Tables, ledgers: Tables, nats: "Mapping[Any, npt.NDArray[np.float32]]") -> None:
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
        ledgers: what was scored and trained on, in order; targets counted from 0, ranges inclusive, state -1 for the model itself,
            else the number of an adapter.
        nats: loss of each target, (N,) fp32, to the last bit: what replays of the run are compared with.
    """
    parts = {CURVES_FOLDER: curves, CONTEXT_FOLDER: context, DOCUMENTS_FOLDER: documents, LEDGER_FOLDER: ledgers}
    _save_all({folder / part: _list_tables(tables, COLUMNS[part]) for part, tables in parts.items()}
              | {folder / NATS_FOLDER: {f"{name}.npy": partial(_write_nats, values=values) for name, values in nats.items()}},
              stale=[folder / name for name in (METRICS_FILE, TIMING_FILE)])
    shutil.rmtree(folder / UNFINISHED_FOLDER, ignore_errors=True)
    save_metrics(folder, metrics, timing)


def load_nats(folder: Path, name: str) -> "npt.NDArray[np.float32]":
    """The losses of a strategy, (N,) fp32, that `save_scores` wrote.

    Raises:
        ArtifactError: missing, or no such array.
    """
    import numpy as np  # noqa: PLC0415 (as below: the summary, which needs none, starts in half the time)
    path = folder / NATS_FOLDER / f"{name}.npy"
    try:
        nats = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path}: expected the losses that evaluate writes ({error}); "
                            "`dvc repro -f evaluate` makes the file anew") from None
    if nats.dtype != np.float32 or nats.ndim != 1:
        raise ArtifactError(f"{path}: expected one dimension of float32, found {nats.ndim} of {nats.dtype}; "
                            "`dvc repro -f evaluate` makes the file anew")
    return nats


def save_unfinished(folder: Path, curves: Tables) -> None:
    """Write the curves of an evaluation that ran out of time, as far as they go."""
    save_tables(folder / UNFINISHED_FOLDER, curves, COLUMNS[UNFINISHED_FOLDER])


def save_audit(folder: Path, audit: Mapping[str, Any]) -> None:
    """Write what was checked and found."""
    write_json(folder / AUDIT_FILE, audit)


def save_examples(folder: Path, examples: Mapping[str, Any]) -> None:
    """Write what `lib.generation.examples.make_examples` has made."""
    write_json(folder / EXAMPLES_FILE, examples)


def load_examples(folder: Path) -> dict[str, Any]:
    """What `save_examples` wrote.

    Raises:
        ArtifactError: missing or damaged.
    """
    examples: dict[str, Any] = read_json(folder / EXAMPLES_FILE)
    return examples


def save_tables(folder: Path, tables: Tables, columns: Sequence[str]) -> None:
    """Make a folder anew with one CSV file for each table; losses with 8 digits."""
    _save_all({folder: _list_tables(tables, columns)})


def _list_tables(tables: Tables, columns: Sequence[str]) -> dict[str, Writer]:
    return {f"{name}.csv": partial(_write_table, rows=rows, columns=columns) for name, rows in tables.items()}


def _write_table(path: Path, rows: Iterable[Sequence[object]], columns: Sequence[str]) -> None:
    write_csv(path, columns, ([round(value, 8) if isinstance(value, float) else value for value in row] for row in rows))


def _write_nats(path: Path, values: "npt.NDArray[np.float32]") -> None:
    import numpy as np  # noqa: PLC0415
    content = io.BytesIO()
    np.save(content, values)
    write_bytes(path, content.getvalue())


def _save_all(folders: Mapping[Path, Mapping[str, Writer]], stale: Iterable[Path] = ()) -> None:
    """Make folders anew, all of them or none, of files by name; `stale` are files that go with the old ones."""
    temporary = {folder: folder.with_name(f".{folder.name}.tmp") for folder in folders}
    try:
        for folder, files in folders.items():
            shutil.rmtree(temporary[folder], ignore_errors=True)
            temporary[folder].mkdir(parents=True)
            for name, write in files.items():
                write(temporary[folder] / name)
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
