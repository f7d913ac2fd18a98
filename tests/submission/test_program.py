"""The submitted program, as others run it: a folder of its own, no repository, no network, shards as the challenge publishes them."""

import json
import os
import re
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import write_bytes, write_json
from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER, stage_folder
from lib.params import read_params
from lib.reporting.strategy_table import format_strategies
from lib.submission.bundle import make_bundle
from stages import calibrate, compress, evaluate, quantize, tokenize, train
from tests.clone import CODE_BYTES, SEED, TINY
from tests.data.shard_files import shard_bytes
from tests.evaluation.tiny import merge

pytestmark = pytest.mark.xdist_group("program")  # one run of the stages for all tests of this file

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "train": {"qat": {"below_lr": 0.5}, "budget_steps": 30}, "quantize": {"target_bytes": CODE_BYTES + 20_000},
    "evaluate": {"audit": False, "strategies": ["plain", "lora"], "strategy": "lora"}}
PROGRESS = r"(note|train|calibrate|verify|factorize|quantize|distill|evaluate): |lora trains |$"
ONE_PROCESS, TWO_PROCESSES = ["train_gpt.py"], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all stages but the report have run, and beside its splits the same tokens as published shards.

    The held-out documents are those that end the last published training shard.
    """
    folder = tmp_path_factory.mktemp("pipeline")
    words = (ROOT / "lib/training/loop.py").read_text().split()
    documents = [" ".join(words[n:n + 40] + words[:n % 7]) for n in range(0, len(words) - 40, 5)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    params = merge(merge(read_params(ROOT / "presets/default.yaml"), TINY), SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_bytes(Path("lib/submission/program.py"), b"import sys\n")  # stands for the code that compress counts
        write_json(Path("params.yaml"), params)  # JSON is YAML
        tokenize.main()
        heldout, = (TOKENIZE_FOLDER / "heldout").glob("*.bin")
        num_heldout = (heldout.stat().st_size - 1024) // 2
        write_json(Path("params.yaml"), merge(params, {"quantize": {"heldout_tokens": num_heldout}}))
        for stage in (train, calibrate, quantize, compress, evaluate):
            stage.main(SEED)
        for split in ("train", "val"):
            paths = sorted((TOKENIZE_FOLDER / split).glob("*.bin"))
            for path in paths:
                write_bytes(Path(f"published/fineweb_{path.name}"), path.read_bytes())
        tokens = b"".join(path.read_bytes()[1024:] for path in (max((TOKENIZE_FOLDER / "train").glob("*.bin")), heldout))
        last = max(Path("published").glob("*train*"))
        last.write_bytes(shard_bytes([int.from_bytes(tokens[n:n + 2], "little") for n in range(0, len(tokens), 2)]))
    return folder


@pytest.fixture
def folder(tmp_path: Path, pipeline: Path) -> Path:
    """A folder with nothing but the program."""
    return write_program(tmp_path / "submission", pipeline)


def write_program(folder: Path, pipeline: Path, changes: Any = None) -> Path:
    write_bytes(folder / "train_gpt.py", make_bundle(merge(read_params(pipeline / "params.yaml"), changes or {}), ROOT))
    return folder


def run(folder: Path, data: Path | None, command: list[str], *, status: int = 0, prefix: tuple[str, ...] = (),
        given: dict[str, str] | None = None) -> str:
    """What a command prints: of a successful one stdout, with notes and progress alone on stderr, of another stderr. Nothing of the
    environment leads to the repository."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")} | (given or {})
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | ({"DATA_PATH": str(data)} if data else {})
    result = subprocess.run([*prefix, sys.executable, "-I", *command], cwd=folder, env=environment, capture_output=True, text=True,
                            check=False)
    assert result.returncode == status, result.stderr
    unexpected = [line for line in result.stderr.splitlines() if not re.match(PROGRESS, line)]
    assert len(unexpected) == (status != 0), result.stderr
    return unexpected[0] if status else result.stdout


@cache
def without_network() -> tuple[str, ...]:
    """The start of a command that runs in a network namespace of its own; nothing where the machine does not allow that."""
    prefix = "unshare", "--map-root-user", "--net"
    try:
        return prefix if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0 else ()
    except FileNotFoundError:
        return ()


def variables(pipeline: Path) -> dict[str, str]:
    return {"SEED": str(SEED), "TOKENIZER_PATH": str(pipeline / TOKENIZE_FOLDER / "tokenizer.model")}


def figures(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def test_it_makes_the_artifact_and_the_digits_of_the_pipeline(pipeline: Path, folder: Path) -> None:
    output = run(folder, pipeline / "published", ONE_PROCESS, prefix=without_network(), given=variables(pipeline))
    assert {path.name for path in folder.iterdir()} == {"train_gpt.py", "model.ptz", f"train_seed{SEED}.log"}
    assert (folder / "model.ptz").read_bytes() == (pipeline / stage_folder("compress", SEED) / "model.ptz").read_bytes()
    assert (folder / f"train_seed{SEED}.log").read_text() == output
    metrics = {stage: load_metrics(pipeline / stage_folder(stage, SEED)) for stage in ("train", "calibrate", "compress", "evaluate")}
    sections = {title: figures(text) for title, _, text in (part.partition("\n") for part in output.split("\n== ")[1:])}
    for stage in ("train", "calibrate", "evaluate"):
        expected = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metrics[stage].items()}
        assert expected.items() <= sections[stage].items(), stage
        assert float(sections[stage]["seconds"]) > 0
    sizes = {key: int(value) for key, value in sections["quantize and compress"].items() if key.endswith("_bytes")}
    num_code_bytes = (folder / "train_gpt.py").stat().st_size
    blob_bytes, limit_bytes = metrics["compress"]["blob_bytes"], read_params(pipeline / "params.yaml")["compress"]["limit_bytes"]
    assert sizes == {"blob_bytes": blob_bytes, "code_bytes": num_code_bytes, "limit_bytes": limit_bytes,
                     "artifact_bytes": blob_bytes + num_code_bytes}
    losses = (pipeline / stage_folder("train", SEED) / "loss.csv").read_text().splitlines()[1:]
    assert output.count(" train_loss:") == len(losses)
    lines = output.splitlines()
    strategies = format_strategies([metrics["evaluate"]], {}).splitlines()
    assert all(found.startswith(line) for found, line in zip(lines[lines.index("== strategies") + 1:], strategies, strict=False))
    assert lines[-2:] == [f"{key}: {metrics['evaluate'][key]:.8f}" for key in ("val_loss", "val_bpb")]


