"""The submitted program, ``train_gpt.py``: one file with all the code that scores an artifact, and the settings of the score.

The file is `lib.submission.head` with two of its lines filled in. Sources lose comments and docstrings, keep their lines, and are
compressed together. The settings take the same number of bytes whatever they are, so that the size of the code is known before
anybody decides how to score.
"""

import ast
import base64
import io
import json
import tokenize
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import brotli

from lib.errors import UserError
from lib.submission import head
from lib.submission.closure import import_closure, imported_packages

ENTRY = Path("lib/submission/program.py")
"""What the submitted program runs."""
SETTINGS_BYTES = 2048
"""Room for the settings; those of the published systems take 1,400."""

_SETTINGS_LINE, _ARCHIVE_LINE = 'SETTINGS = "{}"\n', 'ARCHIVE = ""\n'  # of head.py


def make_bundle(settings: Mapping[str, Any], root: Path) -> bytes:
    """The content of ``train_gpt.py``.

    Args:
        settings: the section ``evaluate``, as JSON can hold it.
        root: the folder of the project, which holds the sources.

    Raises:
        ValueError: settings that take more than `SETTINGS_BYTES`.
    """
    text = "{" + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in settings.items()) + "}"
    if len(text) > SETTINGS_BYTES:
        raise UserError(f"evaluate: expected settings of at most {SETTINGS_BYTES:,} bytes as JSON, which is the room that {ENTRY.name} "
                        f"has for them, found {len(text):,}; name fewer parameter groups or layers")
    content = Path(head.__file__).read_text(encoding="utf-8")
    for line, value in ((_SETTINGS_LINE, f'r"""{text:{SETTINGS_BYTES}}"""'), (_ARCHIVE_LINE, f'"{_pack(bundle_sources(root))}"')):
        assert content.count(line) == 1
        content = content.replace(line, f"{line.split('=')[0]}= {value}\n")
    return content.encode()


def code_bytes(root: Path) -> int:
    """Bytes of ``train_gpt.py``, which are the same for all settings; argument as of `make_bundle`."""
    return len(make_bundle({}, root))


def bundle_sources(root: Path) -> dict[str, str]:
    """Path -> text of the source files that `ENTRY` needs, as they are bundled; argument as of `make_bundle`."""
    return {path.as_posix(): strip_source((root / path).read_text(encoding="utf-8")) for path in import_closure(ENTRY, root)}


def list_packages(root: Path) -> dict[str, str]:
    """Distributions that ``train_gpt.py`` imports from, name -> installed version; argument as of `make_bundle`."""
    return imported_packages(import_closure(ENTRY, root), root)


def strip_source(source: str) -> str:
    """A Python source without comments and docstrings, those of attributes too; what is left stays on its line, so that tracebacks name
    the lines of the repository."""
    lines = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str):
                    first, last = statement.lineno - 1, (statement.end_lineno or 0) - 1
                    before, after = lines[first].encode()[:statement.col_offset], lines[last].encode()[statement.end_col_offset:]
                    line = (before + (b"pass" if len(node.body) == 1 else b"") + after).decode().rstrip()
                    lines[first:last + 1] = [line] + [""] * (last - first)
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines)).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(lines)


def _pack(sources: Mapping[str, str]) -> str:
    """What head.py unpacks."""
    text = "\0".join(part for path, source in sources.items() for part in (path, source))
    return base64.b85encode(brotli.compress(text.encode(), lgwin=24)).decode()
