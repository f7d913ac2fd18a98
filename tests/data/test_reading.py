from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data.encoder import decode_documents, encode_documents
from lib.data.reading import Span, split_text, stream_text
from lib.data.tokenizer import SPACE, Tokenizer
from tests.data.test_case import CASED_TEXTS
from tests.data.test_encoder import TOKENIZERS
from tests.data.texts import SCRIPTS

TEXTS = st.one_of(CASED_TEXTS, st.sampled_from(list(SCRIPTS.values()))).map(lambda text: text.replace(SPACE, ""))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    (tokens,) = encode_documents(tokenizer, [text])
    return tokens[1:].tolist()


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=TEXTS)
def test_spans_make_up_the_text_and_the_tokens(tokenizer: Tokenizer, text: str) -> None:
    tokens = encode(tokenizer, text)
    spans = split_text(tokenizer, tokens)
    assert "".join(span.text for span in spans) == text
    assert sum(span.num_tokens for span in spans) == len(tokens)
    assert all(span.text and span.num_tokens for span in spans)


def test_spans_are_as_short_as_they_can_be() -> None:
    plain, cased = TOKENIZERS["plain"], TOKENIZERS["cased"]
    assert split_text(plain, encode(plain, "\u20ac\u2603")) == [Span("\u20ac", 3), Span("\u2603", 3)]  # of three bytes each
    assert len(split_text(plain, tokens := encode(plain, "a NASA thing of iPhones"))) == len(tokens)
    assert [span.text for span in split_text(cased, encode(cased, "a NASA. The iPhone"))] in (
        ["a", " NASA", ".", " The", " iPhone"], ["a", " ", "NASA", ".", " ", "The", " ", "iPhone"])
    assert split_text(plain, []) == []


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@given(text=TEXTS, prompt=CASED_TEXTS.map(lambda text: text.replace(SPACE, "")), data=st.data())
def test_a_stream_gives_the_text_and_takes_nothing_back(tokenizer: Tokenizer, text: str, prompt: str, data: st.DataObject) -> None:
    """Of any tokens, too: a model may write bytes and operators in any order."""
    prompted = encode(tokenizer, prompt)
    foreign = st.lists(st.integers(4, tokenizer.vocab_size - 1), max_size=8)
    for tokens in (encode(tokenizer, text), data.draw(foreign)):
        whole, = decode_documents(tokenizer, [[*prompted, *tokens]])
        before, = decode_documents(tokenizer, [prompted])
        assert "".join(stream_text(tokenizer, prompted, tokens)) == whole[len(before):]


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    tokenizer = TOKENIZERS["plain"]
    given_tokens: list[int] = []

    def feed() -> Iterator[int]:
        for token in encode(tokenizer, "an \u20ac"):
            given_tokens.append(token)
            yield token

    parts = [(part, len(given_tokens)) for part in stream_text(tokenizer, [], feed())]
    assert [part for part, _ in parts[-4:]] == ["", "", "\u20ac", ""]  # three bytes, and the end
    assert "".join(part for part, _ in parts) == "an \u20ac"
    assert parts[0][1] == 1
