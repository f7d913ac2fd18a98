from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import ArtifactError, write_bytes
from lib.artifacts.tokens import HEADER_BYTES, Split, SplitWriter, load_shards, load_split
from lib.data.dataset import check_names, load_training, load_validation
from lib.data.encoder import encode_documents
from lib.data.tokenizer import Tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.errors import UserError
from tests.data.shard_files import shard_bytes

DOCUMENTS = ["a cat and a dog", "one more cat", "dogs and cats and dogs"] * 3
VOCAB_SIZE = 280


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(DOCUMENTS, VOCAB_SIZE, 10_000), Path("test.model"))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    """Splits of some shards each."""
    for split, documents in (("train", DOCUMENTS), ("heldout", DOCUMENTS[:3]), ("val", DOCUMENTS)):
        writer = SplitWriter(tmp_path / split, VOCAB_SIZE, 20)
        for text, tokens in zip(documents, encode_documents(tokenizer, documents), strict=True):
            writer.add(tokens, len(text.encode()), int(tokenizer.target_bytes(tokens).sum()))
        writer.close()
    return tmp_path


@pytest.fixture
def published(folder: Path) -> Path:
    """The training and validation shards without a description, as they are published."""
    for path in [*folder.glob("train/*.bin"), *folder.glob("val/*.bin")]:
        write_bytes(folder / f"published/fineweb_{path.name}", path.read_bytes())
    return folder / "published"


def figures(split: Split) -> tuple[object, ...]:
    return split.tokens().tolist(), split.num_documents, split.raw_bytes, split.accounted_bytes, split.vocab_size


def test_published_shards_give_what_their_description_said(folder: Path, published: Path, tokenizer: Tokenizer) -> None:
    described = load_validation(folder, tokenizer)
    write_bytes(published / "fineweb_val_bytes_000000.bin", b"not read")
    plain = load_validation(published, tokenizer)
    assert figures(plain) == figures(described)
    assert len(plain.shards) == len(described.shards) > 2
    assert plain.raw_bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_described_splits_are_taken_as_they_are(folder: Path, tokenizer: Tokenizer) -> None:
    for loaded, split in zip(load_training(folder, tokenizer, 7), ("train", "heldout"), strict=True):
        assert figures(loaded) == figures(load_split(folder / split, VOCAB_SIZE))


@pytest.mark.parametrize(("heldout_tokens", "num_documents"), [(1, 1), (9, 1), (10, 2), (20, 2), (21, 3)])
def test_the_last_published_documents_are_held_out(published: Path, tokenizer: Tokenizer, heldout_tokens: int, num_documents: int) -> None:
    """The last shard ends with documents of 30, 11 and 9 tokens."""
    documents = [[tokenizer.bos_id, *range(3, 3 + size - 1)] for size in (50, 30, 11, 9)]
    path = published / "fineweb_train_999999.bin"
    path.write_bytes(shard_bytes([token for document in documents for token in document]))
    text, heldout = load_training(published, tokenizer, heldout_tokens)
    assert heldout.tokens().tolist() == [token for document in documents[-num_documents:] for token in document]
    paths = sorted(published.glob("*train*"))
    assert np.concatenate([text.tokens(), heldout.tokens()]).tolist() == np.concatenate(load_shards(paths, VOCAB_SIZE)).tolist()
    assert len(text.shards) == len(paths)


def test_a_last_shard_without_documents_to_spare_is_refused(published: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match=r"train_\d+\.bin: expected documents before the last 1000 tokens \(quantize\.heldout_tokens\)"):
        load_training(published, tokenizer, 1000)


def test_a_described_split_must_be_as_described(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "val/val_000001.bin").unlink()
    with pytest.raises(ArtifactError, match=r"val_000001\.bin: no such file"):
        load_validation(folder, tokenizer)


def test_names_tell_whether_text_of_both_kinds_is_there(folder: Path, published: Path) -> None:
    check_names(folder)
    check_names(published)
    for path in published.glob("*_val_*"):
        path.unlink()
    with pytest.raises(ArtifactError, match=r"published: expected shards \*val_\[0-9\]\*\.bin, or val/split\.json, found neither"):
        check_names(published)


@pytest.mark.parametrize("size", [0, 7, HEADER_BYTES - 1, HEADER_BYTES + 2, HEADER_BYTES + 7])
def test_truncated_plain_shards_are_refused(folder: Path, size: int) -> None:
    path = folder / "val/val_000000.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected .* found .*; copy or download it anew"):
        load_shards([path], VOCAB_SIZE)


def test_plain_shards_of_another_format_or_vocabulary_are_refused(folder: Path) -> None:
    path = folder / "val/val_000000.bin"
    content = path.read_bytes()
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected tokens below the vocabulary size 5, found"):
        load_shards([path], 5)
    path.write_bytes(np.array([1, 2], "<i4").tobytes() + content[8:])
    with pytest.raises(ArtifactError, match=r"val_000000\.bin: expected a header of magic 20240520"):
        load_shards([path], VOCAB_SIZE)
