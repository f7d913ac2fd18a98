"""Documents as tokens, and back."""

from collections.abc import Iterator, Sequence

import numpy as np

from lib.artifacts.tokens import Tokens
from lib.data.case import decode_case, encode_case
from lib.data.tokenizer import Tokenizer


def encode_documents(tokenizer: Tokenizer, texts: Sequence[str], num_threads: int = -1) -> Iterator[Tokens]:
    """Tokens of each document, (n,) uint16 with BOS first.

    Args:
        tokenizer: what encodes them.
        texts: the documents.
        num_threads: threads that encode; -1 = one for each core.

    Raises:
        UnicodeEncodeError: a text has lone surrogates.
    """
    written = [encode_case(text) if tokenizer.case_transform else text for text in texts]
    for tokens in tokenizer.processor.encode(written, num_threads=num_threads):
        yield np.array([tokenizer.bos_id, *tokens], np.uint16)


def decode_documents(tokenizer: Tokenizer, documents: Sequence[Sequence[int]]) -> list[str]:
    """The text of each document, decoded on one core: what was encoded, if the tokenizer is lossless.

    BOS has no text; bytes that are no UTF-8 become U+FFFD.
    """
    texts: list[str] = tokenizer.processor.decode(list(documents), num_threads=1) if documents else []
    return [decode_case(text) for text in texts] if tokenizer.case_transform else texts
