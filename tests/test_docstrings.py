"""Docstrings say what an argument is, beginning with a noun: not "params: of the optimizer", but "params: settings of the optimizer"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT) for folder in ("lib", "stages", "tools", "bench") for path in (ROOT / folder).rglob("*.py"))
WITHOUT_A_NOUN = re.compile(r"(?:\s+[\w`*, ]+: (?:of|whose|that|which|to)|Of|Whose|To) ")


def docstring_lines(path: Path) -> Iterator[str]:
    """Lines of all strings that stand alone: docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield from node.value.value.splitlines()


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_is_said_of_an_argument_begins_with_a_noun(path: Path) -> None:
    assert [line for line in docstring_lines(path) if WITHOUT_A_NOUN.match(line)] == []
