"""How long the stages took, against their limits, and what they ran on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.artifacts.metrics import METRICS_FILE, load_environment, load_timing
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.reporting.runs import STAGES
from lib.reporting.table import Row

FROM_CACHE = "from cache"
TIMED = ("tokenize", *STAGES)


def timing_rows(params: Mapping[str, Any]) -> list[Row]:
    """Seconds of stages that have run, of compilation and of all, memory of evaluate; a stage whose outputs came from the cache has none.

    Args:
        params: all of params.yaml.
    """
    def column(stage: str, key: str = "seconds") -> tuple[float | None, ...]:
        timings = [load_timing(_folder(stage, seed)) for seed in params["seeds"]]
        return tuple(None if timing is None else timing.get(key) for timing in timings)

    columns, limits = {stage: column(stage) for stage in TIMED if _has_run(stage, params["seeds"])}, _limits(params)
    total = tuple(_total(times) for times in zip(*columns.values(), strict=True))
    rows = [Row(f"seconds, {stage}", times, 1, _note(times, limits.get(stage))) for stage, times in columns.items()]
    if any(distilling := column("quantize", "distill_seconds")):
        rows.append(Row("seconds, quantize, distilling", distilling, 1, _note(distilling, limits.get("distill"))))
    if any(compiling := column("evaluate", "compile_seconds")):
        rows.append(Row("seconds, evaluate, compiling", compiling, 1, "part of evaluate"))
    return [*rows, Row("seconds, all stages", total, 1), Row("peak memory of evaluate, MiB", column("evaluate", "peak_memory_mib"), 0)]


def list_environments(seeds: Sequence[int]) -> dict[str, str]:
    """What stages ran on -> the names of these stages, with the seed where seeds differ; in order of the stages."""
    found: dict[str, list[str]] = {}
    for stage in TIMED:
        texts = [_environment(_folder(stage, seed)) for seed in seeds]
        for seed, text in zip(seeds, texts, strict=True):
            name = stage if len(set(texts)) == 1 else f"{stage}@{seed}"
            found[text] = [*found.get(text, ()), *([name] if name not in found.get(text, ()) else ())]
    return {text: ", ".join(names) for text, names in found.items()}


def _environment(folder: Path) -> str:
    environment = load_environment(folder)
    return FROM_CACHE if environment is None else ", ".join(environment)


def _folder(stage: str, seed: int) -> Path:
    return TOKENIZE_FOLDER if stage == "tokenize" else stage_folder(stage, seed)


def _has_run(stage: str, seeds: Sequence[int]) -> bool:
    return any((_folder(stage, seed) / METRICS_FILE).exists() for seed in seeds)


def _limits(params: Mapping[str, Any]) -> dict[str, float | None]:
    """Seconds that a stage may take; None or absent where there is no limit."""
    budget, reserve, distill = (params["train"][key] for key in ("budget_seconds", "reserve_seconds", "reserve_distill_seconds"))
    return {"train": budget and budget - (reserve or 0) - (distill or 0), "calibrate": reserve, "distill": distill,
            "evaluate": params["evaluate"]["limit_seconds"]}


def _note(times: Sequence[float | None], limit: float | None) -> str:
    """How much of the limit was used, by the seed that took longest."""
    known = [seconds for seconds in times if seconds is not None]
    notes = [f"{max(known) / limit:.1%} of the limit of {limit:g}"] if known and limit else []
    return ", ".join(notes + ([FROM_CACHE] if len(known) < len(times) else []))


def _total(times: Sequence[float | None]) -> float | None:
    known = [seconds for seconds in times if seconds is not None]
    return sum(known) if len(known) == len(times) else None
