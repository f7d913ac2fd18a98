"""Byte side-cars made by the published rule, letter by letter, against the accounting."""

from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest

from lib.artifacts.files import ArtifactError
from lib.data import sidecar
from lib.data.shards import Shards, find_shards
from lib.data.sidecar import SidecarComparison, compare_sidecars
from lib.data.tokenizer import ALLCAPS, ESC, OPERATORS, SPACE, Tokenizer
from tests.data.shard_files import tokens_of, write_shards
from tests.data.test_case import encode_by_rule
from tests.data.test_tokenizer import train
from tests.data.texts import ENGLISH, SCRIPTS, cased_tokenizer

CASED = cased_tokenizer()
TEXTS = ["NASA", "Zoë", "aB", "A", "", "the shipYard of McDonald, HARBOURbound THE Ship", f"a{OPERATORS}b {ESC}{ESC}C {ALLCAPS}",
         *SCRIPTS.values(), f"{ESC}", "👍", ENGLISH, "X"]


def count_by_rule(tokenizer: Tokenizer, text: str) -> list[int]:
    """Bytes of each token: of what its letters were in the text, 0 for operators; a character in byte pieces counts at its last one."""
    letters, escaped = [], False
    for letter in encode_by_rule(text):
        is_operator = letter in OPERATORS and not escaped
        letters.append(0 if is_operator else len(letter.encode()))
        escaped = is_operator and letter == ESC
    ends = [0, *accumulate(letters)]
    sizes, position, pending = [0], 0, b""
    for token in tokens_of(tokenizer, [text])[1:]:
        piece, start = tokenizer.processor.id_to_piece(token), position
        if tokenizer.processor.is_byte(token):
            pending += bytes.fromhex(piece[3:5])
            if pending.decode(errors="ignore"):
                position, pending = position + 1, b""
        else:
            position += len(piece)
        sizes.append(ends[position] - ends[start])
    assert position == len(letters)
    return sizes


NUM_BYTES = sum(len(text.encode()) for text in TEXTS)
TOKENS = tokens_of(CASED, TEXTS)
SIZES = [size for text in TEXTS for size in count_by_rule(CASED, text)]


def publish(folder: Path, sizes: list[int], shard_tokens: int = 97, tokens: list[int] = TOKENS) -> Shards:
    for split, content in (("train", tokens), ("val", tokens), ("val_bytes", sizes)):
        write_shards(folder, split, content, shard_tokens)
    return find_shards(folder)


@pytest.mark.parametrize(("shard_tokens", "segment_tokens"), [(97, 1 << 20), (97, 30), (5000, 1), (1, 50)])
def test_a_sidecar_of_the_published_rule_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                                shard_tokens: int, segment_tokens: int) -> None:
    assert sum(SIZES) == NUM_BYTES
    accounted = [0, *CASED.target_bytes(np.array(TOKENS, np.uint16)).tolist()]
    assert sum(map(int.__ne__, SIZES, accounted)) > 20, "byte pieces, which count one each here"
    monkeypatch.setattr(sidecar, "SEGMENT_TOKENS", segment_tokens)
    assert compare_sidecars(publish(tmp_path, SIZES, shard_tokens), CASED) == SidecarComparison(NUM_BYTES, NUM_BYTES, 0)
    assert f"side-cars of {NUM_BYTES:,} bytes, by this project's accounting {NUM_BYTES:,}, which counts; 0 of" in capsys.readouterr().err


IS_BYTE = [CASED.processor.is_byte(token) for token in TOKENS]
LAST_BYTE = next(place for place in range(97, len(TOKENS)) if IS_BYTE[place - 1:place + 2] == [True, True, False])
NONE = {"BOS": TOKENS.index(CASED.bos_id, 300), **{f"{ord(each):X}": TOKENS.index(CASED.processor.piece_to_id(each)) for each in OPERATORS}}
SOME = {"byte": LAST_BYTE, "word": TOKENS.index(tokens_of(CASED, ["the"])[1]), "last": len(TOKENS) - 1}


@pytest.mark.parametrize(("place", "change"), [
    *((place, 1) for place in [*NONE.values(), *SOME.values()]), *((place, -1) for place in SOME.values())],
    ids=[*NONE, *SOME, *(f"less at {name}" for name in SOME)])
