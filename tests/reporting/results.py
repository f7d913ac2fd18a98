"""What the stages before the report write, small and with made-up numbers."""

import json
import math
from hashlib import md5
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lib.artifacts.files import write_csv
from lib.artifacts.metrics import save_metrics
from lib.artifacts.scores import save_audit, save_examples, save_scores
from lib.params import read_params
from lib.reporting.html import SIZE_COLUMNS, TENSOR_COLUMNS

PARAMS = """
seeds: {seeds}
model: {{num_layers: 2, model_dim: 64, vocab_size: 512, num_xsa_layers: 0, tied_head: true}}
tokenize: {{packages: [numpy, scipy]}}
train: {{budget_steps: null, budget_seconds: 300.0, reserve_seconds: 10.0, reserve_distill_seconds: null, qat: {{below_lr: 0.5}}}}
calibrate: {{}}
quantize: {{target_bytes: null, method: gptq, bits: {{mlp: 5, head: 8}}, bits_of: {{}}, distill: {{steps: 0}}}}
compress: {{codec: range}}
evaluate: {{limit_seconds: 600.0}}
report:
  title: A run & its <numbers>
  record: {{loss: {record}, margin: 0.005, p_value: 0.01}}
  submission: {{author: null, github_id: null, blurb: null}}
"""
SETTINGS = {"tokenize": ["tokenize"], "train": ["model", "train"], "calibrate": ["calibrate"], "quantize": ["quantize", "compress.codec"],
            "compress": ["compress"], "evaluate": ["evaluate"]}
"""What each stage depends on of params.yaml, as in dvc.yaml."""
INPUTS = {"train": "tokenize/tokenizer.model", "calibrate": "train/{seed}/checkpoint", "quantize": "calibrate/{seed}/hessians",
          "compress": "quantize/{seed}/quantized", "evaluate": "compress/{seed}/model.ptz"}
OUTPUTS = {"tokenize": ["tokenizer.model"], "train": ["checkpoint", "metrics.json", "loss.csv", "heldout.csv"],
           "calibrate": ["hessians", "metrics.json"], "quantize": ["quantized", "metrics.json", "tensors.csv"],
           "compress": ["model.ptz", "metrics.json", "sizes.csv"],
           "evaluate": ["metrics.json", "audit.json", "examples.json", "curves", "context", "documents", "ledger"]}
"""What they write; what is not a file here has a made-up checksum."""
SECONDS = {"train": 240.0, "calibrate": 2.0, "quantize": 1.0, "compress": 3.0, "evaluate": 60.0}
BPB = {"plain": 1.72, "sliding": 1.68, "one_pass": 1.67, "score_first": 1.65, "lora": 1.64, "two_phase": 1.6}
STRATEGY_SECONDS = {
    "plain_seconds": 4.0, "sliding_seconds": 5.0, "one_pass_seconds": 3.0, "score_first_seconds": 21.0, "score_first_scoring_seconds": 6.0,
    "score_first_adaptation_seconds": 15.0, "score_first_tokens_per_second": 999.0, "lora_seconds": 9.0, "two_phase_seconds": 30.0,
}
DOCUMENTS = [(256, 3, 1500), (4096, 2, 9000)]
EXAMPLES = {
    "written": [{"text": "It is <written>.\n", "num_tokens": 7, "ended": True, "temperature": 0.8, "top_p": 0.95, "seed": 0}],
    "passage": {"document": 2, "first": 300, "strategies": ["plain", "score_first"],
                "parts": [["if", 1, 3.25, 1.5], [" a<b", 2, 22.0, 0.4], [":\n", 1, 0.75, 0.1]]},
    "documents": {"total": 5, "points": [[100, 500, 1.5], [200, 1000, 1.25], [3000, 9000, 1.125]]},
}


def make_metrics(number: int, names: tuple[str, ...] = tuple(BPB)) -> dict[str, dict[str, Any]]:
    shift = 0.01 * number
    evaluate: dict[str, Any] = {"val_loss": 2.4 + shift, "val_bpb": BPB["score_first"] + shift, "strategy": "score_first"}
    for name in names:
        key = f"{name}_transductive_bpb" if name == "two_phase" else f"{name}_bpb"
        evaluate |= {key: BPB[name] + shift}
    return {
        "train": {"heldout_bpb": 1.7 + shift, "selected": "ema", "num_parameters": 10000, "num_steps": 1500,
                  "attention": "sdpa"},
        "calibrate": {"num_sequences": 8},
        "quantize": {"heldout_bpb": 1.7086 + shift, "heldout_bpb_float": 1.7 + shift, "heldout_kl": 0.0034, "predicted_loss": 0.0031,
                     "coded_bits": 3.25},
        "compress": {"artifact_bytes": 812345 + number, "code_bytes": 61000, "blob_bytes": 751345 + number, "limit_bytes": 16000000},
        "evaluate": evaluate | {"num_tokens": 400000, "num_bytes": 1000000, "num_documents": 5},
    }


def make_audit(names: tuple[str, ...] = tuple(BPB)) -> dict[str, Any]:
    def of(name: str) -> dict[str, Any]:
        legal = name != "two_phase"
        return {"legal": legal, "causality": {"passed": True, "targets_compared": 1234, "documents_isolated": None},
                "distribution": {"passed": True, "largest_deviation": 1.25e-6},
                "score_before_update": {"passed": legal, "scored_before": {"trained_targets": 5000 if legal else 0}},
                "single_pass": {"passed": True, "targets": 400000}}
    return {"legal": None, "strategies": {name: of(name) for name in names},
            "data": {"validation_readers": {"passed": True, "stages": ["evaluate"]}},
            "process": {"files": {"passed": None, "why": "this kernel <cannot>"}}}


