import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import SPLITS, load_split
from lib.data import resharding
from lib.data.corpus import normalized_hash
from lib.data.resharding import Reader, write_shards
from lib.data.shards import Shards
from lib.data.tokenizer import OPERATORS
from tests.data import shard_files
from tests.data.shard_files import tokens_of
from tests.data.texts import ENGLISH, SCRIPTS, TINY_VOCAB_SIZE, cased_tokenizer, tiny_params, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [f"Document {i}: {text}" for i in range(5) for text in (ENGLISH, *SCRIPTS.values())]
VAL = [*TEXTS[:20], TEXTS[3], TEXTS[3].upper(), "", "only in val"]
LEADING_SPACE = " space after BOS, which the accounting does not see"
TRAIN = [*TEXTS[15:], TEXTS[-1], TEXTS[4].upper() + "\n", LEADING_SPACE, TEXTS[-2], "the last"]


def make_shards(folder: Path, val: list[str] = VAL, train: list[str] = TRAIN, shard_tokens: int = 999) -> Shards:
    return Shards(*(tuple(shard_files.write_shards(folder / "published", split, tokens_of(TOKENIZER, texts), shard_tokens))
                    for split, texts in (("train", train), ("val", val))))


def reshard(folder: Path, shards: Shards, heldout_fraction: float = 0.2) -> dict[str, Any]:
    return write_shards(tiny_params(val_fraction=None, val_documents=1, heldout_fraction=heldout_fraction), shards, TOKENIZER, folder, 2)


def key(text: str) -> str:
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


