"""The worked examples of CONTRIBUTING.md apply to the project as it is, one after the other, and their tests pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_the_worked_examples_work(tmp_path: Path) -> None:
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()  # so that make uses the environment of this test
    for arguments in (("init", "--quiet"), ("add", "--all"), COMMIT):
        run(tmp_path, "git", *arguments)
    chapters = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE))
    assert list(chapters)[-len(EXAMPLES):] == list(EXAMPLES)
    tests = set()
    for name in EXAMPLES:
        (patch,) = re.findall(r"```diff\n(.*?)```", chapters[name], re.DOTALL)
        run(tmp_path, "git", "apply", "-", content=patch)
        for command in re.findall(r"```sh\n(.*?)```", chapters[name], re.DOTALL):
            run(tmp_path, "sh", "-c", command)
        tests |= set(re.findall(r"^\+\+\+ b/(tests/\S*test_\S+)", patch, re.MULTILINE))
    assert {test.split("::")[0] for test in CHANGED_TESTS} >= tests
    run(tmp_path, sys.executable, "-m", "ruff", "check", "--no-cache", ".")
    run(tmp_path, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-o", "addopts=", *CHANGED_TESTS)
