import io
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lib.artifacts.files import ArtifactError
from lib.data.encoder import encode_documents
from lib.data.tokenizer import SPACE, Tokenizer, load_tokenizer
from tests.data.texts import ENGLISH, SCRIPTS, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[SPACE])).map(lambda text: text.lstrip(" "))


def train(**changes: Any) -> bytes:
    options: dict[str, Any] = {
        "vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2,
    } | changes
    options = {key: value for key, value in options.items() if value is not None}
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter([ENGLISH]), model_writer=model, **options)
    return model.getvalue()


def accounted_bytes(tokenizer: Tokenizer, text: str) -> int:
    (tokens,) = encode_documents(tokenizer, [text])
    return int(tokenizer.target_bytes(tokens).sum())


def reference_bytes(model: bytes, tokens: list[int]) -> list[int]:
    """The challenge's rule, token by token, for models whose pieces have U+2581 in front only."""
    processor = SentencePieceProcessor(model_proto=model)

    def is_boundary(token: int) -> bool:
        return bool(processor.is_control(token) or processor.is_unknown(token) or processor.is_unused(token))

    result = []
    for previous, token in pairwise(tokens):
        piece = processor.id_to_piece(token)
        if is_boundary(token):
            size = 0
        elif processor.is_byte(token):
            size = 1
        else:
            size = len(piece.removeprefix(SPACE).encode()) + (piece.startswith(SPACE) and not is_boundary(previous))
        result.append(size)
    return result


@pytest.mark.parametrize("script", SCRIPTS)
def test_accounted_bytes_are_utf8_bytes_in_every_script(script: str) -> None:
    assert accounted_bytes(TOKENIZER, SCRIPTS[script]) == len(SCRIPTS[script].encode())


@given(TEXTS)
@example("x  y   z     ")
@example("\x00")
def test_accounted_bytes_are_utf8_bytes_of_any_text(text: str) -> None:
    assert accounted_bytes(TOKENIZER, text) == len(text.encode())


@given(st.lists(TEXTS, max_size=5))
def test_bytes_of_joined_documents_are_the_sum(texts: list[str]) -> None:
    tokens = np.concatenate([np.array([TOKENIZER.bos_id], np.uint16), *encode_documents(TOKENIZER, texts)])
    assert TOKENIZER.target_bytes(tokens).sum() == sum(len(text.encode()) for text in texts)


def test_target_bytes_of_each_token_follow_the_rule() -> None:
    model = train(normalization_rule_name="nmt_nfkc")
    tokenizer = Tokenizer(model, Path("nfkc.model"))
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, 20_000).astype(np.uint16)  # every pair of kinds of pieces
    target_bytes = tokenizer.target_bytes(tokens)
    assert target_bytes.dtype == np.int64
    assert target_bytes.tolist() == reference_bytes(model, tokens.tolist())


def test_pieces_of_several_spaces_count_each_once() -> None:
    piece = SPACE * 4
    model = train(vocab_size=340, user_defined_symbols=[piece])
    tokenizer = Tokenizer(model, Path("spaces.model"))
    token = SentencePieceProcessor(model_proto=model).piece_to_id(piece)
    assert tokenizer.target_bytes(np.array([token, token, tokenizer.bos_id, token], np.uint16)).tolist() == [4, 0, 3]


@pytest.mark.parametrize(("changes", "text"), [
    ({"normalization_rule_name": "nmt_nfkc"}, "ﬁne words"),
    ({"remove_extra_whitespaces": True}, "two  spaces"),
    ({"remove_extra_whitespaces": None}, "space at the end "),  # SentencePiece's default, which the model file may leave out
    ({"add_dummy_prefix": True}, "word"),
    ({"add_dummy_prefix": None}, "word"),
])
def test_lossless_is_read_from_the_model(changes: dict[str, Any], text: str) -> None:
    assert TOKENIZER.lossless
    model = train(**changes)
    assert not Tokenizer(model, Path("some.model")).lossless
    assert SentencePieceProcessor(model_proto=model).normalize(text) != text.replace(" ", SPACE)


def test_tokenizer_without_byte_fallback_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.model").write_bytes(train(byte_fallback=False, vocab_size=80))
    with pytest.raises(ArtifactError, match=r"plain\.model: expected a tokenizer with byte fallback.*<unk>.*cannot be counted"):
        load_tokenizer(tmp_path / "plain.model")


def test_another_bos_than_the_model_expects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.model").write_bytes(train())
    assert load_tokenizer(tmp_path / "some.model", 1).bos_id == 1
    with pytest.raises(ArtifactError, match=r"some\.model: expected BOS token 2 as in model\.bos_id, found 1; set model\.bos_id to it"):
        load_tokenizer(tmp_path / "some.model", 2)


def test_tokenizer_without_bos_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"some\.model: expected a BOS piece"):
        Tokenizer(train(bos_id=-1, pad_id=-1, unk_id=0, eos_id=1), Path("some.model"))


@pytest.mark.parametrize("content", [b"", b"no model at all", train()[:500]])
def test_damaged_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.model: no such file"):
        load_tokenizer(tmp_path / "none.model")
