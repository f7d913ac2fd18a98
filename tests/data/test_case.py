from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lib.data.case import decode_case, encode_case
from lib.data.tokenizer import ALLCAPS, CAPNEXT, ESC, OPERATORS, SPACE, TITLE
from tests.data.texts import ENGLISH, SCRIPTS

CASED_TEXTS = st.text(st.one_of(st.sampled_from(f"abzABZ {SPACE}\n1éÉßſK" + OPERATORS), st.characters(exclude_categories=["Cs"])))


def is_letter(character: str) -> bool:
    return character.isascii() and character.isalpha()


def encode_by_rule(text: str) -> str:
    """The published rule, word by word and letter by letter."""
    result = ""
    for letters, run in groupby(text, is_letter):
        word = "".join(run)
        if not letters:
            result += "".join(ESC + character if character in OPERATORS else character for character in word)
        elif len(word) >= 2 and word == word.upper():
            result += ALLCAPS + word.lower()
        else:
            for position, letter in enumerate(word):
                result += letter if letter.islower() else (CAPNEXT if position else TITLE) + letter.lower()
    return result


@pytest.mark.parametrize(("text", "encoded"), [
    ("The NASA", f"{TITLE}the {ALLCAPS}nasa"),
    ("xMl", f"x{CAPNEXT}ml"),
    ("I", f"{TITLE}i"),
    ("OK", f"{ALLCAPS}ok"),
    ("iPhone McDonald PhD HTMLs", f"i{CAPNEXT}phone {TITLE}mc{CAPNEXT}donald {TITLE}ph{CAPNEXT}d {TITLE}h{CAPNEXT}t{CAPNEXT}m{CAPNEXT}ls"),
    ("U.S. don'T B2B", f"{TITLE}u.{TITLE}s. don'{TITLE}t {TITLE}b2{TITLE}b"),
    ("ÉCOLE Ünal", f"É{ALLCAPS}cole Ünal"),
    (f"a{ESC}B{TITLE}{ESC}", f"a{ESC}{ESC}{TITLE}b{ESC}{TITLE}{ESC}{ESC}"),
    (f"{CAPNEXT}A{ALLCAPS}BC", f"{ESC}{CAPNEXT}{TITLE}a{ESC}{ALLCAPS}{ALLCAPS}bc"),
    ("", ""),
])
def test_known_texts(text: str, encoded: str) -> None:
    assert encode_case(text) == encoded
    assert decode_case(encoded) == text


@given(CASED_TEXTS)
@example(ENGLISH + "".join(SCRIPTS.values()))
def test_encoded_text_follows_the_rule_and_decodes_to_the_text(text: str) -> None:
    """So that encoding is a bijection from all texts to encoded ones."""
    encoded = encode_case(text)
    assert encoded == encode_by_rule(text)
    assert decode_case(encoded) == text


def test_operators_without_their_letters_stay() -> None:
    assert decode_case(f"{TITLE}ý fi{ALLCAPS}sh A{ESC}{ESC}{CAPNEXT}") == f"{TITLE}ý fiSH A{ESC}{CAPNEXT}"
