"""The submitted program, ``train_gpt.py``: one file with all the code that trains, quantizes, packs and scores, and the settings of that.

The file is `lib.submission.head` with one of its lines filled in: sources, without comments and docstrings and with short local names,
and settings are compressed together. The file takes the same number of bytes whatever the settings are, so that the size of the code
is known before anybody decides them.
"""

import bz2
import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import python_minifier

from lib.errors import UserError
from lib.submission import head
from lib.submission.closure import import_closure, imported_packages

ENTRY = Path("lib/submission/program.py")
"""What the submitted program runs."""
SECTIONS = ("model", "train", "calibrate", "quantize", "compress", "evaluate")
"""Sections of params.yaml that the program needs."""
SETTINGS_BYTES = 1664
"""Room for the settings, compressed with the sources that have their names; those of the presets take 1,010 to 1,550."""

_ARCHIVE_LINE = 'ARCHIVE = ""\n'  # of head.py
_ESCAPES = str.maketrans({"\0": r"\x00", "\n": r"\n", "\r": r"\r", '"': r'\"', "\\": r"\\"})


def make_bundle(params: Mapping[str, Any], root: Path) -> bytes:
    """The content of ``train_gpt.py``.

    Args:
        params: all of params.yaml, as JSON can hold it.
        root: the folder of the project, which holds the sources.

    Raises:
        UserError: settings that take more than `SETTINGS_BYTES`.
    """
    sources = bundle_sources(root)
    empty, bundle = (_fill_in(sources, settings) for settings in ({}, {section: params[section] for section in SECTIONS}))
    if (taken := len(bundle) - len(empty)) > SETTINGS_BYTES:
        raise UserError(f"{', '.join(SECTIONS)}: expected settings that take at most {SETTINGS_BYTES:,} bytes of {ENTRY.name}'s archive, "
                        f"found {taken:,}; name fewer parameter groups, layers or matrices")
    return bundle.ljust(len(empty) + SETTINGS_BYTES)


def code_bytes(root: Path) -> int:
    """Bytes of ``train_gpt.py``, which are the same for all settings; argument as of `make_bundle`."""
    return len(_fill_in(bundle_sources(root), {})) + SETTINGS_BYTES


def bundle_sources(root: Path) -> dict[str, str]:
    """Path -> text of the source files that `ENTRY` needs, as they are bundled; argument as of `make_bundle`."""
    return {path.as_posix(): minify((root / path).read_text(encoding="utf-8")) for path in import_closure(ENTRY, root)}


def list_packages(root: Path) -> dict[str, str]:
    """Distributions that ``train_gpt.py`` imports from, name -> installed version; argument as of `make_bundle`."""
    return imported_packages(import_closure(ENTRY, root), root)


@cache
def minify(source: str) -> str:
    """A Python source that does the same in fewer bytes: without comments, docstrings and the annotations of functions, with short names of
    local variables and of what begins with an underscore. Names that other modules can see, and the annotations of classes, stay."""
    public = re.findall(r"\b(?:[a-zA-Z]|__)\w*", source)
    return python_minifier.minify(source, remove_literal_statements=True, rename_globals=True, preserve_globals=public,
                                  hoist_literals=False)  # hoisted, they compress less well


def _fill_in(sources: Mapping[str, str], settings: Mapping[str, Any]) -> bytes:
    """head.py with what it unpacks, in Latin-1: bytes are characters, of which five need an escape."""
    files = {"settings.json": json.dumps(settings, separators=(",", ":")), **sources}
    text = "\0".join(part for file in files.items() for part in file)
    archive = bz2.compress(text.encode()).decode("latin-1").translate(_ESCAPES)  # smaller than Brotli's, by 1 %, and LZMA's, by 4 %
    content = Path(head.__file__).read_text(encoding="utf-8")
    assert content.count(_ARCHIVE_LINE) == 1
    return ("# coding: latin-1\n" + content.replace(_ARCHIVE_LINE, f'ARCHIVE = "{archive}"\n')).encode("latin-1")
