import json
import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.files import ArtifactError, sha256_of
from lib.artifacts.tokens import HEADER_BYTES, Split, SplitWriter, load_split

VOCAB_SIZE = 1000


def write_split(folder: Path, documents: list[list[int]], shard_tokens: int) -> Split:
    writer = SplitWriter(folder, VOCAB_SIZE, shard_tokens)
    for document in documents:
        writer.add(np.array(document, np.uint16), raw_bytes=3 * len(document), accounted_bytes=2 * len(document))
    writer.close()
    return load_split(folder, VOCAB_SIZE)


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    write_split(tmp_path / "val", [[1, 5, 999], [1, 7], [1, 8, 9, 10, 11]], shard_tokens=4)
    return tmp_path / "val"


@given(documents=st.lists(st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=30), min_size=1, max_size=10),
       shard_tokens=st.integers(1, 40))
def test_split_round_trip(tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], shard_tokens: int) -> None:
    split = write_split(tmp_path_factory.mktemp("round_trip") / "train", documents, shard_tokens)
    tokens = [token for document in documents for token in document]
    assert split.tokens().tolist() == tokens
    assert (split.num_tokens, split.num_documents) == (len(tokens), len(documents))
    assert (split.raw_bytes, split.accounted_bytes) == (3 * len(tokens), 2 * len(tokens))
    assert all(len(shard) == shard_tokens for shard in split.shards[:-1])
    assert 0 < len(split.shards[-1]) <= shard_tokens


def test_shard_has_the_published_layout(split_folder: Path) -> None:
    content = (split_folder / "val_000000.bin").read_bytes()
    header = np.frombuffer(content[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, 4]
    assert not header[3:].any()
    assert content[1024:] == b"\x01\x00\x05\x00\xe7\x03\x01\x00"
    assert sorted(path.name for path in split_folder.iterdir()) == ["split.json", "val_000000.bin", "val_000001.bin", "val_000002.bin"]


def test_shards_are_memory_mapped(split_folder: Path) -> None:
    for shard in load_split(split_folder, VOCAB_SIZE).shards:
        assert isinstance(shard, np.memmap)
        assert not shard.flags.writeable


def test_writer_removes_earlier_shards(tmp_path: Path) -> None:
    write_split(tmp_path / "val", [[1] * 20], shard_tokens=2)
    split = write_split(tmp_path / "val", [[1, 2]], shard_tokens=2)
    assert split.tokens().tolist() == [1, 2]
    assert len(list((tmp_path / "val").iterdir())) == 2


def test_unfinished_split_is_refused(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path / "val", VOCAB_SIZE, 4)
    writer.add(np.array([1, 2, 3, 4], np.uint16), 4, 4)
    with pytest.raises(ArtifactError, match=r"split\.json: no such file"):
        load_split(tmp_path / "val", VOCAB_SIZE)


def replace_bytes(path: Path, position: int, content: bytes, *, update_checksum: bool = False) -> None:
    data = bytearray(path.read_bytes())
    data[position:position + len(content)] = content
    path.write_bytes(data)
    if update_checksum:
        description = json.loads((path.parent / "split.json").read_text())
        next(shard for shard in description["shards"] if shard["name"] == path.name)["sha256"] = sha256_of(path)
        (path.parent / "split.json").write_text(json.dumps(description))


def test_missing_shard_is_refused(split_folder: Path) -> None:
    (split_folder / "val_000001.bin").unlink()
    with pytest.raises(ArtifactError, match=r"val_000001\.bin: no such file.*dvc repro"):
        load_split(split_folder, VOCAB_SIZE)


@pytest.mark.parametrize("size", [0, 100, HEADER_BYTES, HEADER_BYTES + 7, HEADER_BYTES + 10])
def test_shard_of_another_length_is_refused(split_folder: Path, size: int) -> None:
    path = split_folder / "val_000001.bin"
    path.write_bytes((path.read_bytes() + bytes(10))[:size])
    with pytest.raises(ArtifactError, match=rf"val_000001\.bin: expected {HEADER_BYTES + 8} bytes \(4 tokens\), found {size}"):
        load_split(split_folder, VOCAB_SIZE)


@pytest.mark.parametrize(("position", "name"), [(0, "magic"), (4, "version"), (8, "tokens")])
def test_foreign_header_is_refused(split_folder: Path, position: int, name: str) -> None:
    replace_bytes(split_folder / "val_000000.bin", position, b"\x09", update_checksum=True)
    with pytest.raises(ArtifactError, match=rf"val_000000\.bin: expected a header of .*{name}.*found"):
        load_split(split_folder, VOCAB_SIZE)


@pytest.mark.parametrize("position", [HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 6])
def test_altered_byte_is_found(split_folder: Path, position: int) -> None:
    replace_bytes(split_folder / "val_000002.bin", min(position, (split_folder / "val_000002.bin").stat().st_size - 1), b"\x02")
    with pytest.raises(ArtifactError, match=r"val_000002\.bin: expected SHA-256"):
        load_split(split_folder, VOCAB_SIZE)


def test_token_beyond_the_vocabulary_is_refused(split_folder: Path) -> None:
    replace_bytes(split_folder / "val_000001.bin", HEADER_BYTES + 2, b"\xe8\x03", update_checksum=True)
    with pytest.raises(ArtifactError, match=r"val_000001\.bin: expected tokens below the vocabulary size 1000, found 1000"):
        load_split(split_folder, VOCAB_SIZE)


def test_another_vocabulary_is_refused(split_folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"split\.json: expected tokens of a vocabulary of 1024, found 1000"):
        load_split(split_folder, 1024)


@pytest.mark.parametrize("content", ["[]", "{}", '{"documents": 1}'])
def test_foreign_description_is_refused(split_folder: Path, content: str) -> None:
    (split_folder / "split.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"split\.json: expected the keys"):
        load_split(split_folder, VOCAB_SIZE)


@pytest.mark.parametrize("shards", [
    3, None, [3], [{}], [{"name": "../val/val_000000.bin", "tokens": 4, "sha256": ""}], [{"name": "a\0", "tokens": 4, "sha256": ""}],
    [{"name": "val_000000.bin", "tokens": "4", "sha256": ""}], [{"name": "val_000000.bin", "tokens": -1, "sha256": ""}],
])
def test_a_foreign_list_of_shards_is_refused(split_folder: Path, shards: object) -> None:
    description = json.loads((split_folder / "split.json").read_text()) | {"shards": shards}
    (split_folder / "split.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactError, match=r"split\.json: expected numbers, and name, tokens and SHA-256 of each shard, found others"):
        load_split(split_folder, VOCAB_SIZE)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{\x00", b"[" * 100_000, b"1" * 5000, b'"\xe9"'])
def test_what_is_no_json_is_named(split_folder: Path, content: bytes) -> None:
    (split_folder / "split.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"split\.json: not valid JSON .*; `dvc repro -f` makes it anew"):
        load_split(split_folder, VOCAB_SIZE)


def test_a_full_disk_leaves_no_shards(tmp_path: Path) -> None:
    """No file may grow beyond a limit, which the system refuses as it refuses a full disk."""
    writers = {name: SplitWriter(tmp_path / name, VOCAB_SIZE, 10_000) for name in ("train", "heldout", "val")}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
    try:
        writers["val"].add(np.ones(100, np.uint16), 100, 100)
        with pytest.raises(OSError, match=r"cannot be written .*; make room and rerun") as failed:
            writers["train"].add(np.ones(10_000, np.uint16), 10_000, 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert failed.value.filename == str(tmp_path / "train")
    assert list(tmp_path.iterdir()) == []
