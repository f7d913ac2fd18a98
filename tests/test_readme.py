"""The documents say what is there: numbers of the committed run, folders, pages, links, commands and parameters that exist."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from bench.quantize import FIGURE, TABLE, draw_curve
from lib.evaluation.strategies import STRATEGIES
from lib.params import SECTIONS, read_params
from lib.reporting.strategy_table import format_strategies
from lib.reporting.summary import STAGES_WITH_FIGURES, format_table, headline_rows

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "data/README.md", ROOT / "bench/RESULTS.md"])


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(README.splitlines()) <= 200
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert pages <= set(re.findall(r"\]\(([^)#]+)", README))


def test_the_readme_lists_every_folder() -> None:
    listing = README.split("## Folders")[1].split("```")[1]
    tracked = committed_files()
    assert set(re.findall(r"^(\w+)/", listing, re.MULTILINE)) == {path.split("/")[0] for path in tracked if "/" in path and path[0] != "."}


def committed_files() -> list[str]:
    return subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def committed(path: str) -> str:
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_results_are_those_of_the_committed_run() -> None:
    metrics = {stage: json.loads(committed(f"artifacts/{stage}/seed1337/metrics.json")) for stage in STAGES_WITH_FIGURES}
    strategies = format_strategies([metrics["evaluate"]], dict.fromkeys(STRATEGIES, True))
    for line in [*format_table(headline_rows([metrics]), [1337]).splitlines(), *strategies.splitlines(), "audit: legal ("]:
        assert line in committed("README.md")
    assert f"{metrics['train']['num_parameters']:,} parameters" in committed("README.md")


def test_the_picture_is_drawn_from_its_table() -> None:
    assert draw_curve(TABLE) == FIGURE.read_text()


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_presets_links_and_parameters_exist(path: Path) -> None:
    text, params = path.read_text(), read_params(ROOT / "params.yaml")
    for module in re.findall(r"python -m ((?:stages|lib|bench|tools)\.[\w.]*\w)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, re.MULTILINE)) <= set(targets)
    for preset in re.findall(r"presets/([\w-]+)\.yaml|preset NAME=([\w-]+)", text):
        assert (ROOT / f"presets/{''.join(preset)}.yaml").exists(), preset
    for link, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        assert (path.parent / link).exists(), link
        assert not anchor or anchor in anchors(path.parent / link if link else path), f"{link}#{anchor}"
    for key in re.findall(rf"`((?:{'|'.join(SECTIONS)})(?:\.\w+)+)[`:]", text.replace("model.ptz", "")):
        value: Any = params
        for part in key.split("."):
            assert part in value, key
            value = value[part]
