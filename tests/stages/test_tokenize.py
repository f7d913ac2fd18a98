import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.artifacts.files import sha256_of
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.tokens import SPLITS, load_split
from lib.data.tokenizer import OPERATORS, load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.params import ParamsError
from lib.presets import read_preset
from tests.data.fake_hub import FakeHub
from tests.data.shard_files import tokens_of, write_shards
from tests.data.test_sidecar import count_by_rule
from tests.data.texts import ENGLISH, SCRIPTS, TINY_PARAMS, TINY_VOCAB_SIZE, cased_tokenizer

ROOT = Path(__file__).parents[2]
SECTIONS_OF_TINY = read_preset("default", ROOT / "presets")
SECTIONS_OF_TINY["train"] |= {"sequence_tokens": 8, "batch_sequences": 2}
SECTIONS_OF_TINY["calibrate"] |= {"num_sequences": 4, "num_gradient_sequences": 4}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = [f"Document {i}: {text}" for i in range(10) for text in (ENGLISH, *SCRIPTS.values())]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    YAML().dump(SECTIONS_OF_TINY | {"tokenize": TINY_PARAMS}, tmp_path / "params.yaml")
    return tmp_path


def run() -> dict[str, str]:
    sys.modules.pop("stages.tokenize", None)  # another test of this process may have imported it
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
    YAML().dump(SECTIONS_OF_TINY | {"tokenize": TINY_PARAMS | {"vocab": 300}}, project / "params.yaml")
    with pytest.raises(ParamsError, match=r"params\.yaml: tokenize\.vocab: unknown key"):
        run()


def test_all_that_later_stages_lack_is_named_before_the_manifest_is_written(project: Path) -> None:
    params = read_preset("default", ROOT / "presets") | {"tokenize": TINY_PARAMS}
    params["train"]["sequence_tokens"] = 4096
    YAML().dump(params, project / "params.yaml")
    with pytest.raises(ValueError, match=r"train\.batch_sequences: 6 sequences of train\.sequence_tokens 4096 .*; calibrate\.num_sequences "
                                         r"512, .*: 1024 sequences .*; quantize: 4097 tokens in heldout, .*, found \d+\. Enlarge"):
        run()
    assert not (project / TOKENIZE_FOLDER / "manifest.json").exists()


def test_a_batch_in_the_order_of_the_text_must_be_in_one_shard(project: Path) -> None:
    """Of 1,000 tokens, of which nine make a row."""
    sections = SECTIONS_OF_TINY | {"tokenize": TINY_PARAMS}
    for number in (111, 112):
        sections["train"] = SECTIONS_OF_TINY["train"] | {"data_order": "sequential", "batch_sequences": number}
        YAML().dump(sections, project / "params.yaml")
        if number == 112:
            with pytest.raises(ValueError, match=r"train\.batch_sequences: 112 sequences of .* 8 tokens in a shard of train, found 111"):
                run()
        else:
            run()


def publish(folder: Path) -> tuple[FakeHub, dict[str, Any]]:
    """Documents, a tokenizer and shards in a folder and on a hub; and what is known of the validation text."""
    texts = [f"Document {i}: {text}" for i in range(10) for text in (ENGLISH, *SCRIPTS.values())]
    texts[70] = texts[3].upper()  # in the validation text, and again in the training text
    (folder / "sp.model").write_bytes(train_tokenizer(texts, TINY_VOCAB_SIZE, 100_000))
    tokenizer = load_tokenizer(folder / "sp.model")
    val, train = texts[:60], [*texts[60:], "the last document, which another shard may go on with"]
    paths = [*write_shards(folder / "published", "train", tokens_of(tokenizer, train), 999),
             *write_shards(folder / "published", "val", tokens_of(tokenizer, val), 999)]
    files = {f"datasets/web/{path.name}": path.read_bytes() for path in paths} | {"tokenizers/sp.model": (folder / "sp.model").read_bytes()}
    files["docs_selected.jsonl"] = "".join(json.dumps({"text": text}) + "\n" for text in (*val, *train[:-1])).encode()
    manifest = {"datasets": [{"name": "web", "tokenizer_name": "sp"}], "tokenizers": [{"name": "sp", "model_path": "tokenizers/sp.model"}]}
    files["manifest.json"] = json.dumps(manifest).encode()
    bytes_per_token = sum(len(text.encode()) for text in val) / (len(tokens_of(tokenizer, val)) - 1)
    return FakeHub(files), TINY_PARAMS["expect"] | {"val_documents": 60, "val_bytes_per_token": round(bytes_per_token, 5)}


