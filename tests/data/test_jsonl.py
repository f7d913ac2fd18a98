import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lib.data.jsonl import find_files, read_texts

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = ["one", "two\nlines", "", "Ωμέγα \U0001f600", "x" * 300_000]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_texts_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS)))
    assert list(read_texts([path], "read")) == TEXTS
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS).removesuffix(b"\n")))
    assert list(read_texts([path, path], "read")) == TEXTS + TEXTS


@given(parts=st.lists(st.lists(st.text(max_size=5), max_size=3), max_size=4))
def test_zstandard_frames_join(tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("frames") / "documents.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(lines_of(texts)) for texts in parts))
    assert list(read_texts([path], "read")) == [text for texts in parts for text in texts]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("lost_bytes", [1, 4, 30])
def test_truncated_file_is_an_error(tmp_path: Path, suffix: str, lost_bytes: int) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS))[:-lost_bytes])
    with pytest.raises(ValueError, match=rf"documents\.jsonl\{suffix}: damaged or truncated"):
        list(read_texts([path], "read"))


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_foreign_content_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(lines_of(TEXTS))
    with pytest.raises(ValueError, match=r"documents\.jsonl.*: damaged or truncated"):
        list(read_texts([path], "read"))


@pytest.mark.parametrize("line", [
    b'{"text": "cut', b"", b'{"text": "\xff"}', b'["text"]', b'{"body": "x"}', b'{"text": null}', b'{"text": 3}',
    b'{"text": "x"} {"text": "y"}',
])
def test_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(lines_of(["good"]) + line + b"\n" + lines_of(["good"]))
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 2: expected"):
        list(read_texts([path], "read"))


def test_find_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.jsonl.zst", "notes.txt", "folder.jsonl/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(tmp_path, "**/*.jsonl*") == [tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl", tmp_path / "sub/c.jsonl.zst"]
    assert find_files(tmp_path / "b.jsonl", "ignored") == [tmp_path / "b.jsonl"]
    with pytest.raises(ValueError, match=r"tokenize\.path: expected a file or folder, found nothing"):
        find_files(tmp_path / "none", "*")
    with pytest.raises(ValueError, match=r"tokenize\.pattern: expected files that match '\*\.json'"):
        find_files(tmp_path, "*.json")
    with pytest.raises(ValueError, match=r"notes\.txt: expected a name that ends in \.jsonl, \.gz, \.zst"):
        find_files(tmp_path, "*.txt")
