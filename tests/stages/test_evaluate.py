import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import read_csv, write_json
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.scores import load_curve, load_examples, load_nats
from lib.artifacts.tokens import load_split
from lib.compression.container import load_artifact
from lib.data.encoder import decode_documents
from lib.data.tokenizer import load_tokenizer
from lib.distributed import SINGLE_CPU
from lib.errors import UserError
from lib.evaluation.bpb import make_score
from lib.evaluation.heldout import window_losses
from lib.model.gpt import build_model
from lib.params import SECTIONS
from stages import evaluate
from tests.evaluation.tiny import ADAPTATION, EVALUATE, STRATEGIES
from tests.stages.scored import DOCUMENTS, VOCAB_SIZE, write_scored

TOKENIZE, COMPRESS, RESULT = Path("artifacts/tokenize"), Path("artifacts/compress/seed3"), Path("artifacts/evaluate/seed3")
TABLES = {"curves": "tokens,bpb", "context": "context,tokens,loss", "documents": "length,documents,bytes,bpb",
          "ledger": "step,kind,state,first,last,num_steps,lr"}


@pytest.fixture
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the stage may read, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_params({})
    write_scored(COMPRESS / "model.ptz")


def write_params(changes: dict[str, object]) -> None:
    section = EVALUATE | {"audit": False} | changes
    write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | {"evaluate": section})  # JSON is YAML


def read_results() -> dict[str, bytes]:
    """Contents of all outputs but the one that a clock decides."""
    return {str(path.relative_to(RESULT)): path.read_bytes() for path in RESULT.rglob("*")
            if path.is_file() and path.name != "timing.json"}


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_the_stage_scores_the_artifact_in_all_ways() -> None:
    evaluate.main(3)
    metrics = load_metrics(RESULT)
    artifact = load_artifact(COMPRESS / "model.ptz")
    tokens = load_split(TOKENIZE / "val", VOCAB_SIZE).tokens()
    nats = window_losses(build_model(artifact.model, artifact.weights()), tokens, window_tokens=8, batch_windows=4, precision="fp32",
                       process=SINGLE_CPU)
    score = make_score(nats, load_tokenizer(TOKENIZE / "tokenizer.model").target_bytes(tokens))
    assert metrics["plain_loss"] == round(score.loss, 8)
    assert metrics["plain_bpb"] == round(score.bpb, 8)
    assert (metrics["num_tokens"], metrics["num_bytes"], metrics["num_documents"]) == (len(tokens) - 1, score.num_bytes, len(DOCUMENTS))
    assert metrics["strategy"] == "score_first"
    assert metrics["val_bpb"] == metrics["score_first_bpb"] < metrics["sliding_bpb"]
    assert "two_phase_bpb" not in metrics
    timing = load_timing(RESULT)
    assert timing is not None
    assert timing["seconds"] > timing["open_seconds"] + sum(timing[f"{name}_seconds"] for name in STRATEGIES) - 0.01  # rounded


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_every_strategy_has_its_tables() -> None:
    evaluate.main(3)
    metrics, results = load_metrics(RESULT), read_results()
    for folder, columns in TABLES.items():
        assert {name for name in results if name.startswith(f"{folder}/")} == {f"{folder}/{name}.csv" for name in STRATEGIES}
        for name in STRATEGIES:
            assert results[f"{folder}/{name}.csv"].decode().splitlines()[0] == columns
    for name in STRATEGIES:
        bpb = metrics[f"{name}_transductive_bpb" if name in ("longest_first", "two_phase") else f"{name}_bpb"]
        assert load_curve(RESULT / f"curves/{name}.csv", ("tokens", "bpb"))[-1] == (metrics["num_tokens"], bpb)
        for folder, column, total in (("context", "tokens", "num_tokens"), ("documents", "bytes", "num_bytes")):
            rows = read_csv(RESULT / folder / f"{name}.csv", [column])
            assert sum(int(row[column]) for row in rows) == metrics[total]
        events = read_csv(RESULT / f"ledger/{name}.csv", ["kind", "first", "last"])
        scored = [target for event in events if event["kind"] == "scored" for target in range(int(event["first"]), int(event["last"]) + 1)]
        assert sorted(scored) == list(range(metrics["num_tokens"]))


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_examples_are_of_the_same_losses_and_the_same_text() -> None:
    evaluate.main(3)
    metrics, examples, tokenizer = load_metrics(RESULT), load_examples(RESULT), load_tokenizer(TOKENIZE / "tokenizer.model")
    passage, points = examples["passage"], examples["documents"]["points"]
    tokens = load_split(TOKENIZE / "val", VOCAB_SIZE).tokens()
    starts = np.flatnonzero(tokens == tokenizer.bos_id)
    nats = {name: load_nats(RESULT, name) for name in ("plain", "score_first")}
    assert passage["strategies"] == list(nats)
    assert passage["first"] == 0  # documents are short: the longest, whole
    targets = slice(starts[passage["document"]], starts[passage["document"]] + sum(part[1] for part in passage["parts"]))
    assert targets.stop - targets.start == max(np.diff(starts)) - 1
    assert "".join(part[0] for part in passage["parts"]) == decode_documents(tokenizer, [tokens[1:][targets].tolist()])[0]
    for number, losses in enumerate(nats.values(), 2):
        assert sum(part[number] for part in passage["parts"]) == pytest.approx(losses[targets].sum() / np.log(2), abs=0.1)
    assert [length for length, _, _ in points] == np.diff(starts, append=len(tokens) - 1).tolist()
    assert sum(size * bpb for _, size, bpb in points) / metrics["num_bytes"] == pytest.approx(metrics["score_first_bpb"], abs=1e-4)
    assert [each["seed"] for each in examples["written"]] == [0, 1]
    assert all(0 < each["num_tokens"] <= 200 and each["text"] for each in examples["written"])


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_nothing_but_times_differs_between_two_runs() -> None:
    evaluate.main(3)
    first = read_results()
    evaluate.main(3)
    assert read_results() == first
    assert len(first) >= 1 + len(TABLES) * len(STRATEGIES)


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_tables_of_strategies_that_are_no_longer_used_do_not_stay() -> None:
    evaluate.main(3)
    write_params({"strategies": ["plain"], "strategy": "plain"})
    evaluate.main(3)
    assert {name for name in read_results() if name.endswith(".csv")} == {f"{folder}/plain.csv" for folder in TABLES}


