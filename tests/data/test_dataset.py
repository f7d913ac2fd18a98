from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import HEADER_BYTES, SPLIT_FILE, Split, SplitWriter, load_shards
from lib.data.dataset import load_validation
from lib.data.encoder import encode_documents
from lib.data.tokenizer import Tokenizer
from lib.data.tokenizer_training import train_tokenizer

DOCUMENTS = ["a cat and a dog", "one more cat", "dogs and cats and dogs"] * 3
VOCAB_SIZE = 280


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(DOCUMENTS, VOCAB_SIZE, 10_000), Path("test.model"))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """A split of three shards that has lost its description."""
    writer = SplitWriter(tmp_path / "val", VOCAB_SIZE, 20)
    for text, tokens in zip(DOCUMENTS, encode_documents(tokenizer, DOCUMENTS), strict=True):
        writer.add(tokens, len(text.encode()), int(tokenizer.target_bytes(tokens).sum()))
    writer.close()
    return tmp_path / "val"


def figures(split: Split) -> tuple[object, ...]:
    return split.tokens().tolist(), split.num_documents, split.raw_bytes, split.accounted_bytes, split.vocab_size


def test_plain_shards_give_what_their_description_said(folder: Path, tokenizer: Tokenizer) -> None:
    described = load_validation(folder, tokenizer)
    (folder / SPLIT_FILE).unlink()
    for path in folder.iterdir():
        path.rename(folder / f"fineweb_{path.name}")
    (folder / "fineweb_train_000000.bin").write_bytes(b"not read")
    (folder / "fineweb_val_bytes_000000.bin").write_bytes(b"not read")
    plain = load_validation(folder, tokenizer)
    assert figures(plain) == figures(described)
    assert len(plain.shards) == len(described.shards) > 2
    assert plain.raw_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_a_described_split_must_be_as_described(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "val_000001.bin").unlink()
    with pytest.raises(ArtifactError, match=r"val_000001\.bin: no such file"):
        load_validation(folder, tokenizer)


def test_a_folder_without_shards_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(ArtifactError, match=r"expected validation shards \*val_\[0-9\]\*\.bin, found none"):
        load_validation(tmp_path, tokenizer)


@pytest.mark.parametrize("size", [0, 7, HEADER_BYTES - 1, HEADER_BYTES + 2, HEADER_BYTES + 7])
def test_truncated_plain_shards_are_refused(folder: Path, size: int) -> None:
    path = folder / "val_000000.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected .* found .*; copy or download it anew"):
        load_shards([path], VOCAB_SIZE)


def test_plain_shards_of_another_format_or_vocabulary_are_refused(folder: Path) -> None:
    path = folder / "val_000000.bin"
    content = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected tokens below the vocabulary size 5, found"):
        load_shards([path], 5)
    path.write_bytes(np.array([1, 2], "<i4").tobytes() + content[8:])
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected a header of magic 20240520"):
        load_shards([path], VOCAB_SIZE)
