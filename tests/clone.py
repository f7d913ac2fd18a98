"""A copy of this project in which the whole pipeline runs in seconds."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
SEED = 3
CODE_BYTES = 75_000  # more than the code will be after the edits that tests make
TINY: dict[str, Any] = {
    "seeds": [SEED],
    "model": {"vocab_size": 512, "num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 1, "mlp_hidden_dim": 64,
              "rope_dims": 8, "num_xsa_layers": 1, "bigram_rows": 64, "bigram_dim": 8, "value_embedding_dim": 8,
              "value_embedding_layers": [1]},
    "tokenize": {"source": "jsonl", "path": "documents.jsonl", "vocab_size": 512, "heldout_fraction": 0.1, "val_fraction": 0.1,
                 "tokenizer_training_bytes": 100000, "shard_tokens": 20000, "min_document_bytes": 0},
    "train": {"budget_steps": 40, "sequence_tokens": 32, "batch_sequences": 4, "averaging": {"swa_every_steps": 5}},
    "calibrate": {"num_sequences": 8, "num_gradient_sequences": 4},
    "quantize": {"target_bytes": CODE_BYTES + 20_000},
    "compress": {"code_bytes": CODE_BYTES},
    "evaluate": {"strategies": ["plain", "sliding", "score_first", "lora"], "window_tokens": 32, "stride_tokens": 16, "segment_tokens": 128,
                 "audit": False,
                 "score_first": {"chunk_tokens": 512, "epochs": 1, "trainable": ["last_1_blocks"]},
                 "lora": {"window_tokens": 32, "chunk_tokens": 16}},
}


def stages_run(output: str) -> set[str]:
    """Names of the stages that ran, not those restored from the cache, in the output of `dvc repro` or `dvc exp run`."""
    return set(re.findall(r"Running stage '(.+?)'", output))


class Clone:
    """A copy of this project, as a git repository of its own, with tiny parameters.

    Args:
        folder: an empty folder.
        changes: of the parameters, beside those of `TINY`.
    """

    def __init__(self, folder: Path, changes: dict[str, Any] | None = None) -> None:
        self.folder = folder
        without_make = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # which may run these tests
        self.environment = {**without_make, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        listing = self.run("git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", ".", ":!artifacts")
        for name in listing.split():
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        (folder / "dvc.lock").unlink(missing_ok=True)
        words = (ROOT / "lib/training/loop.py").read_text().split()
        documents = ({"text": " ".join(words[n:n + 40] + words[:n % 7])} for n in range(0, len(words) - 40, 3))
        (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        self.params: dict[str, Any] = YAML(typ="safe", pure=True).load(folder / "params.yaml")
        self.change(TINY)
        self.change(changes or {})
        self.run("git", "init", "--quiet")
        self.run("git", "config", "user.name", "test")
        self.run("git", "config", "user.email", "test@example.org")
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", "tiny")

    def change(self, changes: dict[str, Any]) -> None:
        """Merge `changes` into params.yaml."""
        def merge(old: Any, new: Any) -> Any:
            return {**old, **{key: merge(old[key], value) for key, value in new.items()}} if isinstance(new, dict) else new

        self.params = merge(self.params, changes)
        YAML(typ="safe", pure=True).dump(self.params, self.folder / "params.yaml")

    def repro(self, *arguments: str) -> set[str]:
        """Run `dvc repro` and return the stages that really ran (not those restored from the cache)."""
        return {name.split("@")[0] for name in stages_run(self.run("python", "-m", "dvc", "repro", *arguments))}

    def lock(self) -> Any:
        """What dvc.lock says."""
        return YAML(typ="safe", pure=True).load(self.folder / "dvc.lock")

    def run(self, *command: str) -> str:
        """What a command prints; it must succeed."""
        result = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
