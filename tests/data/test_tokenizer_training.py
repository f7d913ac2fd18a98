import re
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from lib.data.tokenizer import OPERATORS, SPACE, Tokenizer
from lib.data.tokenizer_training import train_tokenizer
from tests.data.texts import ENGLISH, SCRIPTS

DOCUMENTS = [ENGLISH, *SCRIPTS.values()]


def test_reserved_pieces_and_size() -> None:
    processor = SentencePieceProcessor(model_proto=train_tokenizer(DOCUMENTS, 700, 100_000))
    assert [processor.id_to_piece(token) for token in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [processor.id_to_piece(token) for token in range(4, 260)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert processor.vocab_size() == 700
    assert Tokenizer(train_tokenizer(DOCUMENTS, 700, 100_000), Path("trained.model")).lossless


def test_training_is_deterministic() -> None:
    assert train_tokenizer(DOCUMENTS, 700, 100_000) == train_tokenizer(DOCUMENTS, 700, 100_000)


def test_operators_are_reserved_and_capitals_are_not_needed() -> None:
    model = train_tokenizer(DOCUMENTS, 700, 100_000, case_transform=True)
    processor = SentencePieceProcessor(model_proto=model)
    assert [processor.id_to_piece(token) for token in range(4, 8)] == list(OPERATORS)
    assert [processor.id_to_piece(token) for token in range(8, 264)] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not [piece for piece in map(processor.id_to_piece, range(264, 700)) if re.search("[A-Z]", piece)]
    tokenizer = Tokenizer(model, Path("trained.model"))
    assert tokenizer.lossless
    assert tokenizer.case_transform
    assert not Tokenizer(train_tokenizer(DOCUMENTS, 700, 100_000), Path("plain.model")).case_transform
    with pytest.raises(ValueError, match=r"tokenize\.vocab_size: expected at least \d+ pieces"):
        train_tokenizer(DOCUMENTS, 266, 100_000, case_transform=True)


def test_only_the_first_documents_are_used() -> None:
    documents = iter([ENGLISH, ENGLISH, "never read"])
    assert train_tokenizer(documents, 300, len(ENGLISH) + 1) == train_tokenizer([ENGLISH, ENGLISH], 300, 100_000)
    assert next(documents) == "never read"


def test_indentation_becomes_pieces() -> None:
    processor = SentencePieceProcessor(model_proto=train_tokenizer(["def f():\n        return 1\n" * 20], 280, 100_000))
    assert processor.piece_to_id(SPACE * 4) != processor.unk_id()


def test_long_documents_count_and_newlines_can_merge() -> None:
    document = "abc def.\n\nDef abc!\n\n" * 1000  # above SentencePiece's default limit of 4192 bytes
    processor = SentencePieceProcessor(model_proto=train_tokenizer([document], 275, 100_000))
    assert processor.piece_to_id("\n\n") != processor.unk_id()


@pytest.mark.parametrize("num_spaces", [0, 1, 20, 100])
def test_the_space_is_a_piece_however_rare_it_is(num_spaces: int) -> None:
    letters = "".join(chr(97 + i * i % 23) for i in range(3000))
    model = train_tokenizer([letters + " x" * num_spaces], 300, 100_000)
    tokenizer = Tokenizer(model, Path("trained.model"))  # refuses one without
    assert tokenizer.lossless
    assert SPACE in {tokenizer.processor.id_to_piece(token) for token in range(300)}


@pytest.mark.parametrize(("documents", "vocab_size", "expected"), [
    ([ENGLISH], 5000, r"at most \d+ pieces"),
    (DOCUMENTS, 262, r"at least \d+ pieces"),
    (["\u2585 a b"], 300, "a vocabulary that SentencePiece can train"),
])
def test_vocabulary_that_cannot_be_reached_is_an_error(documents: list[str], vocab_size: int, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"tokenize\.vocab_size: expected {expected}.*, found {vocab_size} .*tokenizer_training_bytes"):
        train_tokenizer(documents, vocab_size, 100_000)


def test_the_size_that_the_error_names_can_be_reached() -> None:
    with pytest.raises(ValueError, match="at most") as error:
        train_tokenizer([ENGLISH], 5000, 100_000)
    limit = int(str(error.value).split("at most ")[1].split()[0])
    assert Tokenizer(train_tokenizer([ENGLISH], limit, 100_000), Path("trained.model")).vocab_size == limit


def test_no_documents_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"expected training documents for the tokenizer, found none"):
        train_tokenizer([], 300, 100_000)