@pytest.fixture(scope="module", params=[(999, 1 << 22), (97, 2500)], ids=["one task", "many tasks"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    shard_tokens, segment_tokens = request.param
    folder = tmp_path_factory.mktemp("reshard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resharding, "SEGMENT_TOKENS", segment_tokens)
        return folder, reshard(folder, make_shards(folder, shard_tokens=shard_tokens))


def test_splits_are_those_of_a_reference_in_plain_python(result: tuple[Path, dict[str, Any]]) -> None:
    folder, description = result
    val_keys = {key(text) for text in VAL}
    rest = [text for text in TRAIN[:-1] if key(text) not in val_keys and text != LEADING_SPACE]
    expected = {"val": VAL, "heldout": [text for text in rest if int(key(text)[:16], 16) / 2**64 < 0.2]}
    expected["train"] = [text for text in rest if text not in expected["heldout"]]
    assert min(map(len, expected.values())) > 10
    for name in SPLITS:
        split = load_split(folder / name, TINY_VOCAB_SIZE)
        assert split.tokens().tolist() == tokens_of(TOKENIZER, expected[name])
        assert split.num_documents == len(expected[name])
        assert split.raw_bytes == split.accounted_bytes == sum(len(text.encode()) for text in expected[name])
        assert description["splits"][name]["distinct_documents"] == len({key(text) for text in expected[name]})
    assert description["skipped_documents"] == {"also in val": sum(key(text) in val_keys for text in TRAIN),
                                                "bytes of text and tokens differ": 1, "cut off by the last shard": 1}
    assert set(description["shared_documents"].values()) == {0}


def test_operators_of_the_case_transform_are_decoded(tmp_path: Path) -> None:
    tokenizer, texts = cased_tokenizer(), [*TEXTS, f"literal {OPERATORS} operators"]
    tokens = tokens_of(tokenizer, texts)
    documents = Reader(tuple(shard_files.write_shards(tmp_path, "val", tokens, 999)), tokenizer, 0.5, None)((0, len(tokens)))
    assert documents.keys.tolist() == [normalized_hash(text)[:16] for text in texts]
    assert documents.raw_bytes.tolist() == documents.accounted_bytes.tolist() == [len(text.encode()) for text in texts]


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12), shard_tokens=st.integers(1, 50), segment=st.integers(1, 40),
       batch=st.integers(1, 30))
def test_every_document_is_read_once_wherever_shards_segments_and_batches_end(
        tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, segment: int, batch: int) -> None:
    texts = [f"{i}" * length for i, length in enumerate(lengths)]
    tokens = tokens_of(TOKENIZER, texts)
    paths = shard_files.write_shards(tmp_path_factory.mktemp("read"), "val", tokens, shard_tokens)
    reader = Reader(tuple(paths), TOKENIZER, 0.5, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resharding, "BATCH_TOKENS", batch)
        parts = [reader((start, min(start + segment, len(tokens)))) for start in range(0, len(tokens), segment)]
    assert [k for part in parts for k in part.keys.tolist()] == [normalized_hash(text)[:16] for text in texts]
    sizes = [len(text) for text in texts]
    assert [n for part in parts for n in part.raw_bytes.tolist()] == [n for part in parts for n in part.accounted_bytes.tolist()] == sizes
    bounds = [part.bounds.tolist() for part in parts if len(part.outcomes)]
    starts = np.flatnonzero(np.array(tokens) == TOKENIZER.bos_id).tolist()
    assert [start for part in bounds for start in part[:-1]] == starts
    assert [part[-1] for part in bounds] == [*(part[0] for part in bounds[1:]), len(tokens)]


def test_shared_documents_come_from_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broken rule, the evidence in the manifest shows it."""
    shards = make_shards(tmp_path)

    def read_with_a_broken_rule(reader: Reader, *_: Any) -> Any:
        documents = Reader(reader.stream.paths, TOKENIZER, 0.2, None)((0, len(reader.stream)))
        if reader.stream.paths == shards.train:
            documents.outcomes[:] = np.arange(len(documents.outcomes)) % 2
        yield documents

    monkeypatch.setattr(resharding, "_read", read_with_a_broken_rule)
    tokenizer = tiny_tokenizer()
    tokenizer.lossless = False
    monkeypatch.setattr("tests.data.test_resharding.TOKENIZER", tokenizer)
    shared = reshard(tmp_path, shards)["shared_documents"]
    train, heldout, val = ({key(text) for text in texts} for texts in (TRAIN[::2], TRAIN[1::2], VAL))
    assert shared == {"train and heldout": len(train & heldout), "train and val": len(train & val), "heldout and val": len(heldout & val)}
    assert min(shared.values()) > 0


def replace_token(path: Path, position: int, token: int) -> None:
    content = bytearray(path.read_bytes())
    content[1024 + 2 * position:1026 + 2 * position] = token.to_bytes(2, "little")
    path.write_bytes(content)


@pytest.mark.parametrize("split", ["train", "val"])
def test_shards_that_do_not_begin_a_document_are_refused(tmp_path: Path, split: str) -> None:
    shards = make_shards(tmp_path)
    replace_token(getattr(shards, split)[0], 0, 9)
    with pytest.raises(ArtifactError, match=rf"web_{split}_000000\.bin, token 0: expected the BOS token 1, .* found 9; start with"):
        reshard(tmp_path, shards)


def test_a_token_beyond_the_vocabulary_is_located(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    replace_token(shards.train[2], 5, TINY_VOCAB_SIZE)
    with pytest.raises(ArtifactError, match=r"web_train_000002\.bin, token 5: expected tokens below 700, .*found 700; give the tokenizer"):
        reshard(tmp_path, shards)


def test_a_validation_document_with_other_bytes_is_refused_if_the_tokenizer_is_lossless(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    _, byte_0 = tokens_of(TOKENIZER, ["\x00"])
    start = len(tokens_of(TOKENIZER, VAL[:1]))
    replace_token(shards.val[0], start + 1, byte_0 + 0xFF)  # no UTF-8 text has this byte
    with pytest.raises(ArtifactError, match=rf"web_val_000000\.bin, token {start}: expected a document whose text, decoded and .*; give"):
        Reader(shards.val, TOKENIZER, 0.2, None)((0, start + 20))


def test_shards_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    shards = make_shards(tmp_path)
    swap = np.random.default_rng(0).permutation(TINY_VOCAB_SIZE)
    for path in shards.train:
        tokens = np.frombuffer(path.read_bytes()[1024:], "<u2")
        path.write_bytes(shard_files.shard_bytes(np.where(tokens == TOKENIZER.bos_id, tokens, swap[tokens]).tolist()))
    with pytest.raises(ArtifactError, match=r"published: expected documents whose decoded text .*found \d+ of \d+ others; give the"):
        reshard(tmp_path, shards)


@pytest.mark.parametrize("splits", [("val",), ("train",), ("val", "train")])
def test_shards_of_another_tokenizer_with_the_same_bytes_are_refused(tmp_path: Path, splits: tuple[str, ...]) -> None:
    """One that has the same pieces, and merges them in another order: every byte count is as it was."""
    shards = make_shards(tmp_path)
    pieces = {TOKENIZER.processor.id_to_piece(token): token for token in range(TINY_VOCAB_SIZE)}
    merged = {token: [pieces[letter] for letter in piece] for piece, token in pieces.items() if len(piece) == 2 and {*piece} <= {*pieces}}
    for split in splits:
        tokens = np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in getattr(shards, split)]).tolist()
        spelled = [piece for token in tokens for piece in merged.get(token, [token])]
        assert len(spelled) > len(tokens)
        shard_files.write_shards(tmp_path / "published", split, spelled, 999)
    names = Shards(*(tuple(sorted((tmp_path / "published").glob(f"*_{split}_*.bin"))) for split in ("train", "val")))
    with pytest.raises(ArtifactError, match=r"whose text, decoded and encoded again, gives the same tokens, found .*; give the tok"):
        reshard(tmp_path, names)


def test_an_empty_split_is_an_error(tmp_path: Path) -> None:
    shards = make_shards(tmp_path, val=["one"], train=["two", "three", "One", "end"])
    with pytest.raises(ValueError, match=r"expected documents in every split, found none in heldout \(left out: .*'also in val': 1"):
        reshard(tmp_path, shards, heldout_fraction=1e-9)
