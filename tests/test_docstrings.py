"""Docstrings say what an argument is, beginning with a noun: not "params: of the optimizer", but "params: settings of the optimizer"."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT) for folder in ("lib", "stages", "tools", "bench") for path in (ROOT / folder).rglob("*.py"))
ARGUMENT = re.compile(r"\s+[\w`*, ]+: (of|whose|that|which|to) ")
ATTRIBUTE = re.compile(r"(Of|Whose|To) ")


def without_a_noun(path: Path) -> Iterator[str]:
    """Such lines of all strings that stand alone: docstrings of modules, classes and functions, and of attributes by their first line."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, *others = node.value.value.split("\n")
            yield from (line for line in others if ARGUMENT.match(line))
            yield from (line for line in (first,) if ATTRIBUTE.match(line))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_what_is_said_of_an_argument_begins_with_a_noun(path: Path) -> None:
    assert list(without_a_noun(path)) == []