@pytest.mark.slow
def test_published_shards_the_hub_and_its_documents_give_the_same_splits(project: Path) -> None:
    hub, expect = publish(project)
    train_shards = len(list((project / "published").glob("*_train_*.bin")))
    params = TINY_PARAMS | {"expect": expect, "val_fraction": None, "min_document_bytes": 0}
    of_hub = params | {"source": "hub", "path": "data/README.md"}
    with hub.serve() as address:
        runs = {
            "shards": params | {"source": "shards", "path": "published", "tokenizer": "sp.model"},
            "hub": of_hub | {"hub": TINY_PARAMS["hub"] | {"dataset": "web", "train_shards": train_shards}},
            "documents": of_hub | {"hub": TINY_PARAMS["hub"] | {"dataset": "web", "start": "documents"}, "val_documents": 60},
        }
        files, manifests = {}, {}
        for name, section in runs.items():
            YAML().dump(SECTIONS_OF_TINY | {"tokenize": section}, project / "params.yaml")
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(project / "home")}
            subprocess.run([sys.executable, "-m", "stages.tokenize"], env=environment, check=True)
            files[name] = {path.name: sha256_of(path) for path in TOKENIZE_FOLDER.glob("*/*")} | {
                "model": sha256_of(TOKENIZE_FOLDER / "tokenizer.model")}
            manifests[name] = json.loads((TOKENIZE_FOLDER / "manifest.json").read_text())
    assert files["shards"] == files["hub"] == files["documents"]
    assert len(files["shards"]) > 6
    assert manifests["shards"]["skipped_documents"] == {"also in val": 1, "cut off by the last shard": 1}
    assert manifests["documents"]["skipped_documents"] == {"also in val": 1}
    for split in SPLITS:
        of_shards, of_documents = (manifests[name]["splits"][split] for name in ("shards", "documents"))
        assert of_shards == of_documents | {"reproduced_documents": None}
        assert of_documents["reproduced_documents"] == of_documents["documents"]
    assert [manifests[name]["source"]["name"] for name in runs] == ["shards", "hub", "hub"]
    assert manifests["hub"]["source"]["commit"] == hub.commit
    assert manifests["hub"]["byte_sidecar"] is None
    assert not any(manifest["tokenizer"]["trained"] for manifest in manifests.values())


def test_another_validation_text_than_expected_is_refused(project: Path) -> None:
    _, expect = publish(project)
    section = TINY_PARAMS | {"source": "shards", "path": "published", "tokenizer": "sp.model", "val_fraction": None,
                             "min_document_bytes": 0, "expect": expect | {"val_documents": 61}}
    YAML().dump(SECTIONS_OF_TINY | {"tokenize": section}, project / "params.yaml")
    with pytest.raises(ValueError, match=r"tokenize\.expect\.val_documents: expected 61, found 60"):
        run()


def tokenize(project: Path, hub: FakeHub, expect: dict[str, Any]) -> str:
    """What the stage prints for the dataset with a case transform on a hub."""
    section = TINY_PARAMS | {"source": "hub", "path": "data/README.md", "val_fraction": None, "min_document_bytes": 0,
                             "case_transform": True, "hub": TINY_PARAMS["hub"] | {"dataset": "web", "train_shards": 1},
                             "expect": TINY_PARAMS["expect"] | expect}
    YAML().dump(SECTIONS_OF_TINY | {"tokenize": section}, project / "params.yaml")
    with hub.serve() as address:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_ENDPOINT": address, "HF_HOME": str(project / "home")}
        command = [sys.executable, "-m", "stages.tokenize"]
        return subprocess.run(command, env=environment, check=False, stderr=subprocess.PIPE, text=True).stderr


@pytest.mark.slow
def test_a_published_byte_sidecar_is_compared_with_the_accounting(project: Path) -> None:
    tokenizer, texts = cased_tokenizer(), [f"{i} {OPERATORS} ABC-def {text} shipYARD" for i in range(3) for text in SCRIPTS.values()]
    tokens, sizes = tokens_of(tokenizer, texts), [size for text in texts for size in count_by_rule(tokenizer, text)]
    train = tokens_of(tokenizer, [f"{text} {i}" for i in range(9) for text in texts])
    folder = project / "published"
    paths = [*write_shards(folder, "train", train, 10**6), *write_shards(folder, "val", tokens, 999)]
    manifest = {"datasets": [{"name": "web", "tokenizer_name": "sp"}], "tokenizers": [{"name": "sp", "model_path": "sp.model"}]}
    hub = FakeHub({f"datasets/web/{path.name}": path.read_bytes() for path in paths} | {
        "manifest.json": json.dumps(manifest).encode(), "sp.model": tokenizer.processor.serialized_model_proto()})
    num_bytes, num_targets = sum(len(text.encode()) for text in texts), len(tokens) - 1

    def add_sidecars(sizes: list[int]) -> None:
        hub.change({f"datasets/web/{path.name}": path.read_bytes() for path in write_shards(folder, "val_bytes", sizes, 999)})

    add_sidecars(sizes)
    expect = {"val_targets": num_targets, "val_bytes": num_bytes, "val_sidecar_bytes_per_token": round(num_bytes / num_targets, 5)}
    assert f"byte side-cars of {num_bytes:,} bytes" in tokenize(project, hub, expect)
    written = json.loads((TOKENIZE_FOLDER / "manifest.json").read_text())
    assert written["byte_sidecar"] == {"bytes": num_bytes, "accounted_bytes": num_bytes, "differing": 0}
    assert "datasets/web/web_val_bytes_000001.bin" in written["source"]["files"]
    sizes[1234] += 1
    add_sidecars(sizes)
    assert re.search(r"web_val_bytes_000001\.bin, token \d+: expected \d+ bytes for .*; name the dataset", tokenize(project, hub, {}))
