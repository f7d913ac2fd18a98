"""A folder in which the train stage runs as users run it; and, run as a module, the stage saving its state as often as it can."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lib.artifacts.resume
from lib.artifacts.files import write_json
from lib.artifacts.paths import stage_folder
from lib.artifacts.resume import load_resume
from lib.params import SECTIONS
from stages import train
from tests.evaluation.tiny import MODEL
from tests.stages import project
from tests.training.tiny import TRAIN

ROOT = Path(__file__).parents[2]
SEED = 7
RESULT = stage_folder("train", SEED)
RESULT_FILES = {"checkpoint.safetensors", "loss.csv", "heldout.csv", "metrics.json"}
NUM_STEPS = 120
SAVING_OFTEN = "tests.stages.train_project"
PATIENCE_SECONDS = 120  # with what hangs

SECTION_MODEL: dict[str, Any] = MODEL | {
    "vocab_size": project.VOCAB_SIZE, "num_layers": 1, "num_xsa_layers": 0, "smear_gate": False, "bigram_rows": 0, "value_embedding_dim": 0,
    "value_embedding_layers": [], "unet_skips": False, "residual_mix": False, "attention": "auto"}
SECTION_TRAIN: dict[str, Any] = TRAIN | {"budget_steps": NUM_STEPS, "sequence_tokens": 16, "qat": TRAIN["qat"] | {"below_lr": 0.0},
                                         "heldout_curve": {"every_steps": 25, "tokens": 300}}


def write_project(folder: Path) -> None:
    """Tokenizer, shards, params.yaml."""
    project.write_inputs(folder)
    shutil.rmtree(folder / RESULT.parent)
    write_params(folder)


def write_params(folder: Path, section: str | None = None, **changes: Any) -> None:
    """params.yaml with some keys of a section changed, nested ones one by one."""
    params: dict[str, Any] = dict.fromkeys(SECTIONS) | {"model": SECTION_MODEL, "train": SECTION_TRAIN,
                                                        "calibrate": project.PARAMS["calibrate"]}
    if section is not None:
        merged = {key: params[section][key] | value if isinstance(value, dict) else value for key, value in changes.items()}
        params[section] = params[section] | merged
    write_json(folder / "params.yaml", params)  # JSON is YAML


def read_results(folder: Path) -> dict[str, bytes]:
    """Every file in the stage's folder but the one that a clock decides; none if there is no folder."""
    return {path.name: path.read_bytes() for path in (folder / RESULT).glob("*") if path.name != "timing.json"}


def find_state(folder: Path) -> Path:
    """The one saved state."""
    (path,) = (folder / RESULT).glob("resume-*.pt")
    return path


def saved_steps(folder: Path) -> int:
    """Steps after which the state was saved; 0 where it was not."""
    states = [load_resume(path) for path in (folder / RESULT).glob("resume-*.pt")]
    return states[0]["num_steps"] if states and states[0] else 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def torchrun(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", *arguments]


class Command:
    """The stage as a process of its own, or below torchrun; what it prints goes to a file beside its folder."""

    def __init__(self, folder: Path, launcher: list[str] | None = None, module: str = "stages.train") -> None:
        self._folder, self._output = folder, folder.with_name(f"{folder.name}.txt")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with self._output.open("w") as output:
            self._process = subprocess.Popen([*(launcher or [sys.executable]), "-m", module, "--seed", str(SEED)], cwd=folder,
                                             env=environment, stdout=output, stderr=output)

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:  # a test has failed
            self._process.terminate()
            self._process.wait()

    @property
    def printed(self) -> str:
        """Everything until now."""
        return self._output.read_text()

    def wait_for_step(self, num_steps: int) -> None:
        """Until the state after so many steps, or later ones, is saved."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while saved_steps(self._folder) < num_steps:
            assert self._process.poll() is None and time.monotonic() < deadline, self.printed
            time.sleep(0.02)

    def kill(self, number: int, rank: int = 0) -> None:
        """Send a signal to one of the processes that train; the module `SAVING_OFTEN` must be what they run."""
        os.kill(int((self._folder / f"pid{rank}").read_text()), number)

    def kill_launcher(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        """The exit status, once it has ended."""
        return self._process.wait(PATIENCE_SECONDS)


def run(folder: Path, launcher: list[str] | None = None) -> str:
    """What the stage prints; it must succeed."""
    with Command(folder, launcher) as command:
        assert command.wait() == 0, command.printed
        return command.printed


def read_losses(folder: Path) -> list[float]:
    """The loss curve."""
    return [float(line.split(",")[1]) for line in (folder / RESULT / "loss.csv").read_text().splitlines()[1:]]


def read_timing(folder: Path) -> dict[str, Any]:
    timing: dict[str, Any] = json.loads((folder / RESULT / "timing.json").read_text())
    return timing


if __name__ == "__main__":
    Path(f"pid{os.environ.get('RANK', '0')}").write_text(str(os.getpid()))
    lib.artifacts.resume.INTERVAL_SECONDS, lib.artifacts.resume.SHARE = 0.0, float("inf")
    train.main(SEED)
