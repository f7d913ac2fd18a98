"""Writing and reading the files of `artifacts/`: complete or absent, and byte for byte the same for the same content."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lib.errors import UserError


class ArtifactError(UserError):
    """A file that is missing, damaged or not what was expected; the message names the path and the remedy."""


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new, never a part (temporary name, fsync, rename).

    Raises:
        OSError: it cannot be written, for lack of space perhaps; an old file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, f"cannot be written ({error.strerror}); make room and rerun", str(path)) from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON with two spaces of indentation and a final newline; keys keep their order."""
    write_bytes(path, (json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: missing or not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; `dvc repro` makes it") from None
    except (ValueError, RecursionError) as error:  # other encodings, numbers of thousands of digits and deep nesting among them
        raise ArtifactError(f"{path}: not valid JSON ({error}); `dvc repro -f` makes it anew") from None


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table as CSV with ``\\n`` line ends; floats as their shortest exact decimal form."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode())


def read_csv(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file, column -> cell; cells as they are written.

    Raises:
        ArtifactError: missing, or without some of `columns`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file; `dvc repro` makes it") from None
    if missing := set(columns) - set(reader.fieldnames or ()):
        raise ArtifactError(f"{path}: no column {', '.join(sorted(missing))}; `dvc repro -f` makes the file anew")
    return rows


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
