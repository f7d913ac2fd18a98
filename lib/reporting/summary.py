"""The figures of a run, all seeds side by side: ``python -m lib.reporting.summary`` prints the tables that end ``make repro``.

Numbers come from the stages' figures only. Nothing heavy is imported: the tables appear at once.
"""

import sys
from collections.abc import Sequence
from typing import Any

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import METRICS_FILE, load_metrics, load_timing
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.params import ParamsError, read_params
from lib.reporting.audit import format_verdicts, load_audit
from lib.reporting.strategies import format_strategies
from lib.reporting.table import Row, align, column_names, difference, ratio

STAGES = ("train", "calibrate", "quantize", "compress", "evaluate")  # those that run once for each seed
STAGES_WITH_FIGURES = ("train", "quantize", "compress", "evaluate")
SUMMARIZED = ("quantize", "compress", "evaluate")  # stages whose figures `headline_rows` shows; an imported artifact has no others
FROM_CACHE = "from cache"


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
        artifact._replace(note=ratio(artifact, limit, "{:.1%} of the limit of " + limit.cells()[0])),
        *imported,
        float_model,
        quantized._replace(note=difference(quantized, float_model)),
        row("KL of the quantized model", "quantize", "heldout_kl", 5, "nats per token, held-out"),
        row("bits per weight, coded", "quantize", "coded_bits", 2),
    ]


def timing_rows(seeds: Sequence[int]) -> list[Row]:
    """Seconds of each stage and of all, memory of evaluate; a stage whose outputs came from the cache has none."""
    def column(stage: str, key: str = "seconds") -> tuple[float | None, ...]:
        timings = [load_timing(TOKENIZE_FOLDER if stage == "tokenize" else stage_folder(stage, seed)) for seed in seeds]
        return tuple(None if timing is None else timing[key] for timing in timings)

    columns = {stage: column(stage) for stage in ("tokenize", *STAGES) if stage == "tokenize" or _has_run(stage, seeds)}
    total = tuple(_total(times) for times in zip(*columns.values(), strict=True))
    rows = [Row(f"seconds, {name}", times, 1, FROM_CACHE if None in times else "") for name, times in columns.items()]
    return [*rows, Row("seconds, all stages", total, 1), Row("peak memory of evaluate, MiB", column("evaluate", "peak_memory_mib"), 0)]


def format_summary(seeds: Sequence[int]) -> str:
    """All tables, from the files of the working directory.

    Raises:
        ArtifactError: figures that are missing or damaged.
    """
    metrics, folders = read_metrics(seeds, SUMMARIZED), [stage_folder("evaluate", seed) for seed in seeds]
    strategies = format_strategies([of_seed["evaluate"] for of_seed in metrics], [load_timing(folder) for folder in folders])
    audit = f"audit: {format_verdicts([load_audit(folder) for folder in folders])}"
    return "\n\n".join([format_table(headline_rows(metrics), seeds), f"{strategies}\n{audit}", format_table(timing_rows(seeds), seeds)])


def format_table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Rows as aligned lines of text under the names of the columns."""
    lines = [["", *column_names(seeds), ""], *([row.label, *row.cells(), row.note] for row in rows)]
    return align(lines, "l" + "r" * (len(lines[0]) - 2) + "l")


def main() -> None:
    """Print the figures of all seeds of params.yaml."""
    try:
        print(format_summary(read_params()["seeds"]))
    except (ArtifactError, ParamsError) as error:
        sys.exit(str(error))


def _has_run(stage: str, seeds: Sequence[int]) -> bool:
    return any((stage_folder(stage, seed) / METRICS_FILE).exists() for seed in seeds)


def _total(times: Sequence[float | None]) -> float | None:
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if len(known) == len(times) else None


if __name__ == "__main__":
    main()
