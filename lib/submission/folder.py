"""The submission: a folder with what the challenge asks for, from which anybody can repeat the score.

``train_gpt.py`` makes ``model.ptz`` and scores it, that of the first seed, with ``tokenizer.model``; ``README.md``, ``submission.json``
and ``train_seed<seed>.log`` have the results of all seeds, ``params.yaml`` all parameters, ``requirements.txt`` the packages. Numbers come
from the files of the stages only.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lib.artifacts.files import ArtifactError, read_csv, write_bytes, write_json
from lib.artifacts.metrics import load_environment, load_timing
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.scores import load_curve
from lib.params import PARAMS_FILE
from lib.reporting.audit import CONDITIONS, VERDICTS, AuditSummary, CheckSummary, format_verdicts, judge_strategies, load_audit
from lib.reporting.config import ReportParams
from lib.reporting.strategy_table import format_strategies
from lib.reporting.table import Row, column_names
from lib.submission.description import describe, list_missing
from lib.submission.log import format_section, log_name

TEMPLATE = "submission.md.j2"
PROGRAM = "train_gpt.py"
SIZE_COLUMNS = ("part", "num_weights", "num_bytes")
LOGGED = ("train", "calibrate", "quantize", "compress", "evaluate")


class Program(NamedTuple):
    """What is submitted to be run: the `content` of ``train_gpt.py``, and the `packages` that it imports, name -> version."""

    content: bytes
    packages: Mapping[str, str]


def write_submission(folder: Path, report: ReportParams, params: Mapping[str, Any], metrics: Sequence[dict[str, dict[str, Any]]],
                     program: Program) -> None:
    """Make the folder anew.

    Args:
        folder: folder of the submission.
        report: the section ``report``.
        params: all of params.yaml.
        metrics: from `lib.reporting.summary.read_metrics`, in the order of ``seeds``.
        program: what is submitted to be run.

    Raises:
        ArtifactError: results that are missing or damaged; a program or an artifact of another size than compress counted.
    """
    seeds = params["seeds"]
    artifact = _read(stage_folder("compress", seeds[0]) / "model.ptz")
    for seed, of_seed in zip(seeds, metrics, strict=True):
        _check_size(PROGRAM, len(program.content), seed, of_seed["compress"]["code_bytes"])
    _check_size("model.ptz", len(artifact), seeds[0], metrics[0]["compress"]["blob_bytes"])
    logs = {seed: make_log(seed, of_seed) for seed, of_seed in zip(seeds, metrics, strict=True)}
    description = describe(report, params, metrics)
    readme = make_readme(report, seeds, metrics, program, list_missing(description))
    requirements = "".join(f"{name}=={version}\n" for name, version in program.packages.items())
    shutil.rmtree(folder, ignore_errors=True)
    write_bytes(folder / PROGRAM, program.content)
    write_bytes(folder / "model.ptz", artifact)
    write_bytes(folder / "tokenizer.model", _read(TOKENIZE_FOLDER / "tokenizer.model"))
    write_bytes(folder / "params.yaml", _read(PARAMS_FILE))
    write_bytes(folder / "requirements.txt", requirements.encode())
    write_json(folder / "submission.json", description)
    write_bytes(folder / "README.md", readme.encode())
    for seed, log in logs.items():
        write_bytes(folder / log_name(seed), log.encode())


def make_readme(report: ReportParams, seeds: Sequence[int], metrics: Sequence[dict[str, dict[str, Any]]], program: Program,
                missing: Sequence[str]) -> str:
    """``README.md``; arguments as of `write_submission`, and what submission.json leaves open."""
    evaluations = [of_seed["evaluate"] for of_seed in metrics]
    timings = {stage: [load_timing(stage_folder(stage, seed)) for seed in seeds] for stage in LOGGED}
    audits = [load_audit(stage_folder("evaluate", seed)) for seed in seeds]

    def row(label: str, stage: str, key: str, digits: int) -> Row:
        return Row(label, tuple(of_seed[stage][key] for of_seed in metrics), digits)

    def seconds(stage: str) -> Row:
        return Row(f"seconds, {stage}", tuple(None if timing is None else timing["seconds"] for timing in timings[stage]), 1)

    rows = [row("val_bpb", "evaluate", "val_bpb", 8), row("val_loss, nats per token", "evaluate", "val_loss", 8),
            row(f"artifact and {PROGRAM}, bytes", "compress", "artifact_bytes", 0), row("training steps", "train", "num_steps", 0),
            *map(seconds, ("train", "calibrate", "evaluate"))]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True, keep_trailing_newline=True)
    return environment.get_template(TEMPLATE).render(
        report=report, missing=missing, seeds=seeds, columns=column_names(seeds), rows=rows, log_name=log_name,
        train=metrics[0]["train"], compress=metrics[0]["compress"], evaluate=evaluations[0],
        sizes=read_csv(stage_folder("compress", seeds[0]) / "sizes.csv", SIZE_COLUMNS),
        strategies=format_strategies(evaluations, judge_strategies(audits), timings["evaluate"]),
        verdicts=format_verdicts(audits), conditions=CONDITIONS,
        checks=_checks_of(audits[0], evaluations[0]["strategy"]))


def make_log(seed: int, metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """What the stages recorded of one seed, in the order of the pipeline: the loss of training, figures, times, audit.

    Args:
        seed: seed of the run.
        metrics: stage -> figures.
    """
    return "\n".join(_log_lines(seed, metrics)) + "\n"


def _log_lines(seed: int, metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    timings = {stage: load_timing(stage_folder(stage, seed)) for stage in LOGGED}
    yield f"seed {seed}, {', '.join(load_environment(stage_folder('train', seed)) or ['from cache'])}"
    yield f"recorded by the stages of Albatross; {PROGRAM}, when it trains with this seed, writes this file anew"
    for stage in LOGGED:
        curve = load_curve(stage_folder(stage, seed) / "loss.csv", ("tokens", "loss")) if stage == "train" else ()
        yield format_section(stage, {**metrics.get(stage, {}), **(timings[stage] or {"seconds": "not measured, from cache"})}, curve)
    audit = load_audit(stage_folder("evaluate", seed))
    yield f"\n== strategies\n{format_strategies([metrics['evaluate']], judge_strategies([audit]), [timings['evaluate']])}"
    yield f"\n== audit\n{format_verdicts([audit])}"
    for strategy in audit.strategies if audit else ():
        yield f"{strategy.name}: {VERDICTS[strategy.legal].lower()}"
        yield from map(_log_check, strategy.checks)
    for name, checks in audit.groups.items() if audit else ():
        yield f"{name}:"
        yield from map(_log_check, checks)


def _log_check(check: CheckSummary) -> str:
    return f"  {check.name}: {check.result} ({check.details})"


def _checks_of(audit: AuditSummary | None, strategy: str) -> dict[str, CheckSummary]:
    """Number of each condition -> what was found for one strategy; empty where nothing was audited."""
    checks = [found.checks for found in audit.strategies if found.name == strategy] if audit else []
    return {number: check for of_strategy in checks for (number, *_), check in zip(CONDITIONS.values(), of_strategy, strict=True)}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; `dvc repro` makes it") from None


def _check_size(name: str, found: int, seed: int, counted: int) -> None:
    if found != counted:
        raise ArtifactError(f"{name}: expected {counted:,} bytes, which compress counted for seed {seed}, found {found:,}; "
                            "`dvc repro -f compress` counts anew")
