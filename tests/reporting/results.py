"""What the stages before the report write, small and with made-up numbers."""

import math
from pathlib import Path
from typing import Any

from lib.artifacts.files import write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.scores import save_scores
from lib.reporting.html import SIZE_COLUMNS, TENSOR_COLUMNS

PARAMS = """
seeds: {seeds}
model: {{num_layers: 2, tied_head: true}}
tokenize: {{packages: [numpy, scipy]}}
train: {{budget_steps: null}}
calibrate: {{}}
quantize: {{bits: {{mlp: 5, head: 8}}}}
compress: {{}}
evaluate: {{}}
report: {{title: A run & its <numbers>}}
"""
SECONDS = {"train": 240.0, "calibrate": 2.0, "quantize": 1.0, "compress": 3.0, "evaluate": 60.0}


def make_metrics(number: int) -> dict[str, dict[str, Any]]:
    shift = 0.01 * number
    return {
        "train": {"heldout_bpb": 1.7 + shift, "selected": "ema", "num_parameters": 10000, "num_steps": 1500},
        "calibrate": {"num_sequences": 8},
        "quantize": {"heldout_bpb": 1.7086 + shift, "heldout_bpb_float": 1.7 + shift, "heldout_kl": 0.0034, "predicted_loss": 0.0031,
                     "coded_bits": 3.25},
        "compress": {"artifact_bytes": 812345 + number, "code_bytes": 61000, "blob_bytes": 751345 + number, "limit_bytes": 16000000},
        "evaluate": {"plain_bpb": 1.72 + shift, "sliding_bpb": 1.68 + shift, "ttt_bpb": 1.65 + shift, "num_tokens": 400000,
                     "num_bytes": 1000000},
    }


def write_results(seeds: list[int], num_tensors: int = 3) -> None:
    """Write params.yaml and artifacts/ of a finished run into the working directory."""
    Path("params.yaml").write_text(PARAMS.format(seeds=seeds))
    save_metrics(Path("artifacts/tokenize"), {}, {"seconds": 4.0})
    for number, seed in enumerate(seeds):
        folders = {stage: Path("artifacts", stage, f"seed{seed}") for stage in SECONDS}
        metrics = make_metrics(number)
        for stage in ("train", "calibrate", "quantize", "compress"):
            save_metrics(folders[stage], metrics[stage], {"seconds": SECONDS[stage]})
        curves = {name: [(2000 * n, metrics["evaluate"][f"{name}_bpb"] + math.sin(n + number) / n) for n in range(1, 201)]
                  for name in ("plain", "sliding", "ttt")}
        save_scores(folders["evaluate"], metrics["evaluate"], {"seconds": SECONDS["evaluate"]}, curves, {})
        loss = [(20000 * n, 3 + 4 / math.sqrt(n) + number / 50) for n in range(1, 151)]
        write_csv(folders["train"] / "loss.csv", ("tokens", "loss"), loss)
        sizes = [("mlp", num_tensors, 200 * num_tensors, None, 4.5, 500000), ("vectors", None, None, None, None, 251345 + number),
                 ("code", None, None, None, None, 61000)]
        write_csv(folders["compress"] / "sizes.csv", SIZE_COLUMNS, sizes)
        rows = [(f"blocks.{n}.mlp.up.weight", "mlp", "gptq", 10, 20, "free", 0.012, 3.8, 95, 0.003, 0.01, 0.5, 0.0015, 2)
                for n in range(num_tensors)]
        table = ("embedding", "gptq", 16, 10, 8, 0.5, 6.5, 130, 0.0001, 0.0001, 0.5, 0.0001, 0)
        head = ("head", "fp16", 4, 10, 16, None, None, None, 0.0, 0.0, 0.5, 0.0, 0)
        write_csv(folders["quantize"] / "tensors.csv", TENSOR_COLUMNS, [*rows, ("token_embedding.weight", *table), ("head.weight", *head)])
