import json
import runpy
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from lib.artifacts.files import sha256_of
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.tokens import SPLITS, load_split
from lib.data.tokenizer import load_tokenizer
from lib.params import SECTIONS, ParamsError
from tests.data.texts import ENGLISH, SCRIPTS, TINY_PARAMS, TINY_VOCAB_SIZE


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = [f"Document {i}: {text}" for i in range(10) for text in (ENGLISH, *SCRIPTS.values())]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    YAML().dump({section: {} for section in SECTIONS} | {"tokenize": TINY_PARAMS}, tmp_path / "params.yaml")
    return tmp_path


def run() -> dict[str, str]:
    runpy.run_module("stages.tokenize", run_name="__main__")
    files = [path for path in TOKENIZE_FOLDER.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {path.relative_to(TOKENIZE_FOLDER).as_posix(): sha256_of(path) for path in files}


def test_stage_writes_its_outputs(project: Path) -> None:
    first = run()
    shards = {split: load_split(TOKENIZE_FOLDER / split, TINY_VOCAB_SIZE) for split in SPLITS}
    names = {"manifest.json", "metrics.json", "tokenizer.model", *(f"{split}/split.json" for split in SPLITS)}
    for split, loaded in shards.items():
        names |= {f"{split}/{split}_{i:06d}.bin" for i in range(len(loaded.shards))}
    assert set(first) == names
    metrics = load_metrics(TOKENIZE_FOLDER)
    tokenizer = load_tokenizer(TOKENIZE_FOLDER / "tokenizer.model")
    for split, loaded in shards.items():
        assert metrics[split]["tokens"] == loaded.num_tokens
        assert metrics[split]["accounted_bytes"] == tokenizer.target_bytes(loaded.tokens()).sum()
    assert run() == first


def test_stage_names_a_bad_key(project: Path) -> None:
    YAML().dump({section: {} for section in SECTIONS} | {"tokenize": TINY_PARAMS | {"vocab": 300}}, project / "params.yaml")
    with pytest.raises(ParamsError, match=r"params\.yaml: tokenize\.vocab: unknown key"):
        run()
