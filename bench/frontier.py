"""The recipes of #585 and #1855 side by side, small: ``python -m bench.frontier --text FILE [--seeds SEED ...] [--changes NAME ...]``.

Both get the same text and width, and as many tokens, steps and bytes; architecture, optimizer, schedule, order of the data and averages are
those of their presets, with the decay of the average scaled to the number of steps. Quantization (free steps) and evaluation are those of
the default run. Then #1855 is run with one change at a time, with the first seed. Every run is a folder of its own under --work, with a
copy of the code, in which the stages run one after the other; what is finished is kept, so that the same command goes on after an
interruption. One process and the number of threads that OMP_NUM_THREADS says.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from bench.gpu import ROOT
from bench.gpu_chain import STAGES, merge, prepare, run_module
from lib.artifacts.files import read_json
from lib.params import PARAMS_FILE, read_params
from lib.presets import DEFAULT, PRESETS_FOLDER, read_preset

HEAD_DIM = 48
FIGURES = {"parameters": ("train", "num_parameters"), "float": ("quantize", "heldout_bpb_float"), "quantized": ("quantize", "heldout_bpb"),
           "KL": ("quantize", "heldout_kl"), "bytes": ("compress", "artifact_bytes"), "plain": ("evaluate", "plain_bpb"),
           "sliding": ("evaluate", "sliding_bpb"), "lora": ("evaluate", "lora_bpb")}
STEPS = {"pr585": 6100, "pr1855": 4945}  # of the published runs
RECIPES: dict[str, dict[str, Any]] = {
    "pr585": {"model": {"num_heads": 1, "num_kv_heads": 1, "mlp_hidden_dim": 3.5, "bigram_rows": 2048, "bigram_dim": 48,
                        "value_embedding_dim": 48, "rope_base": 10_000.0, "rope_trained_tokens": None}},
    "pr1855": {"model": {"num_heads": 1, "num_kv_heads": 0.5, "mlp_hidden_dim": 4}},
}
"""Sizes: heads as shares of those that the width has, the MLP in widths."""
CHANGES: dict[str, dict[str, Any]] = {
    "no-loop": {"model": {"loop": None}, "train": {"loop_start": 0.0}},
    "relu2": {"model": {"mlp_negative_slope": 0.0}},
    "newton-schulz": {"train": {"optimizer": {"orthogonalization": "newton_schulz", "normalize_rows": "none"}}},
    "decay-of-585": {"train": {"optimizer": {"weight_decay": {"matrix": 0.04, "embedding": 0.04, "vector": 0.04}}}},
    "no-gate": {"model": {"attention_gate": False}},
    "no-lanes": {"model": {"parallel_from": None}},
    "joined-documents": {"model": {"document_mask": False}},
    "bigram-table": {"model": {"bigram_rows": 2048, "bigram_dim": 48}},
}
"""What #1855 is run with in place of what it has."""


def make_params(recipe: str, change: str | None, options: argparse.Namespace) -> dict[str, Any]:
    """All of a params.yaml."""
    values, default = (read_preset(name, ROOT / PRESETS_FOLDER) for name in (recipe, DEFAULT))
    heads, sizes = options.width // HEAD_DIM, RECIPES[recipe]["model"]
    source = {"source": "jsonl", "path": str(options.text.resolve())} if options.text else {}
    packed = values["train"]["row_tokens"] is not None and change != "joined-documents"
    changes = {
        "report": {"title": f"Albatross, {recipe} at width {options.width}"},
        "model": sizes | {"model_dim": options.width, "num_heads": heads, "num_kv_heads": int(heads * sizes["num_kv_heads"]),
                          "mlp_hidden_dim": int(options.width * sizes["mlp_hidden_dim"]), "vocab_size": options.vocabulary},
        "tokenize": default["tokenize"] | source | {"vocab_size": options.vocabulary, "heldout_fraction": options.fraction,
                                                     "val_fraction": options.fraction},
        "train": {"budget_seconds": None, "reserve_seconds": None, "budget_steps": options.steps, "sequence_tokens": options.window,
                  "row_tokens": options.rows * options.window if packed else None,
                  "batch_sequences": 1 if packed else options.rows,
                  "micro_batch_sequences": 1 if packed else options.rows, "precision": "fp32", "compile": False,
                  "averaging": {"ema_decay": values["train"]["averaging"]["ema_decay"] ** (STEPS[recipe] / options.steps)},
                  "qat": default["train"]["qat"]},
        "calibrate": default["calibrate"] | {"num_sequences": options.calibration, "num_gradient_sequences": options.calibration},
        "quantize": default["quantize"] | {"target_bytes": options.bytes},
        "compress": default["compress"] | {"limit_bytes": options.bytes},
        "evaluate": default["evaluate"] | {"strategies": ["plain", "sliding", "lora"], "strategy": "lora", "audit": False,
                                           "window_tokens": options.window, "stride_tokens": options.window // 4,
                                           "score_first": default["evaluate"]["score_first"] | {"chunk_tokens": options.window}},
    }
    return merge(merge(values, changes), CHANGES[change] if change else {})


