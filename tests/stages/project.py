"""A folder in which the stages from calibrate on can run: tokenizer, shards, a checkpoint of random weights, params.yaml."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML

from lib.artifacts.checkpoint import Checkpoint, TrainedGrid, Training, save_checkpoint
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.artifacts.tokens import SplitWriter
from lib.audit import isolation
from lib.data.encoder import encode_documents
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.params import SECTIONS
from tests.evaluation.tiny import MODEL, make_model

VOCAB_SIZE, SEED = 300, 7
PARAMS: dict[str, Any] = dict.fromkeys(SECTIONS) | {
    "calibrate": {"num_sequences": 24, "num_gradient_sequences": 12, "batch_sequences": 10, "precision": "fp32"},
    "quantize": {"target_bytes": None, "method": "gptq",
                 "bits": {"attention": 5, "mlp": 5, "embedding": 8, "bigram": 5, "value_embedding": 5, "head": 8}, "bits_of": {},
                 "free_rows": True, "free_columns": True,
                 "clip": {"rule": "mse", "percentiles": [0.99, 1.0], "num_candidates": 20, "num_std": 4.0, "num_std_of": {}, "floor": 0.0},
                 "damping": 0.01, "feedback_damping": None, "block_size": 8, "act_order": True,
                 "rate_weight": 0.0, "prune_fraction": 0.0, "low_rank": {"max_bytes": 0, "bits": 8}, "vector_mantissa_bits": 10,
                 "heldout_tokens": 500,
                 "distill": {"steps": 0, "batch_sequences": 2, "code_lr": 0.02, "vector_lr": 0.002, "excess": 0.03, "precision": "fp32"}},
    "compress": {"codec": "zstd", "level": 22, "limit_bytes": 100_000, "code_bytes": 7000},
}


def write_params(folder: Path, section: str | None = None, **changes: Any) -> None:
    params = copy.deepcopy(PARAMS)
    if section is not None:
        params[section] |= changes
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)


def make_documents(number: int) -> list[str]:
    """Texts of 100 words each, about 550 bytes, from a vocabulary of 60."""
    generator = np.random.default_rng(0)
    words = ["".join(map(chr, generator.integers(97, 123, generator.integers(2, 8)))) for _ in range(60)]
    return [" ".join(generator.choice(words, 100)) for _ in range(number)]


def write_inputs(folder: Path, qat: dict[str, Any] | None = None, **options: Any) -> None:
    """What tokenize and train leave in their folders, and a file that stands for the submitted code; `options` change the model."""
    write_params(folder)
    documents = make_documents(12)
    tokenizer_path = folder / TOKENIZE_FOLDER / "tokenizer.model"
    tokenizer_path.parent.mkdir(parents=True)
    tokenizer_path.write_bytes(train_tokenizer(documents, VOCAB_SIZE, 100_000))
    tokenizer = load_tokenizer(tokenizer_path)
    for name, part in (("train", documents[:9]), ("heldout", documents[9:])):
        writer = SplitWriter(folder / TOKENIZE_FOLDER / name, VOCAB_SIZE, 1500)
        for document, tokens in zip(part, encode_documents(tokenizer, part), strict=True):
            writer.add(tokens, len(document), len(document))
        writer.close()
    model = make_model(vocab_size=VOCAB_SIZE, **options)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    training = Training(sequence_tokens=16, qat=None if qat is None else TrainedGrid(**qat))
    save_checkpoint(folder / stage_folder("train", SEED) / "checkpoint.safetensors",
                    Checkpoint(weights, MODEL | options | {"vocab_size": VOCAB_SIZE}, training))
    (folder / "lib/submission").mkdir(parents=True)
    (folder / "lib/submission/program.py").write_text("import sys\n", encoding="utf-8")


def landlock() -> bool:
    try:
        return isolation._call(isolation.CREATE_RULESET, None, 0, isolation.VERSION_FLAG) > 0  # asks for its version
    except OSError:
        return False


def check_confined(folder: Path, stage: str, seed: int, reads: str) -> None:
    """Run a stage that the validation text is withheld from, in a process of its own, and try to read that text afterwards.

    Args:
        folder: of the project.
        stage: that runs, and writes its results.
        seed: of the stage.
        reads: a split that it may read.
    """
    secret = folder / "artifacts/tokenize/val/val_000000.bin"
    secret.parent.mkdir(exist_ok=True)
    secret.write_bytes(b"secret")
    script = f"""if True:
        from pathlib import Path
        from lib.audit.isolation import withhold_validation
        from stages import {stage}
        withhold_validation("{stage}", {seed})
        {stage}.main({seed})
        next(Path("artifacts/tokenize/{reads}").glob("*.bin")).read_bytes()
        try:
            Path("{secret}").read_bytes()
        except PermissionError:
            print("refused")
    """
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    outcome = subprocess.run([sys.executable, "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True)
    assert outcome.stdout.endswith("refused\n")
