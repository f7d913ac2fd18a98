"""Scores the language model in model.ptz, in bits per byte of a validation text.

    python train_gpt.py --data FOLDER                                   # validation shards: *val_[0-9]*.bin
    torchrun --standalone --nproc_per_node=8 train_gpt.py --data FOLDER # the same on 8 GPUs
    python train_gpt.py --extract FOLDER                                # write out the sources in ARCHIVE

SETTINGS says how the text is scored. ARCHIVE holds the sources of Albatross that do it: paths and texts, separated by NUL, Brotli, base
85. Comments and docstrings are left out, line numbers are those of the repository. How the model was trained: see README.md.
"""

import base64
import importlib
import json
import sys
import traceback
from argparse import ArgumentParser
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any

import brotli

FILE = __file__  # which is gone when functions of atexit import
SETTINGS = "{}"


class Archive(MetaPathFinder, SourceLoader):  # type: ignore[misc]  # which the standard library does itself
    """Imports modules from memory; tracebacks and `inspect` find their lines here."""

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = {f"{FILE}/{path}": source for path, source in sources.items()}

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """The module of a dotted name, if it is in the archive."""
        return spec_from_loader(fullname, self) if self._paths(fullname) else None

    def get_filename(self, fullname: str) -> str:
        """What tracebacks call the file of a module."""
        return self._paths(fullname)[0]

    def get_data(self, path: Any) -> bytes:
        """The source of such a file."""
        return self.sources[path].encode()

    def _paths(self, name: str) -> list[str]:
        path = f"{FILE}/{name.replace('.', '/')}"
        return [found for found in (f"{path}.py", f"{path}/__init__.py") if found in self.sources]


def main() -> None:
    """Write the sources out, or import them and score."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--extract", type=Path)
    parts = brotli.decompress(base64.b85decode(ARCHIVE)).decode().split("\0")
    sources = dict(zip(parts[::2], parts[1::2], strict=True))
    if folder := parser.parse_known_args()[0].extract:
        for path, source in sources.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(source.encode())
        return
    sys.meta_path.insert(0, Archive(sources))
    sys.excepthook = traceback.print_exception  # unlike the built-in one, it shows lines that are in no file
    importlib.import_module("lib.submission.program").main(json.loads(SETTINGS), Path(FILE).parent, __doc__)


ARCHIVE = ""

if __name__ == "__main__":
    main()
