import numpy as np
import pytest

from lib.data.encoder import decode_documents, encode_documents
from lib.data.roundtrip import Reencoding, reencode
from tests.data.test_sidecar import LOSSY


@pytest.mark.parametrize("word", ["screen\N{TRADE MARK SIGN}", "\N{LATIN SMALL LIGATURE FI}RST", "\N{ROMAN NUMERAL FOUR}th",
                                  "\N{FULLWIDTH LATIN CAPITAL LETTER A}b"])
def test_letters_that_a_normalizer_makes_after_the_case_transform_show_no_other_tokenizer(word: str) -> None:
    """Written again, the decoded text has other operators; spelled in other pieces, it is still refused."""
    (tokens,) = encode_documents(LOSSY, [f"the {word} and THE crew of the ship"])
    texts = decode_documents(LOSSY, [tokens.tolist()])
    (again,) = encode_documents(LOSSY, texts)
    assert tokens.tolist() != again.tolist()
    assert reencode(LOSSY, [tokens], texts) == [Reencoding.same]
    last = LOSSY.processor.id_to_piece(int(tokens[-1]))
    spelled = [*tokens[:-1].tolist(), *map(LOSSY.processor.piece_to_id, last)]
    assert len(last) > 1
    assert decode_documents(LOSSY, [spelled]) == texts
    assert reencode(LOSSY, [np.array(spelled, np.uint16)], texts) == [Reencoding.other]