@pytest.mark.skipif(not without_network(), reason="no network namespaces can be made here: the program ran with the network in reach")
def test_there_was_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"import socket; socket.create_connection({server.getsockname()!r})"
        assert subprocess.run([sys.executable, "-c", connect], check=False).returncode == 0
        assert subprocess.run([*without_network(), sys.executable, "-c", connect], capture_output=True, check=False).returncode == 1


def test_two_processes_make_one_result_and_one_scores_it(pipeline: Path, tmp_path: Path) -> None:
    """Sums of two processes are rounded in another way; what they make, distilled, is scored alone, from the splits of the pipeline."""
    folder = write_program(tmp_path / "submission", pipeline, {"evaluate": {"strategies": ["plain"], "strategy": "plain"},
                                                               "quantize": {"distill": {"steps": 2}}})
    metrics = load_metrics(pipeline / stage_folder("evaluate", SEED))
    output = run(folder, pipeline / "published", TWO_PROCESSES, given=variables(pipeline))
    assert output.count("\n== evaluate\n") == 1 and "2 processes" in output.splitlines()[0]
    found = figures(output)
    assert float(found["val_bpb"]) == pytest.approx(metrics["plain_bpb"], abs=0.02)
    assert int(found["artifact_bytes"]) <= CODE_BYTES + 20_000
    assert float(found["distill_seconds"]) > 0 and found["distill_kept"] in ("true", "false") and not list(folder.glob("resume-*"))
    (folder / "tokenizer.model").write_bytes((pipeline / TOKENIZE_FOLDER / "tokenizer.model").read_bytes())
    alone = figures(run(folder, pipeline / TOKENIZE_FOLDER, [*ONE_PROCESS, "--score"]))
    assert float(alone["val_bpb"]) == pytest.approx(float(found["val_bpb"]), abs=1e-5)


def test_what_fails_goes_on_from_the_trained_weights_and_has_not_read_the_validation_text(pipeline: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in (pipeline / "published").iterdir():
        write_bytes(data / path.name, b"damaged" if "_val_" in path.name else path.read_bytes())
    folder = write_program(tmp_path / "submission", pipeline, {"quantize": {"target_bytes": 1000}})
    error = run(folder, data, ONE_PROCESS, status=1, given=variables(pipeline))
    assert error.startswith("quantize.target_bytes: expected at least ")
    state, = folder.glob("resume-*.pt")
    write_program(folder, pipeline)
    error = run(folder, data, ONE_PROCESS, status=1, given=variables(pipeline))
    assert re.search(r"fineweb_val_000000\.bin: expected .* bytes .*, found 7; copy or download it anew", error)
    assert (folder / "model.ptz").read_bytes() == (pipeline / stage_folder("compress", SEED) / "model.ptz").read_bytes()
    assert not state.exists()
    output = run(folder, pipeline / TOKENIZE_FOLDER, [*ONE_PROCESS, "--score"], given=variables(pipeline))
    assert figures(output)["val_bpb"] == f"{load_metrics(pipeline / stage_folder('evaluate', SEED))['val_bpb']:.8f}"
    assert "== train" not in output


def test_it_keeps_to_its_time_limit_and_says_so_in_a_line(pipeline: Path, tmp_path: Path) -> None:
    folder = write_program(tmp_path / "submission", pipeline, {"evaluate": {"limit_seconds": 1e-3}})
    artifact = pipeline / stage_folder("compress", SEED) / "model.ptz"
    error = run(folder, pipeline / "published", [*ONE_PROCESS, "--score", str(artifact)], status=1, given=variables(pipeline))
    assert error.startswith("evaluate.limit_seconds: expected at most 0.001 s")


@pytest.mark.parametrize(("given", "error"), [
    ({"DATA_PATH": ""}, "DATA_PATH: expected the folder of the shards"),
    ({"SEED": "-1"}, "SEED: expected a whole number from 0 to "),
    ({"DATA_PATH": "."}, r"\.: expected shards \*train_\[0-9\]\*\.bin, or train/split\.json, found neither"),
    ({"TOKENIZER_PATH": "none"}, "none: no such file; expected a SentencePiece model"),
])
def test_what_the_environment_lacks_is_said_in_a_line(pipeline: Path, folder: Path, given: dict[str, str], error: str) -> None:
    found = run(folder, None, ONE_PROCESS, status=1, given={"DATA_PATH": str(pipeline / "published")} | variables(pipeline) | given)
    assert re.match(error, found)
    assert not list(folder.glob("resume*"))


def test_code_above_its_reserve_is_refused_before_anything_is_trained(pipeline: Path, tmp_path: Path) -> None:
    folder = write_program(tmp_path / "submission", pipeline, {"compress": {"code_bytes": 1000}})
    error = run(folder, pipeline / "published", ONE_PROCESS, status=1, given=variables(pipeline))
    assert error.startswith("compress.code_bytes: expected at least")
    assert [path.name for path in folder.iterdir()] == ["train_gpt.py"]
