"""Trains a language model, packs it into model.ptz and scores it, in bits per byte of a validation text; one file, all code.

    SEED=42 DATA_PATH=FOLDER TOKENIZER_PATH=FILE python train_gpt.py     # one process
    SEED=42 DATA_PATH=FOLDER TOKENIZER_PATH=FILE torchrun --standalone --nproc_per_node=8 train_gpt.py    # 8 GPUs
    DATA_PATH=FOLDER python train_gpt.py --score [ARTIFACT]              # score only; torchrun does, too
    python train_gpt.py --extract FOLDER                                 # write out what is in ARCHIVE

FOLDER has shards of tokens, *train_[0-9]*.bin and *val_[0-9]*.bin; TOKENIZER_PATH is tokenizer.model beside this file if nothing is given.
model.ptz and train_seed42.log are written beside this file. A run that was interrupted goes on when it is started again.
ARCHIVE holds the sources of Albatross and settings.json, what is trained and scored how: names and texts, separated by NUL, bzip2, one
character a byte. Sources are minified, so that line numbers of errors are theirs, not the repository's.
"""

import bz2
import importlib
import json
import sys
from argparse import ArgumentParser
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from pathlib import Path
from typing import Any

FILE = __file__  # which is gone when functions of atexit import


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
    """Write the files out, or import the program and run it."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--extract", type=Path)
    parts = bz2.decompress(ARCHIVE.encode("latin-1")).decode().split("\0")
    files = dict(zip(parts[::2], parts[1::2], strict=True))
    if folder := parser.parse_known_args()[0].extract:
        for path, source in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(source.encode())
        return
    sys.meta_path.insert(0, Archive(files))
    importlib.import_module("lib.errors").report_errors()
    importlib.import_module("lib.submission.program").main(json.loads(files["settings.json"]), Path(FILE), __doc__)


ARCHIVE = ""

if __name__ == "__main__":
    main()