def test_one_wrong_byte_is_refused_with_its_place(tmp_path: Path, place: int, change: int) -> None:
    first = place
    while IS_BYTE[place] and IS_BYTE[first - 1]:
        first -= 1
    assert (first < place) == (place == LAST_BYTE)
    wrong, expected = SIZES.copy(), sum(SIZES[first:place + 1])
    wrong[place] += change
    with pytest.raises(ArtifactError, match=rf"web_val_bytes_{first // 97:06d}\.bin, token {first % 97}: expected {expected} bytes for .*, "
                                            rf"found {expected + change}; name the dataset"):
        compare_sidecars(publish(tmp_path, wrong), CASED)


def test_the_first_of_several_differences_is_named(tmp_path: Path) -> None:
    wrong = SIZES.copy()
    first, second = [place for place, token in enumerate(TOKENS) if token == CASED.bos_id][3:5]
    wrong[second], wrong[first] = 5, 4
    with pytest.raises(ArtifactError, match=rf"web_val_bytes_000000\.bin, token {first}: expected 0 bytes for .* found 4"):
        compare_sidecars(publish(tmp_path, wrong), CASED)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_length_is_refused(tmp_path: Path, change: int) -> None:
    shards = publish(tmp_path, SIZES)
    wrong = SIZES[97:2 * 97 + change]
    write_shards(tmp_path / "other", "val_bytes", wrong, 200)[0].replace(shards.val_bytes[1])
    with pytest.raises(ArtifactError, match=rf"bytes_000001\.bin: expected 97 numbers, .* web_val_000001\.bin, found {97 + change};"):
        compare_sidecars(shards, CASED)


def test_missing_ones_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = publish(tmp_path, SIZES)
    assert len(shards.val_bytes) == len(shards.val)
    shards.val_bytes[2].unlink()
    assert compare_sidecars(find_shards(tmp_path), CASED) is None
    assert "no byte side-car for web_val_000002.bin; bytes are counted without" in capsys.readouterr().err


LOSSY = Tokenizer(train([encode_by_rule(ENGLISH)], vocab_size=400, user_defined_symbols=list(OPERATORS),
                        normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True), Path("lossy.model"))
LOSSY_TEXT = "Two words and Three, and many more of them, so that few differ"
LOSSY_TOKENS, LOSSY_SIZES = tokens_of(LOSSY, [LOSSY_TEXT] * 9), count_by_rule(LOSSY, LOSSY_TEXT) * 9


def change_sizes(changes: dict[str, int]) -> list[int]:
    """The side-car with other bytes at the first tokens of some pieces."""
    pieces = [LOSSY.processor.id_to_piece(token) for token in LOSSY_TOKENS]
    sizes = LOSSY_SIZES.copy()
    for piece, change in changes.items():
        sizes[pieces.index(piece)] += change
    return sizes


def test_what_a_normalizer_may_have_changed_is_counted(tmp_path: Path) -> None:
    """Two spaces in the text are one in the tokens."""
    assert tokens_of(LOSSY, [LOSSY_TEXT.replace(" ", "  ", 1)]) == tokens_of(LOSSY, [LOSSY_TEXT])
    shards = publish(tmp_path, change_sizes({SPACE: 1}), tokens=LOSSY_TOKENS)
    num_bytes = 9 * len(LOSSY_TEXT)
    assert compare_sidecars(shards, LOSSY) == SidecarComparison(num_bytes + 1, num_bytes, 1)


@pytest.mark.parametrize(("changes", "message"), [
    ({"<s>": 1}, r"bytes_000000\.bin, token 0: expected 0 bytes for token 1, .*, found 1"),
    ({OPERATORS[0]: 2}, r"bytes_000000\.bin, token 1: expected 0 bytes for token 4, .*, found 2"),
    ({SPACE: -1}, r"expected byte side-cars of at least the 558 bytes that .*, found 557: bits per byte would be too low; name"),
])
def test_what_no_normalizer_does_is_refused(tmp_path: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        compare_sidecars(publish(tmp_path, change_sizes(changes), tokens=LOSSY_TOKENS), LOSSY)


def test_the_sidecar_of_another_tokenization_is_refused(tmp_path: Path) -> None:
    sizes = [size and size + number % 9 // 8 for number, size in enumerate(LOSSY_SIZES)]  # every 9th token has one byte more
    with pytest.raises(ArtifactError, match=r"expected byte side-cars of web_val_000000\.bin and .*, found other .* at \d+ of \d+ t"):
        compare_sidecars(publish(tmp_path, sizes, tokens=LOSSY_TOKENS), LOSSY)
