import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from lib.data import jsonl
from lib.data.jsonl import find_files, read_blocks

COMPRESS: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
TEXTS = ["one", "two\nlines", "", "Ωμέγα \U0001f600", "x" * 300_000]


def read_texts(files: list[Path]) -> list[str]:
    return [text for block in read_blocks(files) for text in block.texts()]


def lines_of(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": text}).encode() + b"\n" for text in texts)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_texts_round_trip(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS)))
    assert read_texts([path]) == TEXTS
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS).removesuffix(b"\n")))
    assert read_texts([path, path]) == TEXTS + TEXTS


@given(parts=st.lists(st.lists(st.text(max_size=5), max_size=3), max_size=4))
def test_zstandard_frames_join(tmp_path_factory: pytest.TempPathFactory, parts: list[list[str]]) -> None:
    path = tmp_path_factory.mktemp("frames") / "documents.jsonl.zst"
    path.write_bytes(b"".join(zstandard.compress(lines_of(texts)) for texts in parts))
    assert read_texts([path]) == [text for texts in parts for text in texts]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("lost_bytes", [1, 4, 30])
def test_truncated_file_is_an_error(tmp_path: Path, suffix: str, lost_bytes: int) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(TEXTS))[:-lost_bytes])
    with pytest.raises(ValueError, match=rf"documents\.jsonl\{suffix}: damaged or truncated"):
        read_texts([path])


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_foreign_content_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(lines_of(TEXTS))
    with pytest.raises(ValueError, match=r"documents\.jsonl.*: damaged or truncated"):
        read_texts([path])


@pytest.mark.parametrize("line", [
    b'{"text": "cut', b'{"deep": ' + b"[" * 100_000, b'{"text": "\xff"}', b'["text"]', b'{"body": "x"}', b'{"text": null}', b'{"text": 3}',
    b'{"text": "x"} {"text": "y"}',
])
def test_bad_line_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(lines_of(["good"]) + line + b"\n" + lines_of(["good"]))
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 2: expected"):
        read_texts([path])


@given(texts=st.lists(st.text("ab\n", max_size=12), max_size=12), suffix=st.sampled_from(sorted(COMPRESS)), chunk_bytes=st.integers(1, 40),
       block_bytes=st.integers(1, 60))
def test_blocks_are_whole_lines_wherever_files_are_cut(tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str,
                                                       chunk_bytes: int, block_bytes: int) -> None:
    path = tmp_path_factory.mktemp("blocks") / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(texts)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "CHUNK_BYTES", chunk_bytes)
        patch.setattr(jsonl, "BLOCK_BYTES", block_bytes)
        blocks = list(read_blocks([path]))
    assert b"".join(block.lines for block in blocks) == lines_of(texts)
    assert [text for block in blocks for text in block.texts()] == texts
    assert [block.number for block in blocks] == [1 + sum(earlier.lines.count(b"\n") for earlier in blocks[:i]) for i in range(len(blocks))]
    if suffix == "":  # a decompressor gives more than a chunk at a time
        longest = max(map(len, lines_of(texts).splitlines(keepends=True)), default=0)
        assert all(len(block.lines) <= block_bytes + longest + chunk_bytes for block in blocks)
        assert sum(block.size_bytes for block in blocks) <= path.stat().st_size


def test_bad_line_is_named_in_a_later_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 64)
    monkeypatch.setattr(jsonl, "BLOCK_BYTES", 64)
    path = tmp_path / "documents.jsonl"
    path.write_bytes(lines_of(["good"] * 100) + b"bad\n" + lines_of(["good"] * 100))
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 101: expected"):
        read_texts([path])


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


def test_blank_lines_are_passed_over_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_bytes(b"\n" + lines_of(["one"]) + b" \r\n\n" + lines_of(["two"]) + b"\n\n")
    (block,) = read_blocks([path])
    assert list(block.texts()) == ["one", "two"]
    assert list(block.places()) == [f"{path}, line 2", f"{path}, line 5"]
    path.write_bytes(b"\n" + lines_of(["one"]) + b"\nbad\n")
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 4: expected .*; correct or remove the line"):
        read_texts([path])


def test_zstandard_with_long_windows_is_read(tmp_path: Path) -> None:
    path = tmp_path / "documents.jsonl.zst"
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False, hash_log=6, chain_log=6, strategy=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(compressor.compress(lines_of(TEXTS)) + compressor.flush())
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << 31
    assert read_texts([path]) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_line_without_end_is_refused_with_its_number_and_bounded_memory(tmp_path: Path, suffix: str,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"documents.jsonl{suffix}"
    path.write_bytes(COMPRESS[suffix](lines_of(["one", "two"]) + b" " * 100_000_000))  # 3 kB with zstandard
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 22)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"documents\.jsonl.*, line 3: expected at most 4,194,304 bytes, found more; split"):
        read_texts([path])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


@pytest.mark.parametrize("suffix", COMPRESS)
def test_the_longest_line_is_read_and_one_byte_more_is_not(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, line = tmp_path / f"documents.jsonl{suffix}", lines_of(["x" * 1000]).removesuffix(b"\n")
    path.write_bytes(COMPRESS[suffix](lines_of(["one"]) + line))
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", len(line))
    assert read_texts([path]) == ["one", "x" * 1000]
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", len(line) - 1)
    with pytest.raises(ValueError, match=r"documents\.jsonl.*, line 2: expected at most"):
        read_texts([path])
