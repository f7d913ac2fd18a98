"""docs/design.md draws what is there: arrows of the pipeline, layers of lib, folders, and the first line of every file."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.test_layers import ALLOWED

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/design.md").read_text()
Arrows = set[tuple[str, str]]


def arrows(chapter: str) -> Arrows:
    drawing = PAGE.split(f"## {chapter}\n")[1].split("```mermaid")[1].split("```")[0]
    found: list[tuple[str, str]] = re.findall(r"(\w+) --(?: \".*?\" --)?> (\w+)", drawing)
    assert len(found) == len(set(found)) == drawing.count(">")
    return set(found)


def reachable(start: str, drawn: Arrows) -> set[str]:
    ends = {end for first, end in drawn if first == start}
    return ends.union(*(reachable(end, drawn) for end in ends))


def tracked(*folders: str) -> list[str]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [path for path in listed if (ROOT / path).exists()]


def test_the_pipeline_has_the_arrows_of_dvc_yaml() -> None:
    stages: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")["stages"]
    assert arrows("The pipeline") == {(path.split("/")[1], name) for name, stage in stages.items() for path in stage["deps"]
                                      if path.startswith("artifacts/")}


def test_layers_are_drawn_as_the_table_allows_with_no_arrow_too_many() -> None:
    drawn = arrows("Layers")
    base = {name for name in ALLOWED if (ROOT / f"lib/{name}.py").exists()}
    table = {name: {"base" if other in base else other for other in others} for name, others in ALLOWED.items() if name not in base}
    for name, allowed in table.items():
        ends = {end for start, end in drawn if start == name}
        assert ends <= allowed <= reachable(name, drawn), name
        assert not any(end in reachable(other, drawn) for end in ends for other in ends), name
    assert {name for arrow in drawn for name in arrow} == table.keys() | {"base"}


def test_every_folder_is_listed() -> None:
    listing = PAGE.split("## Layers\n")[1].split("```\n")[2]
    entries = re.findall(r"^( *)(\w+)/", listing, re.MULTILINE)
    inner = {name for indent, name in entries if indent}
    outer = {name for indent, name in entries if not indent}
    files = [path.split("/") for path in tracked() if not path.startswith(".")]
    assert outer == {parts[0] for parts in files if len(parts) > 1}
    assert inner == {parts[1] for parts in files if parts[0] == "lib" and len(parts) > 2}


def test_the_first_line_of_every_file_says_what_it_is_for() -> None:
    (command,) = re.findall(r"^(grep .*) lib$", PAGE, re.MULTILINE)
    folders = ["lib", "stages", "tools", "bench"]
    shown = subprocess.run([*shlex.split(command), *folders], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    first_lines = dict(line.split(":", 1) for line in shown.splitlines() if "/__init__.py:" not in line)
    files = {path for path in tracked(*folders) if path.endswith(".py") and not path.endswith("/__init__.py")}
    assert first_lines.keys() == files
    assert all((ROOT / path).read_text().startswith(line) and len(line) > 20 for path, line in first_lines.items())
