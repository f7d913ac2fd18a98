"""The worked examples of CONTRIBUTING.md apply to the project as it is, one after the other; their tests pass, their settings are valid."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[1]
COPIED = ("bench", "lib", "stages", "tools", "tests", "presets", "params.yaml", "pyproject.toml", "requirements.txt", "Makefile")
COMMIT = ("-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "--quiet", "--message", "before")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
EXAMPLES = ("A clip rule", "A codec", "A strategy of test-time training", "An architecture option")
CHANGED_TESTS = ("tests/quantization/test_clipping.py", "tests/compression/test_coding.py", "tests/evaluation/test_score_first.py",
                 "tests/model/test_gpt.py", "tests/test_presets.py::test_the_complete_file_has_the_values_that_are_read",
                 "tests/golden/test_artifact.py",
                 "tests/evaluation/test_strategies.py::test_work_is_counted_in_inputs_and_three_times_where_it_is_trained_on")


def run(folder: Path, *command: str, content: str = "") -> None:
    result = subprocess.run(command, cwd=folder, env=ENVIRONMENT, input=content, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr


def settings_to_try(chapter: str) -> list[dict[str, Any]]:
    """Dotted key -> value, for every experiment that the commands of a chapter run."""
    found: list[dict[str, Any]] = []
    for command in re.findall(r"^dvc exp run .*", chapter, re.MULTILINE):
        changes = [argument.split("=", 1) for argument in shlex.split(command) if "=" in argument]
        keys, choices = [key for key, _ in changes], [[value] if value[0] == "[" else value.split(",") for _, value in changes]
        found += [dict(zip(keys, map(YAML(typ="safe", pure=True).load, values), strict=True)) for values in itertools.product(*choices)]
    return found


@pytest.mark.parametrize(("chapter", "rerun"), [
    ("A clip rule", {"quantize", "compress", "report"}), ("A codec", {"quantize", "compress", "evaluate", "report"}),
    ("A strategy of test-time training", {"compress", "evaluate", "report"})])
def test_an_example_makes_no_stage_stale_that_does_not_use_it(chapter: str, rerun: set[str]) -> None:
    """Stages that depend on a file that is changed; compress and report depend on all submitted code."""
    (patch,) = re.findall(rf"^## {chapter}\n.*?```diff\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    changed = set(re.findall(r"^\+\+\+ b/(\S+)", patch, re.MULTILINE))
    stages = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
    assert {name for name, stage in stages.items() if changed & set(stage["deps"])} == rerun


@pytest.mark.slow
def test_the_worked_examples_work(tmp_path: Path) -> None:
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()  # so that make uses the environment of this test
    for arguments in (("init", "--quiet"), ("add", "--all"), COMMIT):
        run(tmp_path, "git", *arguments)
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE))
    assert list(chapters)[-len(EXAMPLES):] == list(EXAMPLES)
    tests, experiments = set[str](), list[dict[str, Any]]()
    for name in EXAMPLES:
        (patch,) = re.findall(r"```diff\n(.*?)```", chapters[name], re.DOTALL)
        run(tmp_path, "git", "apply", "-", content=patch)
        for command in re.findall(r"```sh\n(.*?)```", chapters[name], re.DOTALL):
            run(tmp_path, "sh", "-c", command)
        tests |= set(re.findall(r"^\+\+\+ b/(tests/\S*test_\S+)", patch, re.MULTILINE))
        assert settings_to_try(chapters[name])
        experiments += settings_to_try(chapters[name])
    assert {test.split("::")[0] for test in CHANGED_TESTS} >= tests
    for settings in experiments:
        params = YAML(typ="safe", pure=True).load(tmp_path / "params.yaml")
        for key, value in settings.items():
            *sections, last = key.split(".")
            section = params
            for part in sections:
                section = section[part]
            section[last] = value
        YAML(typ="safe", pure=True).dump(params, tmp_path / "tried.yaml")
        run(tmp_path, sys.executable, "-m", "tools.check_params", "tried.yaml")
    run(tmp_path, sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    run(tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", *CHANGED_TESTS)
