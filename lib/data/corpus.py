"""Documents: where they come from, which are left out, and which split each belongs to.

The split is a function of a document's text after collapsing white space and folding case, so documents that are equal but
for that cannot end up in different splits, whatever their order and number; and only the first of them is kept. Where validation
documents are given, the first ones or those of separate files, they are kept as they are, and others that equal one of them left out.
"""

import hashlib
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
SPACE_MARK = "contains U+2581"
ALSO_IN_VAL, ALSO_IN_HELDOUT = "also in val", "also in heldout"
"""Why a document is left out that equals one of a split that is given."""

KEY_BYTES = 16  # of a document's SHA-256, kept for every document: a chance match among 1e10 documents has probability 1e-19
START_CHARACTERS = 60
BATCH_BYTES = 1 << 20  # of texts in memory that are handed to one process at a time


class Batch(Protocol):
    """Documents that follow each other; pickled to the process that parses and encodes them."""

    @property
    def size_bytes(self) -> int:
        """What reading it adds to `Source.size_bytes`."""

    def texts(self) -> Iterable[str]:
        """The documents; raises ValueError where there is something else."""

    def places(self) -> Iterable[str]:
        """Where each document is, for errors."""


@dataclass(frozen=True)
class Texts:
    """A batch of texts that are in memory."""

    content: tuple[str, ...]
    size_bytes: int

    def texts(self) -> Iterable[str]:
        """The documents."""
        return self.content

    def places(self) -> Iterable[str]:
        """How each document begins."""
        return (f"which begins {text[:START_CHARACTERS]!r}" for text in self.content)


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
        read: starts a pass over the documents that are not in separate files.
        size_bytes: bytes of the whole pass, for the progress.
        provenance: what the manifest says of the documents' origin.
        tokenizer: a SentencePiece model file; None where one is trained.
        separate: files of a split of its own, by its name.
    """

    read: Callable[[], Iterator[Batch]]
    size_bytes: int
    provenance: dict[str, Any]
    tokenizer: Path | None = None
    separate: Mapping[str, Sequence[Path]] = field(default_factory=dict)

    def batches(self) -> Iterator[tuple[str | None, Batch]]:
        """All documents with the split that they are given for, None where their text decides; validation first, so that others which
        equal one of it are known."""
        for split in ("val", "heldout"):
            yield from ((split, batch) for batch in read_blocks(self.separate.get(split, ())))
        yield from ((None, batch) for batch in self.read())


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
    source = SOURCES[params.source](params)
    return _add_separate_files(source, params) if isinstance(source, Source) and params.separate_paths else source


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
        lossless: whether the tokenizer is, so that it must reproduce every validation document.
        keys: for each split, the leading bytes of the normalised hashes of its documents.
        skipped: number of documents left out so far, by reason.
    """

    params: TokenizeParams
    lossless: bool = True
    keys: dict[str, set[bytes]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    skipped: Counter[str] = field(default_factory=Counter)
    _num_given: int = 0

    def __post_init__(self) -> None:
        given = {*self.params.separate_paths} | ({"val"} if self.params.val_documents else set())
        self._given_splits = [(split, why) for split, why in (("val", ALSO_IN_VAL), ("heldout", ALSO_IN_HELDOUT)) if split in given]

    def assign(self, flaw: str | None, digest: bytes, place: str, given: str | None = None) -> str | None:
        """The split of the next document, or None if it is left out: for a flaw, or because it repeats an earlier one.

        The first `val_documents`, and those of a separate file, are validation documents whatever they are.

        Args:
            flaw, digest: as in `Examined`.
            place: where the document is, for errors.
            given: the split whose separate file it is from.

        Raises:
            ValueError: such a document has a lone surrogate, or U+2581 where the tokenizer is lossless.
        """
        key, num_val = digest[:KEY_BYTES], self.params.val_documents or 0
        if given == "val" or (given is None and self._num_given < num_val):
            self._num_given += 1
            if flaw == LONE_SURROGATE or (flaw == SPACE_MARK and self.lossless):
                setting, end = ("val_path", "") if given else ("val_documents", ", or set tokenize.val_documents: null and "
                                                               "tokenize.val_fraction, which leaves such documents out")
                sign = ", its sign for a space" if flaw == SPACE_MARK else ""
                raise UserError(f"tokenize.{setting}: expected documents that the tokenizer can reproduce, found that number "
                                f"{self._num_given}, {place}, {flaw}{sign}; replace the character or remove the document{end}")
            self.keys["val"].add(key)
            return "val"
        split = given or split_of(digest, self.params.heldout_fraction or 0, self.params.val_fraction or 0)
        also = [reason for other, reason in self._given_splits if other != split and key in self.keys[other]]
        reason = flaw or next(iter(also), "repeated" if key in self.keys[split] else None)
        if reason is not None:
            self.skipped[reason] += 1
            return None
        self.keys[split].add(key)
        return split


def _find_flaw(text: str, min_document_bytes: int) -> str | None:
    if not text:
        return "empty"
    if SPACE in text:
        return SPACE_MARK
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
    separate = {file.resolve() for key, folder in params.separate_paths.items()
                for file in find_files(Path(folder), params.pattern, f"tokenize.{key}_path")}
    files = [file for file in find_files(path, params.pattern) if file.resolve() not in separate]
    if not files:
        raise UserError(f"tokenize.path: expected files beside those of tokenize.val_path and tokenize.heldout_path, found none at {path}")
    sizes = _file_sizes(path, files)
    return Source(lambda: read_blocks(files), sum(sizes.values()), {"name": "jsonl", "file_bytes": sizes}, _given_tokenizer(params))


def _add_separate_files(source: Source, params: TokenizeParams) -> Source:
    """The same with the files of `val_path` and `heldout_path`."""
    files = {split: find_files(Path(path), params.pattern, f"tokenize.{split}_path") for split, path in params.separate_paths.items()}
    resolved = [{file.resolve() for file in each} for each in files.values()]
    if len(resolved) == 2 and (common := resolved[0] & resolved[1]):
        raise UserError(f"tokenize.heldout_path: expected other files than those of tokenize.val_path, found {min(common)} in both")
    sizes = {split: _file_sizes(Path(params.separate_paths[split]), each) for split, each in files.items()}
    return replace(source, separate=files, size_bytes=source.size_bytes + sum(sum(each.values()) for each in sizes.values()),
                   provenance=source.provenance | {"separate_file_bytes": sizes})


def _file_sizes(path: Path, files: Iterable[Path]) -> dict[str, int]:
    return {(file.relative_to(path) if file != path else Path(file.name)).as_posix(): file.stat().st_size for file in files}


def _given_tokenizer(params: TokenizeParams) -> Path | None:
    return None if params.tokenizer is None else Path(params.tokenizer)


def _shards(params: TokenizeParams) -> ShardSource:
    """The shards in a folder."""
    assert params.tokenizer is not None
    shards = find_shards(Path(params.path))
    sizes = {file.name: file.stat().st_size for file in (*shards.train, *shards.val, *shards.val_bytes)}
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
