import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from lib.artifacts.files import ArtifactError
from lib.data.case import encode_case
from lib.data.encoder import encode_documents
from lib.data.tokenizer import ALLCAPS, CAPNEXT, ESC, OPERATORS, SPACE, TITLE, Tokenizer, load_tokenizer
from tests.data.test_case import CASED_TEXTS
from tests.data.texts import ENGLISH, SCRIPTS, cased_tokenizer, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CASED = cased_tokenizer()
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[SPACE])).map(lambda text: text.lstrip(" "))


def train(documents: Sequence[str] = (ENGLISH,), **changes: Any) -> bytes:
    options: dict[str, Any] = {
        "vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "minloglevel": 2,
    } | changes
    options = {key: value for key, value in options.items() if value is not None}
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(documents), model_writer=model, **options)
    return model.getvalue()


def accounted_bytes(tokenizer: Tokenizer, text: str) -> int:
    (tokens,) = encode_documents(tokenizer, [text])
    return int(tokenizer.target_bytes(tokens).sum())


def reference_bytes(model: bytes, tokens: list[int]) -> list[int]:
    """The challenge's rule, token by token; spaces inside of a piece count 1 each."""
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
            size = len(piece.removeprefix(SPACE).replace(SPACE, " ").encode()) + (piece.startswith(SPACE) and not is_boundary(previous))
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


@given(CASED_TEXTS.map(lambda text: text.replace(SPACE, "").lstrip(" ")))
@example("A")
@example("  The  NASA xMl I ".lstrip())
@example(f"{ESC}{ESC}{ESC} {ESC}{TITLE}{ESC}A {CAPNEXT}")
def test_case_transform_counts_the_bytes_of_the_original_text(text: str) -> None:
    assert accounted_bytes(CASED, text) == len(text.encode())


@given(st.lists(CASED_TEXTS.map(lambda text: text.replace(SPACE, "").lstrip(" ")), max_size=5))
def test_case_transform_counts_each_document_by_itself(texts: list[str]) -> None:
    documents = list(encode_documents(CASED, texts))
    target_bytes = CASED.target_bytes(np.concatenate([np.array([CASED.bos_id], np.uint16), *documents]))
    ends = np.cumsum([0, *map(len, documents)])
    assert [target_bytes[a:b].sum() for a, b in pairwise(ends)] == [len(text.encode()) for text in texts]


@given(st.data())
def test_case_transform_counts_each_token_by_the_rule(data: st.DataObject) -> None:
    operators = [CASED.processor.piece_to_id(operator) for operator in OPERATORS]
    some = st.one_of(st.sampled_from([*operators, operators[-1], operators[-1]]), st.integers(0, CASED.vocab_size - 1))
    tokens = [CASED.bos_id, *data.draw(st.lists(some, max_size=20))]
    expected, escaped = reference_bytes(CASED.processor.serialized_model_proto(), tokens), False
    for position, token in enumerate(tokens[1:]):
        if token in operators:
            expected[position] = 3 if escaped else 0
        escaped = token == operators[-1] and not escaped
    assert CASED.target_bytes(np.array(tokens, np.uint16)).tolist() == expected


@pytest.mark.parametrize("symbols", [[*OPERATORS, f"{TITLE}the"], None])
def test_operators_inside_of_longer_pieces_are_refused(symbols: list[str] | None) -> None:
    model = train([encode_case(ENGLISH)] * 3, user_defined_symbols=symbols)
    with pytest.raises(ArtifactError, match=r"fused\.model: expected the case operators .* of their own, found the piece .*, whose bytes"):
        Tokenizer(model, Path("fused.model"))


@pytest.mark.parametrize("symbols", [list(OPERATORS[:3]), []])
def test_without_all_operators_they_are_characters_like_others(symbols: list[str]) -> None:
    tokenizer = Tokenizer(train([*OPERATORS, ENGLISH], user_defined_symbols=symbols, character_coverage=1.0), Path("plain.model"))
    assert not tokenizer.case_transform
    assert accounted_bytes(tokenizer, f"A{ESC}{ESC}{TITLE}b{ALLCAPS}") == 14


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


@pytest.mark.parametrize("changes", [{}, {"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}])
def test_tokenizer_without_a_piece_for_the_space_is_refused(changes: dict[str, Any]) -> None:
    letters = "".join(chr(97 + i * i % 23) for i in range(2000)) + " x"
    with pytest.raises(ArtifactError, match=r"some\.model: expected a piece for the space \(U\+2581\), found none.*three bytes; train it"):
        Tokenizer(train([letters], vocab_size=300, character_coverage=0.99, hard_vocab_limit=False, **changes), Path("some.model"))


def test_another_bos_than_the_model_expects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.model").write_bytes(train())
    assert load_tokenizer(tmp_path / "some.model", 1).bos_id == 1
    with pytest.raises(ArtifactError, match=r"some\.model: expected BOS token 2 as in model\.bos_id, found 1; set model\.bos_id to it"):
        load_tokenizer(tmp_path / "some.model", 2)


def test_tokenizer_without_bos_is_refused() -> None:
    with pytest.raises(ArtifactError, match=r"some\.model: expected a BOS piece"):
        Tokenizer(train(bos_id=-1, pad_id=-1, unk_id=0, eos_id=1), Path("some.model"))


@pytest.mark.parametrize("content", [
    b"", b"no model at all", train()[:500], train().replace(SPACE.encode(), b"\xe2\x96\xff"), train() + b"\x0b\x80"],
    ids=["empty", "foreign", "cut off", "pieces that are not UTF-8", "a field without end"])
def test_damaged_model_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.model").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bad\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"none\.model: no such file"):
        load_tokenizer(tmp_path / "none.model")
