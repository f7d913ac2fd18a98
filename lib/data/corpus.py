"""Documents: where they come from, which are left out, and which split each belongs to.

The split is a function of a document's text after collapsing white space and folding case, so documents that are equal but
for that cannot end up in different splits, whatever their order and number; and only the first of them is kept.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lib.artifacts.tokens import SPLITS
from lib.data.config import SourceName, TokenizeParams
from lib.data.docstrings import check_pins, harvest
from lib.data.jsonl import find_files, read_texts
from lib.data.tokenizer import SPACE

KEY_BYTES = 16  # of a document's SHA-256, kept for every document: a chance match among 1e10 documents has probability 1e-19


@dataclass(frozen=True)
class Source:
    """Documents that can be read any number of times, always in the same order.

    Attributes:
        read: starts a pass; its argument says in the progress what the pass is for.
        provenance: what the manifest says of the documents' origin.
    """

    read: Callable[[str], Iterator[str]]
    provenance: dict[str, Any]


def open_source(params: TokenizeParams) -> Source:
    """The source that the section ``tokenize`` names.

    Raises:
        ValueError: files or packages that are missing or not as expected.
    """
    return SOURCES[params.source](params)


@dataclass
class Selection:
    """One pass over documents: cleans them, leaves some out and gives each of the others its split.

    Attributes:
        params: the section ``tokenize``.
        keys: for each split, the leading bytes of the normalised hashes of its documents.
        skipped: number of documents left out so far, by reason.
    """

    params: TokenizeParams
    keys: dict[str, set[bytes]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    skipped: Counter[str] = field(default_factory=Counter)

    def select(self, texts: Iterator[str]) -> Iterator[tuple[str, str]]:
        """Split and text of each document that is kept, in the order of `texts`.

        Leading spaces are removed, because the byte accounting does not see a space after BOS. Left out are: empty
        documents; short ones; those with U+2581, which SentencePiece cannot tell from a space; those with lone surrogates,
        which have no UTF-8 form; and repetitions.
        """
        for untrimmed in texts:
            text = untrimmed.lstrip(" ")
            reason = self._flaw(text)
            if reason is None:
                digest = normalized_hash(text)
                split = split_of(digest, self.params.heldout_fraction, self.params.val_fraction or 0)
                key = digest[:KEY_BYTES]
                if key not in self.keys[split]:
                    self.keys[split].add(key)
                    yield split, text
                    continue
                reason = "repeated"
            self.skipped[reason] += 1

    def _flaw(self, text: str) -> str | None:
        if not text:
            return "empty"
        if SPACE in text:
            return "contains U+2581"
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return "contains a lone surrogate"
        return "short" if size < self.params.min_document_bytes else None


def normalized_hash(text: str) -> bytes:
    """SHA-256 of a text after collapsing runs of white space and folding case."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode(errors="surrogatepass")).digest()


def split_of(digest: bytes, heldout_fraction: float, val_fraction: float) -> str:
    """The split of a document: the leading 64 bits of its normalised hash, as a fraction, fall to val, heldout or train in this order."""
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < val_fraction:
        return "val"
    return "heldout" if position < val_fraction + heldout_fraction else "train"


def _embedded(params: TokenizeParams) -> Source:
    """Docstrings, one document per module, in the order of their hashes, which mixes the packages.

    A docstring that occurred in an earlier module, but for white space and case, is left out, so that no copy of it ends up
    in another split.
    """
    versions = check_pins(Path(params.path), params.packages)
    seen: set[bytes] = set()
    texts = []
    for docstrings in harvest(versions):
        new: dict[bytes, str] = {}
        for docstring in docstrings:
            new.setdefault(normalized_hash(docstring), docstring)
        texts.append("\n\n".join(docstring for key, docstring in new.items() if key not in seen))
        seen.update(new)
    texts.sort(key=normalized_hash)
    return Source(lambda description: iter(texts), {"name": "embedded", "python": platform.python_version(), "packages": versions})


def _jsonl(params: TokenizeParams) -> Source:
    """JSON lines, in the order of the files and their lines: shuffle beforehand what is sorted by topic."""
    path = Path(params.path)
    files = find_files(path, params.pattern)
    sizes = {(file.relative_to(path) if file != path else Path(file.name)).as_posix(): file.stat().st_size for file in files}
    return Source(lambda description: read_texts(files, description), {"name": "jsonl", "file_bytes": sizes})


SOURCES: dict[SourceName, Callable[[TokenizeParams], Source]] = {"embedded": _embedded, "jsonl": _jsonl}
