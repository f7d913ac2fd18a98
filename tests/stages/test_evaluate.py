import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import write_bytes, write_json
from lib.artifacts.metrics import load_metrics, load_timing
from lib.artifacts.quantized import QuantizedModel
from lib.artifacts.scores import load_curve
from lib.artifacts.tokens import SplitWriter, load_split
from lib.compression.container import load_artifact, pack
from lib.data.tokenizer import load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.distributed import SINGLE_CPU
from lib.evaluation.bpb import make_score
from lib.evaluation.score import score_plain
from lib.model.gpt import build_model
from lib.params import SECTIONS
from stages import evaluate
from tests.evaluation.tiny import EVALUATE, make_model

TOKENIZE, COMPRESS, RESULT = Path("artifacts/tokenize"), Path("artifacts/compress/seed3"), Path("artifacts/evaluate/seed3")
DOCUMENTS = [textwrap.dedent(str(kind.__doc__)) for kind in (str, list, dict, json, textwrap, np.ndarray)]
VOCAB_SIZE = 400
METRICS = {"plain_loss", "plain_bpb", "sliding_loss", "sliding_bpb", "ttt_loss", "ttt_bpb", "num_tokens", "num_bytes"}


@pytest.fixture
def _inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the stage may read, and nothing else."""
    monkeypatch.chdir(tmp_path)
    write_params({})
    write_bytes(TOKENIZE / "tokenizer.model", train_tokenizer(DOCUMENTS, VOCAB_SIZE, 100_000))
    tokenizer = load_tokenizer(TOKENIZE / "tokenizer.model")
    writer = SplitWriter(TOKENIZE / "val", VOCAB_SIZE, shard_tokens=500)
    for text, tokens in zip(DOCUMENTS, tokenizer.encode_documents(DOCUMENTS), strict=True):
        writer.add(tokens[:150], len(text.encode()), int(tokenizer.target_bytes(tokens[:150]).sum()))
    writer.close()
    model = make_model(vocab_size=VOCAB_SIZE)
    vectors = {name: parameter.detach().half() for name, parameter in model.named_parameters()}
    quantized = QuantizedModel(model.params.model_dump(mode="json"), {}, {}, vectors)
    write_bytes(COMPRESS / "model.ptz", pack(quantized, "zstd", 3).blob)


def write_params(changes: dict[str, object]) -> None:
    write_json(Path("params.yaml"), dict.fromkeys(SECTIONS) | {"evaluate": EVALUATE | changes})  # JSON is YAML


@pytest.mark.usefixtures("_inputs")
def test_the_stage_scores_the_artifact_in_all_ways() -> None:
    evaluate.main(3)
    metrics = load_metrics(RESULT)
    assert metrics.keys() == METRICS
    artifact = load_artifact(COMPRESS / "model.ptz")
    tokens = load_split(TOKENIZE / "val", VOCAB_SIZE).tokens()
    nats = score_plain(build_model(artifact.model, artifact.weights()), tokens, window_tokens=8, batch_windows=4, precision="fp32",
                       process=SINGLE_CPU)
    score = make_score(nats, load_tokenizer(TOKENIZE / "tokenizer.model").target_bytes(tokens))
    assert metrics["plain_loss"] == round(score.loss, 8)
    assert metrics["plain_bpb"] == round(score.bpb, 8)
    assert metrics["num_tokens"] == len(tokens) - 1
    assert metrics["ttt_bpb"] < metrics["sliding_bpb"]
    for name in ("plain", "sliding", "ttt"):
        assert load_curve(RESULT / f"curves/running_{name}.csv", ("tokens", "bpb"))[-1] == (len(tokens) - 1, metrics[f"{name}_bpb"])
    assert len((RESULT / "adaptation/ttt.csv").read_text().splitlines()) == 1 + -(-(len(tokens) - 1) // 16)
    timing = load_timing(RESULT)
    assert timing is not None
    assert timing["seconds"] > timing["plain_seconds"] + timing["sliding_seconds"] + timing["ttt_seconds"] > 0


@pytest.mark.usefixtures("_inputs")
def test_nothing_but_times_differs_between_two_runs() -> None:
    contents = []
    for _ in range(2):
        evaluate.main(3)
        contents.append({path: path.read_bytes() for path in RESULT.rglob("*") if path.is_file() and path.name != "timing.json"})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 5


@pytest.mark.usefixtures("_inputs")
def test_shards_of_another_tokenizer_are_refused() -> None:
    split = json.loads((TOKENIZE / "val/split.json").read_text())
    write_json(TOKENIZE / "val/split.json", split | {"accounted_bytes": split["accounted_bytes"] + 1})
    with pytest.raises(ValueError, match=r"artifacts/tokenize/val: expected .* bytes of text, found .*dvc repro -f tokenize"):
        evaluate.main(3)


@pytest.mark.usefixtures("_inputs")
def test_too_little_time_fails_the_stage_and_leaves_no_score() -> None:
    write_params({"limit_seconds": 1e-3})
    with pytest.raises(RuntimeError, match=r"evaluate.limit_seconds: expected at most 0.001 s"):
        evaluate.main(3)
    assert not RESULT.exists()


@pytest.mark.usefixtures("_inputs")
def test_two_processes_write_one_result() -> None:
    evaluate.main(3)
    expected = load_metrics(RESULT)
    (RESULT / "metrics.json").unlink()
    root = str(Path(evaluate.__file__).parents[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, "-m", "stages.evaluate", "--seed=3"],
                   env=os.environ | {"PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}, check=True, capture_output=True)
    assert load_metrics(RESULT) == pytest.approx(expected, abs=1e-5)