def write_evaluation(seed: int, number: int, names: tuple[str, ...] = tuple(BPB)) -> None:
    """What evaluate writes, without the audit. Tables hold the bits per byte of their strategy, or something made from it."""
    bpb = {name: BPB[name] + 0.01 * number for name in names}
    curves = {name: [(2000 * n, value + math.sin(n + number) / n) for n in range(1, 201)] for name, value in bpb.items()}
    context = {name: [(8 * n + 7, 1000, 2 + value / (n + 1)) for n in range(32)] for name, value in bpb.items()}
    documents = {name: [(*row, value + 0.1 * row[1]) for row in DOCUMENTS] for name, value in bpb.items()}
    timing = {"seconds": SECONDS["evaluate"], "peak_memory_mib": 512.0, **STRATEGY_SECONDS}
    save_scores(Path(f"artifacts/evaluate/seed{seed}"), make_metrics(number, names)["evaluate"], timing, curves=curves, context=context,
                documents=documents, ledgers={}, nats={})
    save_examples(Path(f"artifacts/evaluate/seed{seed}"), EXAMPLES)


def make_lock(seeds: list[int]) -> dict[str, Any]:
    """What DVC records of a run with the parameters and the files of the working directory."""
    params = read_params()

    def entry(stage: str, folder: str, seed: int | None) -> dict[str, Any]:
        used: dict[str, Any] = {}
        for key in SETTINGS[stage]:
            section, _, name = key.partition(".")
            used[key] = params[section][name] if name else params[section]
        inputs = [f"artifacts/{INPUTS[stage]}".format(seed=f"seed{seed}")] if stage in INPUTS else []
        return {"cmd": stage, "deps": list(map(checksum, ["lib/params.py", f"stages/{stage}.py", *inputs])),
                "params": {"params.yaml": used}, "outs": [checksum(f"{folder}/{name}") for name in OUTPUTS[stage]]}

    stages = {"tokenize": entry("tokenize", "artifacts/tokenize", None)}
    stages |= {f"{stage}@{seed}": entry(stage, f"artifacts/{stage}/seed{seed}", seed) for seed in seeds for stage in SECONDS}
    return {"schema": "2.0", "stages": stages}


def checksum(name: str) -> dict[str, str]:
    """An input or output as dvc.lock has it."""
    path = Path(name)
    if path.is_dir():
        files = [{"md5": checksum(str(file))["md5"], "relpath": file.name} for file in sorted(path.iterdir())]
        return {"path": name, "hash": "md5", "md5": md5(json.dumps(files).encode()).hexdigest() + ".dir"}
    return {"path": name, "hash": "md5", "md5": md5(path.read_bytes() if path.exists() else name.encode()).hexdigest()}


def write_lock(lock: dict[str, Any]) -> None:
    YAML(typ="safe", pure=True).dump(lock, Path("dvc.lock"))


def write_results(seeds: list[int], num_tensors: int = 3, record: float | None = None, names: tuple[str, ...] = tuple(BPB)) -> None:
    """Write params.yaml, artifacts/ and dvc.lock of a finished run into the working directory."""
    Path("params.yaml").write_text(PARAMS.format(seeds=seeds, record="null" if record is None else record))
    save_metrics(Path("artifacts/tokenize"), {"text": "text is reproduced"}, {"seconds": 4.0})
    for number, seed in enumerate(seeds):
        folders = {stage: Path("artifacts", stage, f"seed{seed}") for stage in SECONDS}
        metrics = make_metrics(number, names)
        for stage in ("train", "calibrate", "quantize", "compress"):
            save_metrics(folders[stage], metrics[stage], {"seconds": SECONDS[stage]})
        write_evaluation(seed, number, names)
        save_audit(folders["evaluate"], make_audit(names))
        loss = [(20000 * n, 3 + 4 / math.sqrt(n) + number / 50) for n in range(1, 151)]
        write_csv(folders["train"] / "loss.csv", ("tokens", "loss"), loss)
        write_csv(folders["train"] / "heldout.csv", ("tokens", "loss", "bpb"), [(x, y + 0.1, y / 2) for x, y in loss[14::15]])
        sizes = [("mlp", num_tensors, 200 * num_tensors, None, 4.5, 500000), ("vectors", None, None, None, None, 251345 + number),
                 ("code", None, None, None, None, 61000)]
        write_csv(folders["compress"] / "sizes.csv", SIZE_COLUMNS, sizes)
        rows = [(f"blocks.{n}.mlp.up.weight", "mlp", "gptq", 10, 20, "free", 0.012, 3.8, 95, 0.003, 0.01, 0.5, 0.0015, 2)
                for n in range(num_tensors)]
        table = ("embedding", "gptq", 16, 10, 8, 0.5, 6.5, 130, 0.0001, 0.0001, 0.5, 0.0001, 0)
        head = ("head", "fp16", 4, 10, 16, None, None, None, 0.0, 0.0, 0.5, 0.0, 0)
        write_csv(folders["quantize"] / "tensors.csv", TENSOR_COLUMNS, [*rows, ("token_embedding.weight", *table), ("head.weight", *head)])
    write_lock(make_lock(seeds))
