import subprocess
import sys
from pathlib import Path
from typing import Any

import dvc.api
import pytest

from lib.artifacts.files import read_csv
from tests.reporting.results import make_metrics, write_results
from tools import sweep


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sweep", "900000", "700000", "900000"])


def metrics_of(path: str, rev: str) -> dict[str, Any]:
    """What DVC would find in an experiment: a size that is its target, and a loss that falls with it."""
    _, stage, seed, _ = path.split("/")
    target = int(rev.removeprefix("target-"))
    metrics = make_metrics(int(seed.removeprefix("seed")))
    metrics["compress"]["artifact_bytes"] = target
    metrics["quantize"]["heldout_kl"] = 1000 / target
    return metrics[stage]


def write_params(seeds: list[int], target: str) -> None:
    write_results(seeds)
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("target_bytes: null", f"target_bytes: {target}").replace(
        "compress: {", "compress: {code_bytes: 60000, level: 22, limit_bytes: 800000, ").replace(
        "evaluate: {", "evaluate: {strategies: [plain, one_pass, lora], strategy: lora, "))


def test_each_target_is_one_experiment_and_one_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_params([1, 2], "600000")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(dvc.api, "metrics_show", metrics_of)
    sweep.main()
    runs = [command[7:] for command in commands if command[:7] == [sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name"]]
    assert runs == [[f"target-{target}", "--set-param", f"quantize.target_bytes={target}", "--set-param", f"compress.limit_bytes={limit}",
                     "--set-param", "evaluate.strategies=[plain,lora]"]
                    for target, limit in ((700000, 800000), (900000, 900000))]
    rows = read_csv(Path("artifacts/sweep/sweep.csv"), ["target_bytes", *sweep.COLUMNS])
    assert [(row["target_bytes"], float(row["artifact_bytes"])) for row in rows] == [("700000", 700000), ("900000", 900000)]
    assert [float(row["heldout_kl"]) for row in rows] == [1000 / 700000, 1000 / 900000]
    assert float(rows[0]["val_bpb"]) == pytest.approx(1.65 + 0.015)  # the mean over both seeds
    assert Path("artifacts/sweep/sweep.svg").read_text().count("<svg") == 1
    assert capsys.readouterr().out == "artifacts/sweep/sweep.csv, artifacts/sweep/sweep.svg\n"


def test_strategies_that_did_not_run_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params([1], "600000")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: None)
    monkeypatch.setattr(dvc.api, "metrics_show",
                        lambda path, rev: {key: value for key, value in metrics_of(path, rev).items() if key != "sliding_bpb"})
    sweep.main()
    assert [row["sliding_bpb"] for row in read_csv(Path("artifacts/sweep/sweep.csv"), ["sliding_bpb"])] == ["", ""]
    figure = Path("artifacts/sweep/sweep.svg").read_text()
    assert (">val<" in figure, ">sliding<" in figure) == (True, False)


def test_without_free_steps_there_is_nothing_to_sweep() -> None:
    write_params([1], "null")
    with pytest.raises(SystemExit, match=r"quantize\.target_bytes: expected a number, found null"):
        sweep.main()


def test_a_failed_experiment_ends_the_sweep_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    write_params([1], "600000")

    def fail(command: list[str], **_: Any) -> None:
        if "run" in command:
            raise subprocess.CalledProcessError(255, command)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(SystemExit, match="the experiment with 700,000 bytes failed"):
        sweep.main()
