"""Documents: where they come from, which are left out, and which split each belongs to.

The split is a function of a document's text after collapsing white space and folding case, so documents that are equal but
for that cannot end up in different splits, whatever their order and number; and only the first of them is kept. Where the first
documents are declared to be the validation split, they are kept as they are, and later ones that equal one of them left out.
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
from lib.data.hub import download_dataset
from lib.data.jsonl import find_files, read_texts
from lib.data.shards import Shards, find_shards
from lib.data.tokenizer import SPACE

LONE_SURROGATE = "contains a lone surrogate"
ALSO_IN_VAL = "also in val"
"""Why a document is left out that equals one of a validation split that is given as it is."""

KEY_BYTES = 16  # of a document's SHA-256, kept for every document: a chance match among 1e10 documents has probability 1e-19


@dataclass(frozen=True)
class Source:
    """Documents that can be read any number of times, always in the same order.

    Attributes:
        read: starts a pass; its argument says in the progress what the pass is for.
        provenance: what the manifest says of the documents' origin.
        tokenizer: a SentencePiece model file; None where one is trained.
    """

    read: Callable[[str], Iterator[str]]
    provenance: dict[str, Any]
    tokenizer: Path | None = None


@dataclass(frozen=True)
class ShardSource:
    """Published shards of tokens.

    Attributes:
        shards: the files.
        provenance: what the manifest says of their origin.
        tokenizer: the SentencePiece model file that they were made with.
    """

    shards: Shards
    provenance: dict[str, Any]
    tokenizer: Path


def open_source(params: TokenizeParams) -> Source | ShardSource:
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
        which have no UTF-8 form; and repetitions. The first `val_documents` are validation documents whatever they are.

        Raises:
            ValueError: one of the first `val_documents` has a lone surrogate.
        """
        num_given = self.params.val_documents or 0
        for position, untrimmed in enumerate(texts):
            text = untrimmed.lstrip(" ")
            reason = self._flaw(text)
            if position < num_given:
                if reason == LONE_SURROGATE:
                    raise ValueError(f"tokenize.val_documents: expected {num_given} documents with a UTF-8 form, found that number "
                                     f"{position + 1} {reason}; remove the document or set tokenize.val_fraction instead")
                self.keys["val"].add(normalized_hash(text)[:KEY_BYTES])
                yield "val", text
                continue
            if reason is None:
                digest = normalized_hash(text)
                split = split_of(digest, self.params.heldout_fraction, self.params.val_fraction or 0)
                key = digest[:KEY_BYTES]
                if num_given and key in self.keys["val"]:
                    reason = ALSO_IN_VAL
                elif key in self.keys[split]:
                    reason = "repeated"
                else:
                    self.keys[split].add(key)
                    yield split, text
                    continue
            self.skipped[reason] += 1

    def _flaw(self, text: str) -> str | None:
        if not text:
            return "empty"
        if SPACE in text:
            return "contains U+2581"
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            return LONE_SURROGATE
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
    provenance = {"name": "embedded", "python": platform.python_version(), "packages": versions}
    return Source(lambda description: iter(texts), provenance, None if params.tokenizer is None else Path(params.tokenizer))


def _jsonl(params: TokenizeParams) -> Source:
    """JSON lines, in the order of the files and their lines: shuffle beforehand what is sorted by topic."""
    path = Path(params.path)
    files = find_files(path, params.pattern)
    sizes = {(file.relative_to(path) if file != path else Path(file.name)).as_posix(): file.stat().st_size for file in files}
    tokenizer = None if params.tokenizer is None else Path(params.tokenizer)
    return Source(lambda description: read_texts(files, description), {"name": "jsonl", "file_bytes": sizes}, tokenizer)


def _shards(params: TokenizeParams) -> ShardSource:
    """The shards in a folder."""
    assert params.tokenizer is not None
    shards = find_shards(Path(params.path))
    sizes = {file.name: file.stat().st_size for file in (*shards.train, *shards.val)}
    return ShardSource(shards, {"name": "shards", "file_bytes": sizes}, Path(params.tokenizer))


def _hub(params: TokenizeParams) -> Source | ShardSource:
    """A dataset of the Hugging Face Hub: its shards, or the documents that they were made from."""
    dataset = download_dataset(params.hub)
    if dataset.shards is not None:
        return ShardSource(dataset.shards, dataset.provenance, dataset.tokenizer)
    return Source(lambda description: read_texts(dataset.documents, description), dataset.provenance, dataset.tokenizer)


SOURCES: dict[SourceName, Callable[[TokenizeParams], Source | ShardSource]] = {
    "embedded": _embedded, "jsonl": _jsonl, "shards": _shards, "hub": _hub}
