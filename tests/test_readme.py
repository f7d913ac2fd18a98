"""The documents say what is there: every file in the README's tree, numbers of the committed run, commands and parameters that exist."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lib.params import SECTIONS, read_params
from lib.reporting.strategy_table import format_strategies
from lib.reporting.summary import STAGES_WITH_FIGURES, format_table, headline_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md", ROOT / "bench/RESULTS.md"])
LISTED_FOLDERS = ("lib", "stages", "tools", "bench", "presets")


def test_the_tree_lists_every_file() -> None:
    section = README.split("## Where everything is")[1].split("```")[1]
    listed, folders = set(), [""]
    for line in section.strip().splitlines():
        entry = re.match(r"( *)(\S+)", line)
        assert entry is not None
        depth = len(entry[1]) // 2
        folders = [*folders[:depth + 1], entry[2]]
        if not entry[2].endswith("/"):
            listed.add("".join(folders[1:]))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *LISTED_FOLDERS]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    existing = {path for path in tracked if (ROOT / path).exists() and not path.endswith("__init__.py")}
    assert {path for path in listed if path.startswith(LISTED_FOLDERS)} == existing
    assert all((ROOT / path).exists() for path in listed)


def committed(path: str) -> str:
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_results_are_those_of_the_committed_run() -> None:
    metrics = {stage: json.loads(committed(f"artifacts/{stage}/seed1337/metrics.json")) for stage in STAGES_WITH_FIGURES}
    for line in [*format_table(headline_rows([metrics]), [1337]).splitlines(), *format_strategies([metrics["evaluate"]]).splitlines()]:
        assert line in committed("README.md")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_presets_links_and_parameters_exist(path: Path) -> None:
    text, params = path.read_text(), read_params(ROOT / "params.yaml")
    for module in re.findall(r"python -m ((?:stages|lib|bench|tools)\.[\w.]*\w)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    for preset in re.findall(r"presets/([\w-]+)\.yaml|preset NAME=([\w-]+)", text):
        assert (ROOT / f"presets/{''.join(preset)}.yaml").exists(), preset
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (path.parent / link).exists(), link
    for key in re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.\w+)+)[`:]", text.replace("model.ptz", "")):
        value: Any = params
        for part in key.split("."):
            assert part in value, key
            value = value[part]
