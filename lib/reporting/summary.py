"""The figures of a run, all seeds side by side: ``python -m lib.reporting.summary`` prints the table that ends ``make repro``.

Numbers come from the stages' figures only. Nothing heavy is imported: the table appears at once.
"""

import statistics
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.params import ParamsError, read_params

STAGES = ("train", "calibrate", "quantize", "compress", "evaluate")  # those that run once for each seed
STAGES_WITH_FIGURES = ("train", "quantize", "compress", "evaluate")
FROM_CACHE = "from cache"
NO_VALUE = "-"


class Row(NamedTuple):
    """One figure.

    Attributes:
        label: what it is.
        values: one for each seed; None where there is none.
        digits: after the decimal point.
        note: what to compare it with, or why a value is missing.
    """

    label: str
    values: tuple[float | None, ...]
    digits: int
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None unless every seed has a value."""
        values = [value for value in self.values if value is not None]
        return statistics.fmean(values) if len(values) == len(self.values) else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds, None unless there are at least two and every seed has a value."""
        values = [value for value in self.values if value is not None]
        return statistics.stdev(values) if len(values) == len(self.values) > 1 else None

    def cells(self) -> list[str]:
        """The values as text; with several seeds followed by mean and standard deviation."""
        values = self.values if len(self.values) == 1 else (*self.values, self.mean, self.std)
        return [NO_VALUE if value is None else f"{value:,.{self.digits}f}" for value in values]


def column_names(seeds: Sequence[int]) -> list[str]:
    """Names of the columns that `Row.cells` fills."""
    return [f"seed {seed}" for seed in seeds] + (["mean", "std"] if len(seeds) > 1 else [])


def read_metrics(seeds: Sequence[int]) -> list[dict[str, dict[str, Any]]]:
    """Stage -> figures, for each seed.

    Raises:
        ArtifactError: figures that are missing or damaged.
    """
    return [{stage: load_metrics(stage_folder(stage, seed)) for stage in STAGES_WITH_FIGURES} for seed in seeds]


def headline_rows(metrics: Sequence[dict[str, dict[str, Any]]]) -> list[Row]:
    """What a run is judged by, from the result of `read_metrics`."""

    def row(label: str, stage: str, key: str, digits: int, note: str = "") -> Row:
        return Row(label, tuple(figures[stage].get(key) for figures in metrics), digits, note)

    float_model = row("held-out bpb, float model", "quantize", "heldout_bpb_float", 4)
    quantized = row("held-out bpb, quantized model", "quantize", "heldout_bpb", 4)
    plain = row("validation bpb, plain", "evaluate", "plain_bpb", 4)
    sliding = row("validation bpb, sliding windows", "evaluate", "sliding_bpb", 4)
    ttt = row("validation bpb, score-first TTT", "evaluate", "ttt_bpb", 4)
    artifact = row("artifact, bytes", "compress", "artifact_bytes", 0)
    limit = row("limit", "compress", "limit_bytes", 0)
    divergence = row("KL of the quantized model", "quantize", "heldout_kl", 5, "nats per token, held-out")
    bits = row("bits per weight, coded", "quantize", "coded_bits", 2)
    return [
        float_model,
        quantized._replace(note=_difference(quantized, float_model)),
        divergence,
        plain,
        sliding._replace(note=_difference(sliding, plain)),
        ttt._replace(note=_difference(ttt, sliding)),
        artifact._replace(note=_ratio(artifact, limit, "{:.1%} of the limit of " + limit.cells()[0])),
        bits,
    ]


def timing_rows(seeds: Sequence[int]) -> list[Row]:
    """Seconds of each stage and of all; a stage whose outputs came from the cache has none."""
    tokenize = _seconds(load_timing(TOKENIZE_FOLDER))
    columns = {"tokenize": tuple(tokenize for _ in seeds)}
    columns |= {stage: tuple(_seconds(load_timing(stage_folder(stage, seed))) for seed in seeds) for stage in STAGES}
    total = tuple(_total(times) for times in zip(*columns.values(), strict=True))
    return [Row(f"seconds, {name}", times, 1, FROM_CACHE if None in times and name != "all stages" else "")
            for name, times in (*columns.items(), ("all stages", total))]


def format_table(rows: Sequence[Row], seeds: Sequence[int]) -> str:
    """Rows as aligned lines of text under the names of the columns."""
    table = [["", *column_names(seeds), ""], *([row.label, *row.cells(), row.note] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:-1], widths[1:-1]), line[-1]]) for line in table)
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    """Print the figures of all seeds of params.yaml."""
    try:
        seeds = read_params()["seeds"]
        print(format_table([*headline_rows(read_metrics(seeds)), *timing_rows(seeds)], seeds))
    except (ArtifactError, ParamsError) as error:
        sys.exit(str(error))


def _seconds(timing: dict[str, float] | None) -> float | None:
    return None if timing is None else timing["seconds"]


def _total(times: Sequence[float | None]) -> float | None:
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if len(known) == len(times) else None


def _difference(row: Row, reference: Row) -> str:
    return f"{row.mean - reference.mean:+.4f}" if row.mean is not None and reference.mean is not None else ""


def _ratio(row: Row, reference: Row, text: str) -> str:
    return text.format(row.mean / reference.mean) if row.mean is not None and reference.mean else ""


if __name__ == "__main__":
    main()
