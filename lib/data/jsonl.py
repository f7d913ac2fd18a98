"""Documents in JSON lines files, plain or compressed, read as streams."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import zstandard

from lib.progress import Progress

CHUNK_BYTES = 1 << 16


def find_files(path: Path, pattern: str) -> list[Path]:
    """`path` itself if it is a file, else the files inside it that match `pattern`, sorted by path.

    Raises:
        ValueError: nothing there, or a file that is neither ``.jsonl`` nor compressed in a known way.
    """
    if not path.exists():
        raise ValueError(f"tokenize.path: expected a file or folder, found nothing at {path}")
    files = [path] if path.is_file() else sorted(file for file in path.glob(pattern) if file.is_file())
    if not files:
        raise ValueError(f"tokenize.pattern: expected files that match {pattern!r} inside {path}, found none")
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(f"{file}: expected a name that ends in {', '.join(READERS)}; convert it or change tokenize.pattern")
    return files


def read_texts(files: Iterable[Path], description: str) -> Iterator[str]:
    """The field ``text`` of every line of every file, in order, with memory for one line.

    Raises:
        ValueError: a file that is damaged or truncated, or a line that is not an object with a string ``text``.
    """
    files = list(files)
    with Progress(description, sum(file.stat().st_size for file in files), "B") as progress:
        for path in files:
            with path.open("rb") as file:
                position = 0
                for number, line in enumerate(_read_lines(path, file), 1):
                    yield _parse(path, number, line)
                    progress.update(file.tell() - position)
                    position = file.tell()


def _read_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    try:
        yield from READERS[path.suffix](file)
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged or truncated ({error}); fetch or compress it again") from None


def _parse(path: Path, number: int, line: bytes) -> str:
    try:
        document = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: expected a JSON object in UTF-8 ({error}), found {line[:60]!r}") from None
    if not isinstance(document, dict) or not isinstance(document.get("text"), str):
        raise ValueError(f"{path}, line {number}: expected an object with a string \"text\", found {line[:60]!r}")
    text: str = document["text"]
    return text


def _read_gzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.open(file) as lines:
        yield from lines


def _read_zstd(file: BinaryIO) -> Iterator[bytes]:
    frame, rest = None, b""
    while chunk := file.read(CHUNK_BYTES):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            *lines, rest = (rest + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
    if frame is not None:  # zstandard's own file objects take a truncated frame for a complete one
        raise EOFError("the file ends inside a compressed frame")
    if rest:
        yield rest


READERS: dict[str, Callable[[BinaryIO], Iterable[bytes]]] = {".jsonl": iter, ".gz": _read_gzip, ".zst": _read_zstd}