@pytest.mark.usefixtures("_inputs")
def test_shards_of_another_tokenizer_are_refused() -> None:
    split = json.loads((TOKENIZE / "val/split.json").read_text())
    write_json(TOKENIZE / "val/split.json", split | {"accounted_bytes": split["accounted_bytes"] + 1})
    with pytest.raises(ValueError, match=r"artifacts/tokenize/val: expected .* bytes of text, found .*dvc repro -f tokenize"):
        evaluate.main(3)


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_too_little_time_fails_the_stage_and_leaves_the_curves_but_no_score_until_there_is_enough() -> None:
    write_params({"limit_seconds": 1e-3})
    with pytest.raises(UserError, match=r"evaluate.limit_seconds: expected at most 0.001 s"):
        evaluate.main(3)
    assert read_results().keys() == {"unfinished/plain.csv"}
    write_params({})
    evaluate.main(3)
    assert (RESULT / "metrics.json").exists()
    assert not (RESULT / "unfinished").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_inputs")
def test_two_processes_write_one_result() -> None:
    settings = ADAPTATION | {"epochs": 1, "lr": 0.001, "drop_last": True}
    write_params({"two_phase": {"recalibration": settings, "selective": settings}})
    evaluate.main(3)
    metrics, ledger = load_metrics(RESULT), {name: read_results()[f"ledger/{name}.csv"] for name in ("sliding", "score_first", "two_phase")}
    shutil.rmtree(RESULT)
    root = str(Path(evaluate.__file__).parents[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, "-m", "stages.evaluate", "--seed=3"],
                   env=os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)
    found = load_metrics(RESULT)
    assert found.pop("strategy") == metrics.pop("strategy")
    assert found == pytest.approx(metrics, abs=1e-5)
    assert {name: read_results()[f"ledger/{name}.csv"] for name in ledger} == ledger
