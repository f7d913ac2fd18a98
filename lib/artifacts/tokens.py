"""The seam between tokenize and what reads tokens: splits, each a folder of checksummed shards in the challenge's ``.bin`` format.

A shard is a header of 256 little-endian int32 ([0] magic, [1] version, [2] number of tokens) and the tokens as
little-endian uint16. Shards are cut at token boundaries, so a document may go on in the next shard; a BOS token starts
every document.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from lib.artifacts.files import ArtifactError, read_json, sha256_of, write_json

SPLITS = ("train", "heldout", "val")
SPLIT_FILE = "split.json"
SPLIT_KEYS = {"documents", "tokens", "raw_bytes", "accounted_bytes", "vocab_size", "shards"}
REMEDY = "`dvc repro -f tokenize` makes it anew"

MAGIC = 20240520
VERSION = 1
HEADER_INT32S = 256
HEADER_BYTES = 4 * HEADER_INT32S
VERIFY_CHUNK_TOKENS = 1 << 20  # small enough that the second look at a chunk finds it in the processor's cache

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Split:
    """The tokens of one split, memory-mapped.

    Attributes:
        folder: where it was read from.
        shards: (n,) uint16 each, in order.
        num_documents: documents, which is also the number of BOS tokens.
        raw_bytes: UTF-8 bytes of the documents.
        accounted_bytes: bytes of all tokens by the tokenizer's accounting; `raw_bytes` where the tokenizer is lossless.
        vocab_size: every token is below it.
    """

    folder: Path
    shards: tuple[Tokens, ...]
    num_documents: int
    raw_bytes: int
    accounted_bytes: int
    vocab_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all shards, BOS tokens included."""
        return sum(len(shard) for shard in self.shards)

    def tokens(self) -> Tokens:
        """(N,) uint16: all shards in order; a copy unless there is one shard only."""
        return self.shards[0] if len(self.shards) == 1 else np.concatenate(self.shards)


def load_split(folder: Path, vocab_size: int) -> Split:
    """Map a split into memory after checking every shard's header, length, checksum and token range.

    Args:
        folder: a folder that `SplitWriter` wrote.
        vocab_size: vocabulary of the model or tokenizer that the tokens are for.

    Raises:
        ArtifactError: a file that is missing, truncated, altered or of another format, or another vocabulary.
    """
    description = read_json(folder / SPLIT_FILE)
    if not isinstance(description, dict) or description.keys() != SPLIT_KEYS:
        raise ArtifactError(f"{folder / SPLIT_FILE}: expected the keys {', '.join(sorted(SPLIT_KEYS))}; {REMEDY}")
    if description["vocab_size"] != vocab_size:
        raise ArtifactError(f"{folder / SPLIT_FILE}: expected tokens of a vocabulary of {vocab_size}, found {description['vocab_size']}; "
                            "set model.vocab_size to tokenize.vocab_size")
    listed = description["shards"]
    if not (all(type(description[key]) is int for key in SPLIT_KEYS - {"shards"})
            and isinstance(listed, list) and listed and all(map(_is_entry, listed))):
        raise ArtifactError(f"{folder / SPLIT_FILE}: expected numbers, and name, tokens and SHA-256 of each shard, found others; {REMEDY}")
    with ThreadPoolExecutor() as pool:
        shards = tuple(pool.map(lambda shard: _load_shard(folder / shard["name"], shard["tokens"], shard["sha256"], vocab_size, REMEDY),
                                listed))
    return Split(folder, shards, description["documents"], description["raw_bytes"], description["accounted_bytes"], vocab_size)


def load_shards(paths: Sequence[Path], vocab_size: int) -> tuple[Tokens, ...]:
    """Map shards into memory that no ``split.json`` describes, as the challenge publishes them.

    Args:
        paths: the shards, in order.
        vocab_size: vocabulary of the model or tokenizer that the tokens are for.

    Returns:
        (n,) uint16 each.

    Raises:
        ArtifactError: a file that is missing, truncated or of another format, or a token beyond the vocabulary.
    """
    with ThreadPoolExecutor() as pool:
        return tuple(pool.map(lambda path: _load_shard(path, None, None, vocab_size, "copy or download it anew"), paths))


