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
from lib.errors import UserError
from lib.params import PARAMS_FILE
from lib.reporting.runs import LOCK_FILE, flatten
from lib.reporting.table import NO_VALUE, align

WORKSPACE, AUDIT = "workspace", "audit"


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
_SCORED, _LIMITS = ("num_bytes", "num_documents"), ("evaluate.limit_seconds", "compress.limit_bytes")
_BPB, _TRANSDUCTIVE = "_bpb", "_transductive"  # ends of the names of a strategy's figures
FIGURES = {
    "val_bpb": Figure("evaluate", "val_bpb", 4, _SCORED, ("evaluate.strategy", *_LIMITS)),
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
        metrics: stage -> figure -> mean over the seeds; empty where the revision has no report on its parameters.
        verdict: what the audits of all seeds come to; `NO_VALUE` where no report says it.
    """

    name: str
    params: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    verdict: str

    def has(self, figure: Figure) -> bool:
        """Whether it was measured."""
        return figure.key in self.metrics.get(figure.stage, {})

    def show(self, figure: Figure) -> str:
        """It, or `NO_VALUE`."""
        return f"{self.metrics[figure.stage][figure.key]:,.{figure.digits}f}" if self.has(figure) else NO_VALUE


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
    return Revision(name, dict(flatten(params)), metrics, report.get("audit", {}).get("verdict", NO_VALUE))


def find_experiments() -> dict[str, str]:
    """Finished experiments of DVC: name -> git reference, ``refs/exps/<commit that it started from>/<name>``."""
    references = _git("for-each-ref", "--format=%(refname)", "refs/exps/??/*/*").split()
    return {reference.rsplit("/", maxsplit=1)[1]: reference for reference in references}


def changed_keys(revisions: Sequence[Revision]) -> list[str]:
    """Dotted keys of the parameters that are not the same everywhere, in the order of the file."""
    keys = dict.fromkeys(key for revision in revisions for key in revision.params)
    return [key for key in keys if any(_differ(revision.params.get(key), revisions[0].params.get(key)) for revision in revisions)]


def strategy_figures(revision: Revision) -> dict[str, Figure]:
    """Bits per byte of every strategy of a revision, by what they are called."""
    keys = [key for key in revision.metrics.get("evaluate", {}) if key.endswith(_BPB) and key != FIGURES["val_bpb"].key]
    return {f"{name.removesuffix(_TRANSDUCTIVE)} bpb{', not legal' if name.endswith(_TRANSDUCTIVE) else ''}":
            Figure("evaluate", name + _BPB, 4, _SCORED, _LIMITS) for name in (key.removesuffix(_BPB) for key in keys)}


def list_obstacles(figure: Figure, before: Revision, after: Revision) -> str:
    """Why a figure of two revisions is not subtracted: keys in which they differ; empty where it can be, or where one does not have it."""
    if not (before.has(figure) and after.has(figure)):
        return ""
    keys = [f"{figure.stage} {key}" for key in figure.same_metrics
            if before.metrics[figure.stage].get(key) != after.metrics[figure.stage].get(key)]
    keys += [key for key in changed_keys([before, after])
             if any(key == prefix or key.startswith(f"{prefix}.") for prefix in figure.same_params)]
    return f"other {', '.join(keys[:2])}{', ...' if keys[2:] else ''}" if keys else ""


def format_revisions(revisions: Sequence[Revision]) -> str:
    """Two revisions as two columns and their difference where they can be compared, more as one line each; then what cannot be compared."""
    keys, strategies = changed_keys(revisions), [strategy_figures(revision) for revision in revisions]
    notes = [f"{each.name}: no figures, for there is no report on these parameters; `make repro` makes it"
             for each in revisions if not each.metrics]
    if len(revisions) == 2:
        before, after = revisions
        lines = [["", before.name, after.name, ""]]
        lines += [[key, *(_show(revision.params.get(key)) for revision in revisions), ""] for key in keys]
        lines.append([AUDIT, before.verdict, after.verdict, ""])
        common = {label: figure for label, figure in strategies[0].items() if label in strategies[1]}
        for label, figure in (FIGURES | common).items():
            change = list_obstacles(figure, before, after) or _subtract(figure, before, after)
            lines.append([label, before.show(figure), after.show(figure), change])
        notes += [f"only {each.name}: {', '.join(label for label in own if label not in common)}"
                  for each, own in zip(revisions, strategies, strict=True) if own.keys() - common.keys()]
        return "\n".join([align(lines, "lrrr"), *notes])
    lines = [["", *keys, AUDIT, *FIGURES]]
    lines += [[revision.name, *(_show(revision.params.get(key)) for key in keys), revision.verdict, *map(revision.show, FIGURES.values())]
              for revision in revisions]
    for other in revisions[1:]:
        obstacles = {label: found for label, figure in FIGURES.items() if (found := list_obstacles(figure, revisions[0], other))}
        notes += [f"{other.name}: {label} is not to be compared with {revisions[0].name}: {found}" for label, found in obstacles.items()]
    return "\n".join([align(lines, "l" + "r" * (len(lines[0]) - 1)), *notes])


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


def _subtract(figure: Figure, before: Revision, after: Revision) -> str:
    if not (before.has(figure) and after.has(figure)):
        return ""
    old, new = (revision.metrics[figure.stage][figure.key] for revision in (before, after))
    return f"{new - old:+,.{figure.digits}f}"


def _differ(value: Any, other: Any) -> bool:
    return type(value) is not type(other) or value != other


def _show(value: Any) -> str:
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


if __name__ == "__main__":
    main()
