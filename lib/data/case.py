"""Lossless case transform: capitals are written as operators and small letters, so that a tokenizer needs each word once.

The scheme is `lossless_caps_caseops_v1` of the parameter-golf challenge. A word is a maximal run of ASCII letters:

- all small: as it is;
- the first letter alone is a capital: TITLE and the word in small letters;
- all capitals, at least two: ALLCAPS and the word in small letters;
- mixed: TITLE in front if the first letter is a capital, CAPNEXT before each later capital, all in small letters.

An operator that the text itself contains is written as ESC and the operator; every other character stays.
"""

import re

from lib.data.tokenizer import ALLCAPS, CAPNEXT, ESC, OPERATORS, TITLE

# From the first capital of a word to its end, or an operator: a set of characters at the start makes the search fast.
_CAPITALIZED = re.compile(rf"[A-Z{OPERATORS}](?:(?<=[A-Z])[A-Za-z]+)?")
_OPERATION = re.compile(rf"{ESC}([{OPERATORS}])|{ALLCAPS}([a-z]+)|[{TITLE}{CAPNEXT}]([a-z])")
_CAPNEXT_OF = {capital: CAPNEXT + chr(capital).lower() for capital in range(ord("A"), ord("Z") + 1)}


def encode_case(text: str) -> str:
    """Write the capitals of any text as operators and small letters."""
    return _CAPITALIZED.sub(_encode_word, text)


def decode_case(encoded: str) -> str:
    """The text that `encode_case` was given: write the capitals that the operators stand for.

    A normalizer may have changed the encoded text since: an operator without letters to apply to stays in the text.
    """
    return _OPERATION.sub(lambda match: match[match.lastindex or 0].upper(), encoded)


def _encode_word(match: re.Match[str]) -> str:
    start, word = match.start(), match[0]
    if word in OPERATORS:
        return ESC + word
    if start and "a" <= match.string[start - 1] <= "z":  # the word began before, with small letters
        return word.translate(_CAPNEXT_OF)
    rest = word[1:]
    if rest.isupper():
        return ALLCAPS + word.lower()
    return TITLE + word[0].lower() + rest.translate(_CAPNEXT_OF)
