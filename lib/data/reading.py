"""The text of single tokens, where they have one: a part of a character, or an operator of the case transform, has none of its own."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from lib.data.encoder import decode_documents
from lib.data.tokenizer import OPERATORS, Tokenizer

UNDECODED = "\N{REPLACEMENT CHARACTER}"  # what bytes that are no character become
MARK = "."  # decoded in front of tokens, it keeps the space that they begin with


class Span(NamedTuple):
    """Neighbouring tokens that have a text together: `num_tokens` of them, at least one."""

    text: str
    num_tokens: int


def split_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[Span]:
    """The text of a document in as many spans as can be told apart.

    A token is a span, but for bytes, of which a character is one, and the case transform, where a word with its operators is one.

    Args:
        tokenizer: of the tokens.
        tokens: of one document, without BOS in front.
    """
    cuts = [0, *(number for number, pair in enumerate(pairwise(tokens), 1) if not _goes_on(tokenizer, *pair)), len(tokens)]
    mark = tokenizer.processor.piece_to_id(f"<0x{ord(MARK):02X}>")
    groups = [list(tokens[first:end]) for first, end in pairwise(cuts)] if tokens else []
    texts = [*decode_documents(tokenizer, groups[:1]),
             *(text.removeprefix(MARK) for text in decode_documents(tokenizer, [[mark, *group] for group in groups[1:]]))]
    return [Span(text, len(group)) for text, group in zip(texts, groups, strict=True)]


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """The text of the tokens that follow a prompt, each part as soon as no later token can change it; some parts are empty."""
    seen = list(prompt)
    text, = decode_documents(tokenizer, [seen])
    num_given = len(text)
    for token in tokens:
        seen.append(token)
        text, = decode_documents(tokenizer, [seen])
        end = max(num_given, len(text.rstrip(UNDECODED + OPERATORS)))
        yield text[num_given:end]
        num_given = end
    yield text[num_given:]


def _goes_on(tokenizer: Tokenizer, before: int, token: int) -> bool:
    """Whether a token has its text together with the one before it."""
    processor = tokenizer.processor
    piece = processor.id_to_piece(token)
    letter = chr(int(piece[3:5], 16)) if processor.is_byte(token) else piece[0]
    if processor.is_byte(token) and letter >= "\x80":
        return letter < "\xc0" and processor.is_byte(before)  # not the first byte of a character
    return tokenizer.case_transform and (letter in OPERATORS or "a" <= letter <= "z")
