"""What the targets of the Makefile run, and what they say to arguments that are wrong; nothing is installed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def make(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"PATH": PATH}
    return subprocess.run(["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", TARGETS)
def test_tools_are_run_as_modules(target: str) -> None:
    """Scripts in an environment name its Python by a path, which is gone after the folder was moved."""
    commands = make("--dry-run", "--always-make", target).stdout
    assert commands
    assert re.findall(r"(?<!-m )(?<![\w.])(?:dvc|mypy|pytest|ruff|torchrun)(?= |$)", commands, re.MULTILINE) == []


def test_the_lowest_versions_are_tested_where_the_tests_are() -> None:
    folders = re.findall(r"tests/(\S+)", make("--dry-run", "lowest").stdout)
    assert {"audit", "evaluation", "model", "quantization", "training"} <= set(folders)
    assert all((ROOT / "tests" / folder).is_dir() for folder in folders)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the environment is taken to be there."""
    for name in ("Makefile", "requirements.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for name in ("bench", "lib", "presets", "requirements", "tools", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "expected"), [
    (["sweep"], 'usage: make sweep TARGETS="400000 600000"'),
    (["sweep", "TARGETS=some"], 'usage: make sweep TARGETS="400000 600000"'),
    (["sweep", "TARGETS=-5"], "TARGETS: expected numbers of bytes above 0, found -5"),
    (["size", "STEPS=some"], "usage: make size [STEPS=400] [EQUAL=steps]"),
    (["size", "EQUAL=bytes"], "argument --equal: invalid choice: 'bytes'"),
    (["preset"], "usage: make preset NAME=pr585\n  default "),
    (["preset", "NAME=pr584"], "NAME: expected a preset, found 'pr584'; did you mean pr585?\n  default "),
    (["decode"], "usage: make decode SEED=1337 [STRATEGY=lora] [TOKENS=300]"),
    (["decode", "SEED=-1"], "argument --seed: expected a whole number from 0 to"),
    (["bench", "BENCH=none"], "No module named bench.none"),
])
def test_wrong_arguments_are_named(folder: Path, arguments: list[str], expected: str) -> None:
    result = make(*arguments, folder=folder)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_python_that_is_not_the_lowest_is_refused(folder: Path) -> None:
    (folder / "python").write_text(f"#!/bin/sh\nexec {sys.executable} -c \"import sys; sys.version_info = (3, 14, 0); $2\"\n")
    (folder / "python").chmod(0o755)
    result = make("lowest", "PYTHON=./python", folder=folder)
    assert result.returncode != 0
    assert "the lowest Python is 3.11; pass PYTHON=python3.11 to make, found 3." in result.stderr
    assert not (folder / ".venv-lowest").exists()
