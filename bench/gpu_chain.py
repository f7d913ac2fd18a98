"""The whole pipeline without DVC, on text and tokenizer of a bundle: ``python -m bench.gpu_chain [--seconds 120] [--smoke]``.

The preset pr585 with one seed on one GPU, and so many seconds of training. Stages run as modules in a folder of their own, one
after the other; the summary at the end has their figures and times. The smoke size is a tiny model, with all strategies and the
thorough audit.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.gpu import BUNDLE, PARAMS, PRESET, ROOT, TOKENIZER, find_text
from lib.artifacts.files import write_json
from lib.data.tokenizer import load_tokenizer
from lib.params import PARAMS_FILE
from lib.presets import DEFAULT, PRESETS_FOLDER, read_preset

SEED = 1337
WORK = "work"
STAGES = ("tokenize", "train", "calibrate", "quantize", "compress", "evaluate", "report")
SEQUENCES = 48  # one of eight GPUs' share of #585
RESERVE_SECONDS = 60.0  # for calibrate, on one GPU
LIMIT_BYTES = 24_000_000  # what training for minutes leaves compresses less than what training to the end does
SMOKE: dict[str, Any] = {
    "model": {"num_layers": 2, "model_dim": 64, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 64, "num_xsa_layers": 1,
              "bigram_rows": 64, "bigram_dim": 8, "value_embedding_dim": 8, "value_embedding_layers": [1]},
    "tokenize": {"heldout_fraction": 0.05, "val_fraction": 0.005},
    "train": {"budget_seconds": None, "budget_steps": 4, "reserve_seconds": None, "sequence_tokens": 64, "row_tokens": None,
              "batch_sequences": 4, "micro_batch_sequences": 4, "precision": "fp32", "compile": False},
    "calibrate": {"num_sequences": 8, "num_gradient_sequences": 4, "batch_sequences": 4},
    "quantize": {"heldout_tokens": 2000},
    "evaluate": {"strategies": ["plain", "sliding", "one_pass", "score_first", "lora", "phased"], "window_tokens": 64, "stride_tokens": 32,
                 "segment_tokens": 128, "batch_tokens": 4096, "precision": "fp32", "compile": False,
                 "score_first": {"chunk_tokens": 256, "epochs": 1, "batch_sequences": 8},
                 "lora": {"window_tokens": 64, "chunk_tokens": 32},
                 "phased": {"documents": 1, "batch_sequences": 8}},
}


def merge(old: Any, new: Any) -> Any:
    """Nested mappings `old` with the values of `new`, whose keys `old` must have where it is a mapping."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merge(old[key], value) for key, value in new.items()}


def make_params(bundle: Path, seconds: float, smoke: bool) -> dict[str, Any]:
    """All of a params.yaml.

    Args:
        bundle: its text is split as the default run splits it, so that its tokenizer has been trained on training documents.
        seconds: seconds of training.
        smoke: whether `SMOKE` changes the sizes.
    """
    tokenizer = load_tokenizer(bundle / TOKENIZER)
    values, default = (read_preset(name, ROOT / PRESETS_FOLDER) for name in (PRESET, DEFAULT))
    changes = {
        "seeds": [SEED], "report": {"title": f"Albatross, {PRESET} for {seconds:g} seconds on one device"},
        "model": {"vocab_size": tokenizer.vocab_size, "bos_id": tokenizer.bos_id},
        "tokenize": default["tokenize"] | {"source": "jsonl", "path": str(find_text(bundle)), "tokenizer": str(bundle / TOKENIZER),
                               "vocab_size": tokenizer.vocab_size, "case_transform": tokenizer.case_transform},
        "train": {"budget_seconds": seconds + RESERVE_SECONDS, "reserve_seconds": RESERVE_SECONDS, "batch_sequences": SEQUENCES,
                  "micro_batch_sequences": SEQUENCES},
        "compress": {"limit_bytes": LIMIT_BYTES},
        "evaluate": {"strategies": ["plain", "sliding", "one_pass", "score_first", "lora"]},
    }
    return merge(merge(values, changes), SMOKE) if smoke else merge(values, changes)


def prepare(folder: Path, params: dict[str, Any]) -> None:
    """A new folder in which stages can run: code, the description of the pipeline, parameters."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("lib", "stages", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "dvc.yaml", folder)
    write_json(folder / PARAMS_FILE, params)  # JSON is YAML


def run_module(name: str, folder: Path, *arguments: str) -> None:
    """Run a module of the folder in a process of its own.

    Raises:
        SystemExit: it failed; the message is its name.
    """
    status = subprocess.run([sys.executable, "-m", name, *arguments], cwd=folder, check=False).returncode
    if status:
        print(f"{name} failed with status {status}", flush=True)
        sys.exit(1)


def main() -> None:
    """Run all stages, then print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="folder that `make gpu-bundle` filled")
    parser.add_argument("--seconds", type=float, default=120.0, help="of training")
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--only-parameters", action="store_true", help=f"only write the parameters, to {PARAMS} in the bundle")
    options = parser.parse_args()
    bundle = options.bundle.resolve()
    params, folder = make_params(bundle, options.seconds, options.smoke), bundle / WORK
    if options.only_parameters:
        write_json(bundle / PARAMS, params)
        return
    prepare(folder, params)
    os.environ["TQDM_DISABLE"] = "1"
    run_module("tools.check_params", folder)
    for stage in STAGES:
        run_module(f"stages.{stage}", folder, *([] if stage in ("tokenize", "report") else ["--seed", str(SEED)]))
    if options.smoke:
        run_module("tools.audit", folder)
    run_module("tools.summary", folder)


if __name__ == "__main__":
    main()
