from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.files import ArtifactError, sha256_of
from lib.data.shards import Stream, find_shards, sort_shards
from tests.data.shard_files import write_shards


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=60), shard_tokens=st.integers(1, 70), data=st.data())
def test_a_stream_is_the_tokens_of_all_shards(tmp_path_factory: pytest.TempPathFactory, tokens: list[int], shard_tokens: int,
                                              data: st.DataObject) -> None:
    stream = Stream(write_shards(tmp_path_factory.mktemp("stream"), "train", tokens, shard_tokens))
    assert len(stream) == len(tokens)
    start = data.draw(st.integers(0, len(tokens) - 1))
    stop = data.draw(st.integers(start + 1, len(tokens)))
    part = stream.read(start, stop)
    assert part.dtype == np.uint16
    assert part.tolist() == tokens[start:stop]
    token = data.draw(st.sampled_from([*tokens, 7]))
    assert stream.find(token, start) == (tokens.index(token, start) if token in tokens[start:] else len(tokens))
    assert stream.locate(start) == f"{stream.paths[start // shard_tokens]}, token {start % shard_tokens}"


def test_a_far_token_is_found(tmp_path: Path) -> None:
    tokens = [5] * 200_000 + [1]
    assert Stream(write_shards(tmp_path, "train", tokens, 70_000)).find(1, 3) == 200_000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path, "train", list(range(100)), 40)
    write_shards(tmp_path, "val", list(range(50)), 40)
    for name in ("web_val_bytes_000000.bin", "web_val_000000.bin.part", "tokenizer.model"):  # beside the shards of some datasets
        (tmp_path / name).write_bytes(b"something else")
    return tmp_path


def test_shards_are_found_by_name_in_the_order_of_their_numbers(folder: Path) -> None:
    shards = find_shards(folder)
    assert [path.name for path in shards.train] == ["web_train_000000.bin", "web_train_000001.bin", "web_train_000002.bin"]
    assert [path.name for path in shards.val] == ["web_val_000000.bin", "web_val_000001.bin"]
    names = [f"x_{split}_{number}.bin" for split in ("train", "val") for number in (10, 9, 11)]
    assert sort_shards(names, "x")["val"] == ["x_val_9.bin", "x_val_10.bin", "x_val_11.bin"]


def test_missing_and_foreign_shards_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenize\.path: expected a folder of published shards, found none at .*none"):
        find_shards(folder / "none")
    (folder / "web_train_000001.bin").unlink()
    with pytest.raises(ValueError, match=r"expected train shard number 1 between web_train_000000\.bin and web_train_000002\.bin, found"):
        find_shards(folder)
    (folder / "web_train_000002.bin").rename(folder / "other_train_000001.bin")
    with pytest.raises(ValueError, match=r"expected the shards of one dataset, found other, web"):
        find_shards(folder)
    (folder / "other_train_000001.bin").unlink()
    for path in folder.glob("*_val_0*.bin"):
        path.unlink()
    with pytest.raises(ValueError, match=r"expected shards named \*_val_000000\.bin and so on, found none"):
        find_shards(folder)


def test_stated_checksums_are_compared(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.bin"))
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{sha256_of(folder / name)} {'*' if i % 2 else ' '}{name}\n" for i, name in enumerate(names)))
    find_shards(folder)
    content = bytearray((folder / "web_val_000001.bin").read_bytes())
    content[-1] ^= 1
    (folder / "web_val_000001.bin").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"web_val_000001\.bin: expected SHA-256 [0-9a-f]{64} as in SHA256SUMS, found"):
        find_shards(folder)
    sums.write_text("".join(line for line in sums.read_text().splitlines(keepends=True) if "train_000002" not in line))
    with pytest.raises(ArtifactError, match=r"SHA256SUMS: expected a line for web_train_000002\.bin, found none"):
        find_shards(folder)


@pytest.mark.parametrize(("change", "message"), [
    (lambda content: content[:-1], r"expected 1104 bytes \(40 tokens\), found 1103"),
    (lambda content: content + b"\0\0", r"expected 1104 bytes \(40 tokens\), found 1106"),
    (lambda content: content[:500], r"expected a header of 1024 bytes with magic 20240520 and version 1, found 20240520, 1 in 500 bytes"),
    (lambda content: b"", r"expected a header .* in 0 bytes"),
    (lambda content: b"\x01" + content[1:], r"expected a header .* found 20240385, 1 in 1104 bytes"),
    (lambda content: content[:4] + b"\x02" + content[5:], r"expected a header .* found 20240520, 2 in"),
    (lambda content: content[:8] + bytes(4) + content[12:1024], r"expected 1024 bytes \(0 tokens\), found 1024"),
])
def test_unsound_files_are_refused(folder: Path, change: Callable[[bytes], bytes], message: str) -> None:
    paths = find_shards(folder).train
    paths[1].write_bytes(change(paths[1].read_bytes()))
    with pytest.raises(ArtifactError, match=rf"web_train_000001\.bin: {message}.*; fetch it again"):
        Stream(paths)


def test_missing_files_are_refused(folder: Path) -> None:
    paths = find_shards(folder).train
    paths[1].unlink()
    with pytest.raises(ArtifactError, match=r"web_train_000001\.bin: no such file; fetch it again"):
        Stream(paths)
