import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.encoder import decode_documents, encode_documents
from lib.data.tokenizer import OPERATORS, SPACE, Tokenizer
from tests.data.test_case import CASED_TEXTS
from tests.data.texts import ENGLISH, SCRIPTS, cased_tokenizer, tiny_tokenizer

TOKENIZERS = {"plain": tiny_tokenizer(), "cased": cased_tokenizer()}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_documents_start_with_bos(tokenizer: Tokenizer, num_threads: int) -> None:
    documents = list(encode_documents(tokenizer, ["a b", "", ENGLISH, "an A"], num_threads))
    alone = [next(encode_documents(tokenizer, [text])) for text in ("a b", "", ENGLISH, "an A")]
    assert [tokens.tolist() for tokens in documents] == [tokens.tolist() for tokens in alone]
    assert all(tokens.dtype == np.uint16 and tokens[0] == tokenizer.bos_id for tokens in documents)
    assert documents[1].tolist() == [tokenizer.bos_id]
    assert documents[0].tolist() == [tokenizer.bos_id, *tokenizer.processor.encode("a b")]


def test_capitals_are_written_as_operators() -> None:
    (tokens,) = encode_documents(TOKENIZERS["cased"], ["The NASA"])
    pieces = [TOKENIZERS["cased"].processor.id_to_piece(token) for token in tokens[1:].tolist()]
    assert "".join(pieces) == f"{OPERATORS[0]}the{SPACE}{OPERATORS[1]}nasa"
    assert {OPERATORS[0], OPERATORS[1]} <= set(pieces)


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(texts=st.lists(CASED_TEXTS.map(lambda text: text.replace(SPACE, "")), max_size=4))
def test_documents_are_decoded_to_their_text(tokenizer: Tokenizer, texts: list[str]) -> None:
    documents = [tokens.tolist() for tokens in encode_documents(tokenizer, texts)]
    assert decode_documents(tokenizer, documents) == texts


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_every_script_is_decoded_to_its_text(tokenizer: Tokenizer) -> None:
    texts = list(SCRIPTS.values())
    assert decode_documents(tokenizer, [tokens.tolist() for tokens in encode_documents(tokenizer, texts)]) == texts