class SplitWriter:
    """Writes one split, document after document, with memory for one document.

    The folder becomes a split when `close` writes ``split.json``; before, `load_split` finds none. On a full disk nothing is left of
    it, nor of the other splits beside it.

    Args:
        folder: the split's folder, emptied first; its name names the shards.
        vocab_size: every token must be below it.
        shard_tokens: tokens in each shard but the last.

    Attributes:
        raw_bytes: UTF-8 bytes of the documents so far.
        accounted_bytes: bytes of their tokens by the tokenizer's accounting.
    """

    def __init__(self, folder: Path, vocab_size: int, shard_tokens: int) -> None:
        if folder.exists():
            shutil.rmtree(folder)  # shards of an earlier run must not stay among those of this one
        folder.mkdir(parents=True)
        self._folder, self._vocab_size, self._shard_tokens = folder, vocab_size, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._file_tokens = 0
        self._documents = self._tokens = 0
        self.raw_bytes = self.accounted_bytes = 0

    def add(self, tokens: Tokens, raw_bytes: int, accounted_bytes: int, num_documents: int = 1) -> None:
        """Append a document, or several that follow each other.

        Args:
            tokens: (n,) uint16, BOS first.
            raw_bytes: UTF-8 bytes of the text.
            accounted_bytes: bytes of the tokens by the tokenizer's accounting.
            num_documents: how many they are.
        """
        assert int(tokens.max()) < self._vocab_size
        self._documents += num_documents
        self._tokens += len(tokens)
        self.raw_bytes += raw_bytes
        self.accounted_bytes += accounted_bytes
        with self._all_or_nothing():
            while len(tokens):
                file = self._open_shard() if self._file is None else self._file
                part = tokens[: self._shard_tokens - self._file_tokens]
                file.write(part.astype("<u2").tobytes())
                self._file_tokens += len(part)
                tokens = tokens[len(part):]
                if self._file_tokens == self._shard_tokens:
                    self._finish_shard(file)

    def close(self) -> dict[str, Any]:
        """Complete the split and return what ``split.json`` says of it."""
        with self._all_or_nothing():
            if self._file is not None:
                self._finish_shard(self._file)
            description = {"documents": self._documents, "tokens": self._tokens, "raw_bytes": self.raw_bytes,
                           "accounted_bytes": self.accounted_bytes, "vocab_size": self._vocab_size, "shards": self._shards}
            write_json(self._folder / SPLIT_FILE, description)
        return description

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Where one split cannot be written, all splits go: they would only keep a full disk full."""
        try:
            yield
        except OSError as error:
            for split in SPLITS:
                shutil.rmtree(self._folder.parent / split, ignore_errors=True)
            reason = f"cannot be written ({os.strerror(error.errno or 0)}); make room and rerun"
            raise OSError(error.errno, reason, str(self._folder)) from None

    def _open_shard(self) -> BinaryIO:
        self._file = (self._folder / f"{self._folder.name}_{len(self._shards):06d}.bin").open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._file_tokens = 0
        return self._file

    def _finish_shard(self, file: BinaryIO) -> None:
        header = np.zeros(HEADER_INT32S, "<i4")
        header[:3] = MAGIC, VERSION, self._file_tokens
        file.seek(0)
        file.write(header.tobytes())
        file.close()
        path = Path(file.name)
        self._shards.append({"name": path.name, "tokens": self._file_tokens, "sha256": sha256_of(path)})
        self._file = None


def _is_entry(shard: Any) -> bool:
    """Whether this is what ``split.json`` says of a shard: a file of its own folder, how many tokens it has, its checksum."""
    return (isinstance(shard, dict) and isinstance(name := shard.get("name"), str) and re.fullmatch(r"[\w-]{1,99}\.bin", name, re.ASCII)
            is not None and type(shard.get("tokens")) is int and shard["tokens"] >= 0 and isinstance(shard.get("sha256"), str))


def _load_shard(path: Path, num_tokens: int | None, sha256: str | None, vocab_size: int, remedy: str) -> Tokens:
    """Map one shard after checking it; where `num_tokens` is None, its header and its length must say the same."""
    try:
        found_bytes = path.stat().st_size
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, but {SPLIT_FILE} lists it; {remedy}") from None
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a file, found a folder or a device; {remedy}")
    if num_tokens is None:
        num_tokens = max(0, found_bytes - HEADER_BYTES) // 2
    expected_bytes = HEADER_BYTES + 2 * num_tokens
    if found_bytes != expected_bytes:
        raise ArtifactError(f"{path}: expected {expected_bytes} bytes ({num_tokens} tokens), found {found_bytes}; {remedy}")
    content = np.memmap(path, np.uint8, mode="r")
    header, tokens = content[:HEADER_BYTES].view("<i4"), content[HEADER_BYTES:].view("<u2")
    if tuple(header[:3]) != (MAGIC, VERSION, num_tokens):
        raise ArtifactError(f"{path}: expected a header of magic {MAGIC}, version {VERSION} and {num_tokens} tokens, "
                            f"found {', '.join(map(str, header[:3]))}; {remedy}")
    digest, largest = hashlib.sha256(header.data), 0
    for start in range(0, num_tokens, VERIFY_CHUNK_TOKENS):
        chunk = tokens[start:start + VERIFY_CHUNK_TOKENS]
        digest.update(chunk.data)
        largest = max(largest, int(chunk.max()))
    if sha256 not in (None, digest.hexdigest()):
        raise ArtifactError(f"{path}: expected SHA-256 {sha256}, found {digest.hexdigest()}; the file was altered; {remedy}")
    if largest >= vocab_size:
        raise ArtifactError(f"{path}: expected tokens below the vocabulary size {vocab_size}, found {largest}; {remedy}")
    return tokens