def plan(options: argparse.Namespace) -> Iterator[tuple[str, str | None, int]]:
    """Recipe, what is changed of it, and seed of each run."""
    yield from ((recipe, None, seed) for seed in options.seeds for recipe in RECIPES)
    yield from (("pr1855", change, options.seeds[0]) for change in options.changes)


def run(recipe: str, change: str | None, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Run what is not finished, and give the figures."""
    folder, tokens = options.work / (f"{recipe}-{change}" if change else recipe), Path("artifacts/tokenize")
    params = make_params(recipe, change, options)
    if not (folder / PARAMS_FILE).exists() or read_params(folder / PARAMS_FILE) != params:
        prepare(folder, params)
    for stage in STAGES[:-1]:
        own = stage != "tokenize"
        if (folder / "artifacts" / stage / (f"seed{seed}" if own else "") / "metrics.json").exists():
            continue
        if not own and (made := options.work / "pr585" / tokens).exists():
            shutil.copytree(made, folder / tokens)
        else:
            run_module(f"stages.{stage}", folder, *(["--seed", str(seed)] if own else []))
    return {name: read_json(folder / "artifacts" / stage / f"seed{seed}" / "metrics.json")[key] for name, (stage, key) in FIGURES.items()}


def print_row(name: str, figures: dict[str, float]) -> None:
    """One line of the table."""
    cells = [f"{value:,.0f}" if value > 100 else f"{value:.4f}" for value in figures.values()]
    print(f"{name:24}" + "".join(f"{cell:>11}" for cell in cells), flush=True)


def main() -> None:
    """Print a line for each run, then the means over the seeds and their difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="JSON lines; left out: the text of the default run")
    parser.add_argument("--work", type=Path, default=Path("frontier"), help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 42, 7])
    parser.add_argument("--changes", nargs="*", choices=CHANGES, default=list(CHANGES), help="to #1855")
    parser.add_argument("--width", type=int, default=192, help=f"a multiple of {HEAD_DIM} of at least {2 * HEAD_DIM}")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--fraction", type=float, default=0.005, help="share of the documents that is held out, and that is validated on")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--rows", type=int, default=4, help="windows of a step")
    parser.add_argument("--window", type=int, default=512, help="tokens that the model sees at once")
    parser.add_argument("--calibration", type=int, default=64, help="windows that second moments are from")
    parser.add_argument("--bytes", type=int, default=1_800_000, help="size of the artifact, code included")
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    print("bits per byte: float and quantized of held-out text, plain, sliding and lora of validation text")
    print(f"{'':24}" + "".join(f"{name:>11}" for name in FIGURES), flush=True)
    found: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in RECIPES}
    for recipe, change, seed in plan(options):
        figures = run(recipe, change, seed, options)
        print_row(f"{recipe}, {change}" if change else f"{recipe}, seed {seed}", figures)
        if change is None:
            found[recipe].append(figures)
    for recipe, runs in found.items():
        print_row(f"{recipe}, mean", {name: mean(figures[name] for figures in runs) for name in FIGURES})
    for name in ("float", "quantized", "plain", "sliding", "lora"):
        gains = [one[name] - other[name] for one, other in zip(*found.values(), strict=True)]
        print(f"{name}: pr1855 is lower by {mean(gains):.4f} ± {stdev(gains) if len(gains) > 1 else 0:.4f}")


if __name__ == "__main__":
    main()
