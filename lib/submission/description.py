"""``submission.json``: what the challenge's records say of themselves, from the figures and times of the stages."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lib.artifacts.metrics import load_date, load_environment, load_timing
from lib.artifacts.paths import stage_folder
from lib.reporting.audit import format_verdicts, load_audit, worst
from lib.reporting.config import ReportParams
from lib.reporting.table import Row

LIMIT_SECONDS, LIMIT_BYTES, RECORD_SEEDS = 600.0, 16_000_000, 3  # of the challenge: training, evaluation; code and artifact; seeds
RECORD_HARDWARE = ("H100", "8 processes")
AUDIT_PASSED = "audit_passed"  # a condition that may stay open, for a person to decide; one that failed may not
TRACK, OTHER_TRACK = "10min_16mb", "non_record_16mb"  # the challenge's names
SOURCES: dict[str, tuple[str, Callable[[Mapping[str, Any], str], bool]]] = {
    "architecture": ("entries #585 and #410", lambda params, strategy: True),
    "muon": ("K. Jordan, kellerjordan.github.io/posts/muon", lambda params, strategy: True),
    "exclusive_self_attention": ("entry #585", lambda params, strategy: params["model"]["num_xsa_layers"] > 0),
    "quantization_aware_training": ("entry #585", lambda params, strategy: params["train"]["qat"]["below_lr"] > 0),
    "gptq": ("arXiv:2210.17323", lambda params, strategy: params["quantize"]["method"] == "gptq"),
    "score_first_ttt": ("entry #585", lambda params, strategy: strategy == "score_first"),
    "lora_ttt": ("history of entry #410; arXiv:2106.09685", lambda params, strategy: strategy in ("lora", "phased")),
}
"""Technique -> where it comes from, and whether it is used, by all of params.yaml and the strategy of ``val_bpb``."""

Metrics = Sequence[Mapping[str, Mapping[str, Any]]]
"""From `lib.reporting.summary.read_metrics`, in the order of the seeds."""


def describe(report: ReportParams, params: Mapping[str, Any], metrics: Metrics) -> dict[str, Any]:
    """What ``submission.json`` says, under the names that the challenge's records use; None where something is not known.

    Scores are means over the seeds, with several seeds beside their standard deviation; seconds and bytes are those of the worst seed.

    Args:
        report: the section ``report``.
        params: all of params.yaml.
        metrics: figures of the seeds.
    """
    seeds, strategy = params["seeds"], metrics[0]["evaluate"]["strategy"]
    rows = {key: Row(key, tuple(of_seed["evaluate"][key] for of_seed in metrics), 8) for key in ("val_loss", "val_bpb")}
    statistics = {key: row.mean for key, row in rows.items()} | {f"{key}_std": row.std for key, row in rows.items()}
    environment = load_environment(stage_folder("train", seeds[0]))
    *versions, device, processes = environment or ["", ""]
    compliance = _check_compliance(seeds, metrics, params["quantize"]["distill"]["steps"])
    is_kept = all(kept for condition, kept in compliance.items() if condition != AUDIT_PASSED) and compliance[AUDIT_PASSED] is not False
    is_record = is_kept and all(part in f"{device}, {processes}" for part in RECORD_HARDWARE)
    return {
        "author": report.submission.author, "github_id": report.submission.github_id, "name": report.title,
        "blurb": report.submission.blurb, "date": load_date(stage_folder("evaluate", seeds[-1])),
        "track": TRACK if is_record else OTHER_TRACK,
        **{key: round(value, 8) for key, value in statistics.items() if value is not None},
        "bytes_total": max(of_seed["compress"]["artifact_bytes"] for of_seed in metrics),
        "bytes_code": metrics[0]["compress"]["code_bytes"],
        "seeds": list(seeds),
        "seed_results": {str(seed): {"val_loss": of_seed["evaluate"]["val_loss"], "val_bpb": of_seed["evaluate"]["val_bpb"],
                                     "artifact_bytes": of_seed["compress"]["artifact_bytes"], "steps": of_seed["train"]["num_steps"]}
                         for seed, of_seed in zip(seeds, metrics, strict=True)},
        "hardware": f"{device}, {processes}" if environment else None,
        "versions": dict(name.rsplit(" ", 1) for name in versions) if environment else None,
        "technique_summary": _summarize(params, metrics[0]),
        "compliance": compliance,
        "attribution": {name: source for name, (source, is_used) in SOURCES.items() if is_used(params, strategy)},
    }


def list_missing(description: Mapping[str, Any]) -> list[str]:
    """Dotted keys of a description that have no value."""
    nested = [f"{name}.{key}" for name, values in description.items() if isinstance(values, Mapping) for key in list_missing(values)]
    return [name for name, value in description.items() if value is None] + nested


def _check_compliance(seeds: Sequence[int], metrics: Metrics, distill_steps: int) -> dict[str, Any]:
    training = [("train", "seconds"), ("calibrate", "seconds")] + [("quantize", "distill_seconds")] * bool(distill_steps)
    train, evaluate = (_largest_seconds(seeds, times) for times in (training, [("evaluate", "seconds")]))
    audits = [load_audit(stage_folder("evaluate", seed)) for seed in seeds]
    return {
        "train_seconds": train, "train_under_600s": train and train <= LIMIT_SECONDS,
        "artifact_under_16mb": max(of_seed["compress"]["artifact_bytes"] for of_seed in metrics) <= LIMIT_BYTES,
        "eval_seconds": evaluate, "eval_under_600s": evaluate and evaluate <= LIMIT_SECONDS,
        "audit": format_verdicts(audits), AUDIT_PASSED: worst(*(audit and audit.legal for audit in audits)),
        "three_seeds": len(seeds) >= RECORD_SEEDS,
    }


def _largest_seconds(seeds: Sequence[int], times: Sequence[tuple[str, str]]) -> float | None:
    """Some times, (stage, key) each, together, of the seed that took longest; None where one was not measured."""
    of_seeds = [[(load_timing(stage_folder(stage, seed)), key) for stage, key in times] for seed in seeds]
    totals = [sum(timing.get(key, 0.0) for timing, key in timings if timing) if all(timing is not None for timing, _ in timings) else None
              for timings in of_seeds]
    known = [total for total in totals if total is not None]
    return round(max(known), 3) if len(known) == len(totals) else None


def _summarize(params: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> str:
    model, quantize = params["model"], params["quantize"]
    weights = "an imported checkpoint" if "imported" in metrics["train"] else f"Muon and AdamW, weights: {metrics['train']['selected']}"
    steps = "grids of fixed bits" if quantize["target_bytes"] is None else "a step for each row and column, chosen for the size"
    return (f"{model['num_layers']} layers of width {model['model_dim']}, {model['vocab_size']} pieces; {weights}; "
            f"{quantize['method']} with {steps}, codec {params['compress']['codec']}; scored by {metrics['evaluate']['strategy']}")
