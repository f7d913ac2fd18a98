"""Commits, branches and experiments side by side: ``python -m tools.compare [REVISION...]`` (``make compare REVS="..."``).

Shown are the parameters that differ and the figures that a run is judged by, means over its seeds. Nothing is run: parameters come
from each revision's params.yaml, figures from the report that was committed with it, provided that it is of these parameters.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML

from lib.artifacts.metrics import METRICS_FILE
from lib.artifacts.paths import REPORT_FOLDER
from lib.errors import UserError, report_errors
from lib.params import PARAMS_FILE
from lib.reporting.runs import LOCK_FILE, flatten
from lib.reporting.table import NO_VALUE, align

WORKSPACE = "workspace"


class Figure(NamedTuple):
    """What a run is judged by.

    Attributes:
        stage: the stage that has it among its metrics.
        key: its name there.
        digits: after the decimal point.
        same_metrics: metrics of the same stage; figures of runs that differ in them are not subtracted, because they are of another text.
        same_params: the same of parameters, sections or keys: the runs were to do different things.
    """

    stage: str
    key: str
    digits: int
    same_metrics: tuple[str, ...] = ()
    same_params: tuple[str, ...] = ()


_HELDOUT = ("heldout_tokens",), ("tokenize",)
FIGURES = {
    "val_bpb": Figure("evaluate", "val_bpb", 4, ("num_bytes", "num_documents"),
                      ("evaluate.strategy", "evaluate.limit_seconds", "compress.limit_bytes")),
    "held-out bpb": Figure("quantize", "heldout_bpb", 4, *_HELDOUT),
    "held-out bpb, float": Figure("quantize", "heldout_bpb_float", 4, *_HELDOUT),
    "KL": Figure("quantize", "heldout_kl", 5, *_HELDOUT),
    "bytes": Figure("compress", "artifact_bytes", 0),
}
"""The figures, by what they are called."""


class Revision(NamedTuple):
    """What is known of one revision.

    Attributes:
        name: as it was asked for.
        params: dotted key -> value.
        figures: name in `FIGURES` -> mean over the seeds; empty where the revision has no report on its parameters.
        metrics: stage -> figure -> mean over the seeds; the same holds.
    """

    name: str
    params: dict[str, Any]
    figures: dict[str, float]
    metrics: dict[str, dict[str, float]]


class RevisionError(UserError):
    """A revision that cannot be read."""


def read_revision(name: str, experiments: Mapping[str, str]) -> Revision:
    """Parameters and figures of a commit, branch, tag or experiment, or of the `WORKSPACE`.

    Args:
        name: name of the revision.
        experiments: from `find_experiments`.

    Raises:
        RevisionError: no such revision, or one without a parameter file.
    """
    revision = experiments.get(name, name)
    text = _read(revision, PARAMS_FILE)
    if text is None:
        raise RevisionError(f"{name}: expected a commit, branch, tag or experiment with a {PARAMS_FILE}, found none; `git log` and "
                            "`dvc exp list` show what there is")
    params = _parse(text)
    lock = _parse(_read(revision, LOCK_FILE) or "stages: {}")["stages"]
    is_reported = lock.get("report", {}).get("params", {}).get(str(PARAMS_FILE)) == params
    report = json.loads((is_reported and _read(revision, REPORT_FOLDER / METRICS_FILE)) or "{}")
    metrics = {stage: {key: value["mean"] for key, value in figures.items() if isinstance(value, dict) and "mean" in value}
               for stage, figures in report.items()}
    figures = {label: metrics[figure.stage][figure.key] for label, figure in FIGURES.items() if figure.key in metrics.get(figure.stage, {})}
    return Revision(name, dict(flatten(params)), figures, metrics)


def find_experiments() -> dict[str, str]:
    """Finished experiments of DVC: name -> git reference, ``refs/exps/<commit that it started from>/<name>``."""
    references = _git("for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").split()
    return {reference.rsplit("/", maxsplit=1)[1]: reference for reference in references}


def changed_keys(revisions: Sequence[Revision]) -> list[str]:
    """Dotted keys of the parameters that are not the same everywhere, in the order of the file."""
    keys = dict.fromkeys(key for revision in revisions for key in revision.params)
    return [key for key in keys if any(_differ(revision.params.get(key), revisions[0].params.get(key)) for revision in revisions)]


def list_obstacles(figure: Figure, before: Revision, after: Revision) -> list[str]:
    """Why a figure of two revisions is not subtracted: keys in which they differ."""
    keys = [f"{figure.stage} {key}" for key in figure.same_metrics
            if before.metrics[figure.stage].get(key) != after.metrics[figure.stage].get(key)]
    return keys + [key for key in changed_keys([before, after])
                   if any(key == prefix or key.startswith(f"{prefix}.") for prefix in figure.same_params)]


def format_revisions(revisions: Sequence[Revision]) -> str:
    """Two revisions as two columns and their difference where they can be compared, more as one line each."""
    keys = changed_keys(revisions)
    if len(revisions) == 2:
        before, after = revisions
        lines = [["", before.name, after.name, ""]]
        lines += [[key, *(_show(revision.params.get(key)) for revision in revisions), ""] for key in keys]
        for label, figure in FIGURES.items():
            both = label in before.figures and label in after.figures
            obstacles = list_obstacles(figure, before, after) if both else []
            change = f"{after.figures[label] - before.figures[label]:+,.{figure.digits}f}" if both else ""
            lines.append([label, *(_figure(revision, label) for revision in revisions),
                          f"other {', '.join(obstacles[:2])}{', ...' if obstacles[2:] else ''}" if obstacles else change])
        return align(lines, "lrrr")
    lines = [["", *keys, *FIGURES]]
    lines += [[revision.name, *(_show(revision.params.get(key)) for key in keys), *(_figure(revision, label) for label in FIGURES)]
              for revision in revisions]
    return align(lines, "l" + "r" * (len(lines[0]) - 1))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revisions", nargs="*", metavar="REVISION", help="commits, branches, tags, experiments, or \"workspace\"; "
                        "one is compared with the workspace, none: HEAD, the workspace, and all experiments of HEAD")
    names, experiments = parser.parse_args().revisions, find_experiments()
    if not names:
        head = _git("rev-parse", "HEAD").strip()
        names = ["HEAD", WORKSPACE, *(name for name, reference in experiments.items() if f"/{head[:2]}/{head[2:]}/" in reference)]
    try:
        print(format_revisions([read_revision(name, experiments) for name in (names if len(names) > 1 else [*names, WORKSPACE])]))
    except RevisionError as error:
        sys.exit(str(error))


def _read(revision: str, path: Path) -> str | None:
    """Text of a file as it was; None where there was none."""
    try:
        return path.read_text(encoding="utf-8") if revision == WORKSPACE else _git("show", f"{revision}:{path.as_posix()}")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None


def _parse(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, encoding="utf-8", check=True).stdout


def _figure(revision: Revision, label: str) -> str:
    return f"{revision.figures[label]:,.{FIGURES[label].digits}f}" if label in revision.figures else NO_VALUE


def _differ(value: Any, other: Any) -> bool:
    return type(value) is not type(other) or value != other


def _show(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)



if __name__ == "__main__":
    report_errors()
    main()
