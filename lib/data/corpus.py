"""Documents: where they come from, which are left out, and which split each belongs to.

The split is a function of a document's text after collapsing white space and folding case, so documents that are equal but
for that cannot end up in different splits, whatever their order and number; and only the first of them is kept. Where the first
documents are declared to be the validation split, they are kept as they are, and later ones that equal one of them left out.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lib.artifacts.tokens import SPLITS
from lib.data.config import SourceName, TokenizeParams
from lib.data.docstrings import check_pins, harvest
from lib.data.hub import download_dataset
from lib.data.jsonl import find_files, read_blocks
from lib.data.shards import Shards, find_shards
from lib.data.tokenizer import SPACE
from lib.errors import UserError

LONE_SURROGATE = "contains a lone surrogate"
ALSO_IN_VAL = "also in val"
"""Why a document is left out that equals one of a validation split that is given as it is."""

KEY_BYTES = 16  # of a document's SHA-256, kept for every document: a chance match among 1e10 documents has probability 1e-19
BATCH_BYTES = 1 << 20  # of texts in memory that are handed to one process at a time


class Batch(Protocol):
    """Documents that follow each other; pickled to the process that parses and encodes them."""

    @property
    def size_bytes(self) -> int:
        """What reading it adds to `Source.size_bytes`."""

    def texts(self) -> Iterable[str]:
        """The documents; raises ValueError where there is something else."""


@dataclass(frozen=True)
class Texts:
    """A batch of texts that are in memory."""

    content: tuple[str, ...]
    size_bytes: int

    def texts(self) -> Iterable[str]:
        """The documents."""
        return self.content


def batch_texts(texts: Iterable[str]) -> Iterator[Texts]:
    """All texts in order, in batches of about a megabyte."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.encode(errors="surrogatepass"))
        if size >= BATCH_BYTES:
            yield Texts(tuple(batch), size)
            batch, size = [], 0
    if batch:
        yield Texts(tuple(batch), size)


@dataclass(frozen=True)
class Source:
    """Documents that can be read any number of times, always in the same order.

    Attributes:
        read: starts a pass.
        size_bytes: of the whole pass, for the progress.
        provenance: what the manifest says of the documents' origin.
        tokenizer: a SentencePiece model file; None where one is trained.
    """

    read: Callable[[], Iterator[Batch]]
    size_bytes: int
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


class Examined(NamedTuple):
    """One document looked at by itself.

    Attributes:
        text: without leading spaces, because the byte accounting does not see a space after BOS.
        flaw: why it should be left out, or None.
        digest: its normalised hash.
    """

    text: str
    flaw: str | None
    digest: bytes


def examine(untrimmed: str, min_document_bytes: int) -> Examined:
    """Trim, hash and judge a document.

    Flawed are: empty documents; short ones; those with U+2581, which SentencePiece cannot tell from a space; and those with lone
    surrogates, which have no UTF-8 form.
    """
    text = untrimmed.lstrip(" ")
    return Examined(text, _find_flaw(text, min_document_bytes), normalized_hash(text))


@dataclass
class Selection:
    """One pass over documents: leaves some out and gives each of the others its split.

    Attributes:
        params: the section ``tokenize``.
        keys: for each split, the leading bytes of the normalised hashes of its documents.
        skipped: number of documents left out so far, by reason.
    """

    params: TokenizeParams
    keys: dict[str, set[bytes]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    skipped: Counter[str] = field(default_factory=Counter)
    _num_given: int = 0

    def assign(self, flaw: str | None, digest: bytes) -> str | None:
        """The split of the next document, or None if it is left out: for a flaw, or because it repeats an earlier one.

        The first `val_documents` are validation documents whatever they are.

        Raises:
            ValueError: one of the first `val_documents` has a lone surrogate.
        """
        key, num_val = digest[:KEY_BYTES], self.params.val_documents or 0
        if self._num_given < num_val:
            self._num_given += 1
            if flaw == LONE_SURROGATE:
                raise UserError(f"tokenize.val_documents: expected {num_val} documents with a UTF-8 form, found that number "
                                 f"{self._num_given} {flaw}; remove the document or set tokenize.val_fraction instead")
            self.keys["val"].add(key)
            return "val"
        split = split_of(digest, self.params.heldout_fraction, self.params.val_fraction or 0)
        reason = flaw or (ALSO_IN_VAL if num_val and key in self.keys["val"] else "repeated" if key in self.keys[split] else None)
        if reason is not None:
            self.skipped[reason] += 1
            return None
        self.keys[split].add(key)
        return split


def _find_flaw(text: str, min_document_bytes: int) -> str | None:
    if not text:
        return "empty"
    if SPACE in text:
        return "contains U+2581"
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return LONE_SURROGATE
    return "short" if size < min_document_bytes else None


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
    batches = list(batch_texts(texts))
    provenance = {"name": "embedded", "python": platform.python_version(), "packages": versions}
    return Source(lambda: iter(batches), sum(batch.size_bytes for batch in batches), provenance, _given_tokenizer(params))


def _jsonl(params: TokenizeParams) -> Source:
    """JSON lines, in the order of the files and their lines: shuffle beforehand what is sorted by topic."""
    path = Path(params.path)
    files = find_files(path, params.pattern)
    sizes = {(file.relative_to(path) if file != path else Path(file.name)).as_posix(): file.stat().st_size for file in files}
    return Source(lambda: read_blocks(files), sum(sizes.values()), {"name": "jsonl", "file_bytes": sizes}, _given_tokenizer(params))


def _given_tokenizer(params: TokenizeParams) -> Path | None:
    return None if params.tokenizer is None else Path(params.tokenizer)


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
    size_bytes = sum(file.stat().st_size for file in dataset.documents)
    return Source(lambda: read_blocks(dataset.documents), size_bytes, dataset.provenance, dataset.tokenizer)


SOURCES: dict[SourceName, Callable[[TokenizeParams], Source | ShardSource]] = {
    "embedded": _embedded, "jsonl": _jsonl, "shards": _shards, "hub": _hub}
