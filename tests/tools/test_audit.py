import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lib.artifacts.files import read_csv, read_json, write_bytes, write_csv, write_json
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.scores import COLUMNS
from lib.artifacts.tokens import SplitWriter
from lib.audit.verdict import AuditError
from lib.compression.container import pack
from lib.data.encoder import encode_documents
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.params import SECTIONS
from stages import evaluate
from tests.artifacts.quantized_models import TRAINING
from tests.evaluation.tiny import EVALUATE, make_model
from tools import audit

TOKENIZE, SCORES, AUDIT = Path("artifacts/tokenize"), Path("artifacts/evaluate/seed3"), Path("artifacts/audit/seed3/audit.json")
DOCUMENTS = [textwrap.dedent(str(kind.__doc__)).strip()[:200] for kind in (str, list, dict, textwrap, int)]
VOCAB_SIZE = 400
STRATEGIES = ["plain", "score_first", "two_phase"]


@pytest.fixture(autouse=True)
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with an artifact to evaluate, and shards that evaluate must not see."""
    monkeypatch.chdir(tmp_path)
    sections = {"seeds": [3], "evaluate": EVALUATE | {"strategies": STRATEGIES}}
    write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | sections)  # JSON is YAML
    write_json(Path("dvc.yaml"), {"stages": {"evaluate": {"deps": [str(TOKENIZE / "val")]}}})
    write_bytes(TOKENIZE / "tokenizer.model", train_tokenizer(DOCUMENTS, VOCAB_SIZE, 100_000))
    tokenizer = load_tokenizer(TOKENIZE / "tokenizer.model")
    splits = {}
    for name in ("train", "val"):
        writer = SplitWriter(TOKENIZE / name, VOCAB_SIZE, shard_tokens=150)
        for text, tokens in zip(DOCUMENTS, encode_documents(tokenizer, DOCUMENTS), strict=True):
            writer.add(tokens, len(text.encode()), int(tokenizer.target_bytes(tokens).sum()))
        splits[name] = {**writer.close(), "distinct_documents": len(DOCUMENTS), "reproduced_documents": len(DOCUMENTS)}
    write_json(TOKENIZE / "manifest.json", {"tokenizer": {"sha256": tokenizer.sha256}, "splits": splits,
                                            "shared_documents": {"train and val": 0}})
    model = make_model(vocab_size=VOCAB_SIZE)
    vectors = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    quantized = QuantizedModel(model.params.model_dump(mode="json"), TRAINING, {}, vectors)
    write_bytes(Path("artifacts/compress/seed3/model.ptz"), pack(quantized, "zstd", 3).blob)


@pytest.mark.slow
def test_evaluate_audits_what_it_did_and_a_violation_fails_it_with_the_audit_written() -> None:
    evaluate.main(3)
    report = read_json(SCORES / "audit.json")
    assert report["legal"] is None  # because of the process
    assert {name: each["legal"] for name, each in report["strategies"].items() if not each["legal"]} == {"two_phase": False}
    assert all(check["passed"] for check in report["data"].values())
    assert all("another program" in check["why"] for check in report["process"].values())
    content = (SCORES / "audit.json").read_bytes()
    evaluate.main(3)
    assert (SCORES / "audit.json").read_bytes() == content

    manifest = read_json(TOKENIZE / "manifest.json")
    write_json(TOKENIZE / "manifest.json", manifest | {"shared_documents": {"train and val": 2}})
    with pytest.raises(AuditError, match=r"data\.disjoint: FAILED: shared documents \{'train and val': 2\}"):
        evaluate.main(3)
    assert read_json(SCORES / "audit.json")["legal"] is False


@pytest.mark.slow
def test_the_tool_judges_the_files_that_evaluate_left(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate.main(3)
    audit.main([])
    assert capsys.readouterr().out.endswith("\nNOT CHECKED\n")
    assert read_json(AUDIT)["legal"] is None
    path = SCORES / "ledger" / "score_first.csv"
    rows = read_csv(path, COLUMNS["ledger"])
    rows[0]["kind"], rows[1]["kind"] = rows[1]["kind"], rows[0]["kind"]  # the first chunk: trained on, then scored
    write_csv(path, COLUMNS["ledger"], [list(row.values()) for row in rows])
    with pytest.raises(SystemExit, match=r"strategies\.score_first\.score_before_update: FAILED"):
        audit.main(["--seed", "3"])
    assert capsys.readouterr().out.endswith("\nNOT LEGAL\n")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_stage_confines_itself_and_still_writes_everything(num_processes: int) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    subprocess.run([*torchrun, "-m", "stages.evaluate", "--seed=3"], env=environment, check=True, capture_output=True)
    process = read_json(SCORES / "audit.json")["process"]
    if "Landlock" in str(process["training_data"].get("why")):
        pytest.skip(process["training_data"]["why"])
    num_shards = len(list((TOKENIZE / "train").glob("*.bin")))
    assert process["training_data"] == {"passed": True, "files_tried": num_shards, "files_refused": num_shards}
    assert process["network"]["passed"] is not False
    assert all((SCORES / name).exists() for name in ("metrics.json", "examples.json"))
