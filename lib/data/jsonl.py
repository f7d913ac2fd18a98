"""Documents in JSON lines files, plain or compressed, read as streams of blocks of whole lines."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import zstandard

from lib.errors import UserError

CHUNK_BYTES = 1 << 16  # read from a file at a time
ZSTD_BYTES = 1 << 8  # given to zstandard at a time: 4 bytes may be a block, and become 128 KiB
BLOCK_BYTES = 1 << 20  # of lines that are parsed together
MAX_LINE_BYTES = 1 << 26
MAX_WINDOW_BYTES = 1 << 31  # `zstd --long=31`; memory is touched only as far as the content goes


@dataclass(frozen=True)
class LineBlock:
    """Lines of one file that follow each other.

    Attributes:
        path: the file.
        number: number of the first line, from 1.
        lines: what is between two line ends, decompressed.
        size_bytes: how far the block took the reader in the file.
    """

    path: Path
    number: int
    lines: bytes
    size_bytes: int

    def texts(self) -> Iterator[str]:
        """The field ``text`` of every line that is not blank.

        Raises:
            ValueError: a line that is not an object with a string ``text``.
        """
        return (_parse(self.path, number, line) for number, line in self._lines())

    def places(self) -> Iterator[str]:
        """File and line of every text."""
        return (f"{self.path}, line {number}" for number, _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        return ((number, line) for number, line in enumerate(self.lines.split(b"\n"), self.number) if line.strip())


def find_files(path: Path, pattern: str, key: str = "tokenize.path") -> list[Path]:
    """`path` itself if it is a file, else the files inside it that match `pattern`, sorted by path; `key` names the path in errors.

    Raises:
        ValueError: nothing there, or a file that is neither ``.jsonl`` nor compressed in a known way.
    """
    if not path.exists():
        raise UserError(f"{key}: expected a file or folder, found nothing at {path}; correct it, or put the file there")
    files = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
    if not files:
        raise UserError(f"tokenize.pattern: expected files that match {pattern!r} inside {path}, found none")
    for file in files:
        if file.suffix not in READERS:
            raise UserError(f"{file}: expected a name that ends in {', '.join(READERS)}; convert it, or change {key} or tokenize.pattern")
    return files


def read_blocks(files: Iterable[Path]) -> Iterator[LineBlock]:
    """All lines of every file, in order, with memory for one block; a block has about a megabyte, or one longer line.

    Raises:
        ValueError: a file that is damaged or truncated, or that has a line of more than `MAX_LINE_BYTES`.
    """
    for path in files:
        with path.open("rb") as file:
            number, position = 1, 0
            try:
                for lines in _cut(READERS[path.suffix](file)):
                    if len(lines) - lines.rfind(b"\n") > MAX_LINE_BYTES + 1:
                        line = number + lines.count(b"\n")
                        raise UserError(f"{path}, line {line}: expected at most {MAX_LINE_BYTES:,} bytes, found more; split the document, "
                                        "or see to it that lines end with line feeds")
                    yield LineBlock(path, number, lines, file.tell() - position)
                    number, position = number + lines.count(b"\n"), file.tell()
            except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
                raise UserError(f"{path}: damaged or truncated ({error}); fetch or compress it again") from None


def _cut(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in blocks that end at line ends, or within a line that is too long."""
    block: list[bytes] = []
    size = 0
    for chunk in chunks:
        end = chunk.rfind(b"\n") + 1
        if size > BLOCK_BYTES + MAX_LINE_BYTES:
            break
        if end and size + end >= BLOCK_BYTES:
            yield b"".join([*block, chunk[:end]])
            block, size = [chunk[end:]], len(chunk) - end
        else:
            block.append(chunk)
            size += len(chunk)
    if size:
        yield b"".join(block)


def _parse(path: Path, number: int, line: bytes) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = "nested too deeply" if isinstance(error, RecursionError) else error
        raise UserError(f"{path}, line {number}: expected a JSON object in UTF-8 ({problem}), found {line[:60]!r}; correct or remove the "
                        "line") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise UserError(f"{path}, line {number}: expected an object with a string \"text\", found {line[:60]!r}; correct or remove "
                        "the line")
    text: str = document["text"]
    return text


def _read(file: BinaryIO) -> Iterator[bytes]:
    return iter(partial(file.read, CHUNK_BYTES), b"")


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as content:
        yield from iter(partial(content.read, CHUNK_BYTES), b"")


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    frame = None
    for chunk in iter(partial(file.read, ZSTD_BYTES), b""):
        rest = chunk
        while rest:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj()
            if content := frame.decompress(rest):
                yield content
            rest = b""
            if frame.eof:
                rest, frame = frame.unused_data, None
    if frame is not None:  # zstandard's own file objects take a truncated frame for a complete one
        raise EOFError("the file ends inside a compressed frame")


READERS: dict[str, Callable[[BinaryIO], Iterable[bytes]]] = {".jsonl": _read, ".gz": _read_gzip, ".zst": _read_zstd}
