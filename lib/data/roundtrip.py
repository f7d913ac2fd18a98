"""Whether tokens are what a tokenizer makes of a text: decoded and encoded again, they must be the same.

Files of different tokenizers often have the same name and size; tokens of one, read by another, are a text that nobody wrote, with other
bytes. Of most such texts the other tokenizer makes other tokens.
"""

from collections.abc import Sequence
from enum import IntEnum

from lib.artifacts.tokens import Tokens
from lib.data.encoder import decode_documents, encode_documents
from lib.data.tokenizer import Tokenizer

CUT_TOKENS = 16
"""At the end of a document that may have been cut off: what is left of a word is encoded in another way than the word was."""

MAX_CHANGED_FRACTION = 0.01
"""Share of documents that the normalizer would change again: one of NFKC is the same the second time, but for rare sequences of marks."""


class Reencoding(IntEnum):
    """What came of encoding the decoded tokens of a document.

    same: the tokens. other: different ones for the same text, so that another tokenizer made them. changed: tokens of a different text,
    because the normalizer changes what it gives, or the tokens are of another tokenizer. untried: it was not in the sample.
    """

    same = 0
    changed = 1
    other = 2
    untried = 3


def reencode(tokenizer: Tokenizer, documents: Sequence[Tokens], texts: Sequence[str], *, num_threads: int = 1,
             may_be_cut: bool = False) -> list[Reencoding]:
    """Encode decoded documents and compare.

    Args:
        tokenizer: the one that is said to have made the tokens.
        documents: (n,) uint16 each, BOS first.
        texts: text of the documents, from `decode_documents`.
        num_threads: threads that encode; -1 = one for each core.
        may_be_cut: the last document may end inside a word, and its last `CUT_TOKENS` tokens may be others.
    """
    outcomes = []
    for number, (tokens, text, again) in enumerate(zip(documents, texts, encode_documents(tokenizer, texts, num_threads), strict=True), 1):
        kept = len(tokens) - CUT_TOKENS if may_be_cut and number == len(documents) else None
        if (tokens.tolist() == again.tolist() or (kept is not None and tokens[:max(kept, 0)].tolist() == again[:max(kept, 0)].tolist())
                or (tokenizer.case_transform and not tokenizer.lossless and _keeps_operators(tokenizer, tokens))):
            outcomes.append(Reencoding.same)
        else:
            outcomes.append(Reencoding.other if decode_documents(tokenizer, [again.tolist()]) == [text] else Reencoding.changed)
    return outcomes


def _keeps_operators(tokenizer: Tokenizer, tokens: Tokens) -> bool:
    """Whether tokens are those of their text with its operators as they are.

    A normalizer comes after the case transform, and makes letters of other characters, which then belong to the words beside them: what
    the operators were put for cannot be seen any more (the capitals of U+2122 have none, and a ligature may have been the start of a word).
    """
    again: list[int] = tokenizer.processor.encode(tokenizer.processor.decode(tokens.tolist()))
    return again == tokens[1:].tolist()


def too_many_changed(num_changed: int, num_tried: int) -> bool:
    """Whether so many documents changed that the tokens cannot be said to be the tokenizer's."""
    return num_changed > max(1, MAX_CHANGED_FRACTION * num_tried)
