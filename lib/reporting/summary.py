"""The figures of a run, their means and each seed's, as tables of text.

Numbers come from the stages' figures only. Nothing heavy is imported: the tables appear at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.paths import stage_folder
from lib.reporting.audit import format_verdicts, judge_strategies, load_audit
from lib.reporting.config import RecordParams
from lib.reporting.runs import UNRECORDED
from lib.reporting.statistics import compare_with_record
from lib.reporting.strategy_table import format_strategies
from lib.reporting.table import Row, align, column_names, difference, ratio, statistics_names
from lib.reporting.timing import timing_rows

STAGES_WITH_FIGURES = ("train", "quantize", "compress", "evaluate")
SUMMARIZED = ("quantize", "compress", "evaluate")  # stages whose figures `headline_rows` shows; an imported artifact has no others
SEED_COLUMNS = {"validation bpb (val_bpb)": "val_bpb", "validation loss (val_loss)": "val_loss",
                "held-out bpb, quantized model": "held-out bpb", "artifact, bytes": "bytes", "seconds, train": "train, s",
                "seconds, evaluate": "evaluate, s"}
"""Row of the headline or of the times -> title of its column in the table of seeds."""


def read_metrics(seeds: Sequence[int], stages: Sequence[str] = STAGES_WITH_FIGURES) -> list[dict[str, dict[str, Any]]]:
    """Stage -> figures, for each seed.

    Raises:
        ArtifactError: figures that are missing or damaged.
    """
    return [{stage: load_metrics(stage_folder(stage, seed)) for stage in stages} for seed in seeds]


def headline_rows(metrics: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """What a run is judged by, from the result of `read_metrics`."""

    def row(label: str, stage: str, key: str, digits: int, note: str = "") -> Row:
        return Row(label, tuple(figures[stage].get(key) for figures in metrics), digits, note)

    evaluate = metrics[0]["evaluate"]
    float_model = row("held-out bpb, float model", "quantize", "heldout_bpb_float", 4)
    quantized = row("held-out bpb, quantized model", "quantize", "heldout_bpb", 4)
    artifact = row("artifact, bytes", "compress", "artifact_bytes", 0)
    limit = row("limit", "compress", "limit_bytes", 0)
    imported = [row("imported artifact, bytes", "quantize", "imported_bytes", 0, metrics[0]["quantize"]["imported"])
                ] if "imported" in metrics[0]["quantize"] else []
    return [
        row("validation bpb (val_bpb)", "evaluate", "val_bpb", 4, f"{evaluate.get('strategy')}, {evaluate['num_bytes']:,} bytes of text"),
        loss_row(metrics),
        artifact._replace(note=ratio(artifact, limit, "{:.1%} of the limit of " + limit.cells()[0])),
        *imported,
        float_model,
        quantized._replace(note=difference(quantized, float_model)),
        row("KL of the quantized model", "quantize", "heldout_kl", 5, "nats per token, held-out"),
        row("bits per weight, coded", "quantize", "coded_bits", 2),
    ]


def loss_row(metrics: Sequence[dict[str, dict[str, Any]]]) -> Row:
    """What is tested against the record, in nats per token."""
    return Row("validation loss (val_loss)", tuple(figures["evaluate"]["val_loss"] for figures in metrics), 4, "nats per token")


def seed_lines(rows: Sequence[Row], seeds: Sequence[int]) -> list[list[str]]:
    """Titles, then one line for each seed; with several followed by mean and standard deviation.

    Args:
        rows: those of `SEED_COLUMNS` among others.
        seeds: what the values of `rows` belong to.
    """
    named = {row.label: row for row in rows}
    columns = [[title, *named[label].cells()] for label, title in SEED_COLUMNS.items()]
    return [list(line) for line in zip(["", *column_names(seeds)], *columns, strict=True)]


def format_summary(params: Mapping[str, Any], record: RecordParams, *, recorded: bool) -> str:
    """All tables, from the files of the working directory.

    Args:
        params: all of params.yaml.
        record: what the seeds are tested against.
        recorded: whether DVC's record was found to agree, from `check_runs`.

    Raises:
        ArtifactError: figures that are missing or damaged.
    """
    seeds = params["seeds"]
    metrics, folders = read_metrics(seeds, SUMMARIZED), [stage_folder("evaluate", seed) for seed in seeds]
    test, audits = compare_with_record(loss_row(metrics), record), [load_audit(folder) for folder in folders]
    strategies = format_strategies([of_seed["evaluate"] for of_seed in metrics], judge_strategies(audits),
                                   [load_timing(folder) for folder in folders])
    audit = f"audit: {format_verdicts(audits)}"
    headline, times = headline_rows(metrics), timing_rows(params)
    by_seed = seed_lines([*headline, *times], seeds)[:1 + len(seeds)] if len(seeds) > 1 else []
    return "\n\n".join([
        *([] if recorded else [UNRECORDED]), format_table(headline, seeds),
        *([align(by_seed, "l" + "r" * len(SEED_COLUMNS))] if by_seed else []),
        *([f"{test.headline}\n{test.evidence}".strip()] if record.loss else []), f"{strategies}\n{audit}", format_table(times, seeds)])


def format_table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """The one seed's values, or mean and standard deviation, as aligned lines of text under the names of the columns."""
    lines = [["", *statistics_names(seeds), ""], *([row.label, *row.statistics_cells(), row.note] for row in rows)]
    return align(lines, "l" + "r" * (len(lines[0]) - 2) + "l")
