import json
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.data import corpus
from lib.data.config import SourceName
from lib.data.corpus import SOURCES, Selection, Source, batch_texts, examine, normalized_hash, open_source, split_of
from tests.data.texts import tiny_params

WORDS = st.lists(st.text("abcßDEFÉ", min_size=1, max_size=6), min_size=1, max_size=8)
WHITE_SPACE = st.text(" \t\n\r\u00a0\u3000", min_size=1, max_size=3)


def select(texts: list[str], lossless: bool = False, **changes: object) -> tuple[list[tuple[str, str]], Selection]:
    params = tiny_params(**changes)
    selection, selected = Selection(params, lossless), []
    for text, flaw, digest in (examine(text, params.min_document_bytes) for text in texts):
        if split := selection.assign(flaw, digest, "here"):
            selected.append((split, text))
    return selected, selection


def read(source: Source) -> list[str]:
    return [text for batch in source.read() for text in batch.texts()]


def test_every_source_name_is_registered() -> None:
    assert set(SOURCES) == set(get_args(SourceName))


@given(words=WORDS, gaps=st.lists(WHITE_SPACE, min_size=9, max_size=9), upper=st.booleans())
def test_hash_ignores_white_space_and_case_alone(words: list[str], gaps: list[str], upper: bool) -> None:
    text = "".join(gap + word for gap, word in zip(gaps, words, strict=False)) + gaps[-1]
    assert normalized_hash(text.upper() if upper else text) == normalized_hash(" ".join(words))
    assert normalized_hash(text) != normalized_hash(text + "z")
    assert normalized_hash("a b") != normalized_hash("ab")


@given(texts=st.lists(st.text(st.sampled_from("ab \nAB"), max_size=6), max_size=30), heldout=st.floats(0.01, 0.49),
       val=st.floats(0.01, 0.49))
def test_equal_documents_share_a_split_and_only_the_first_is_kept(texts: list[str], heldout: float, val: float) -> None:
    documents, selection = select(texts, heldout_fraction=heldout, val_fraction=val)
    keys = [" ".join(text.casefold().split()) for _, text in documents]
    assert len(set(keys)) == len(keys)
    assert set(keys) == {" ".join(text.casefold().split()) for text in texts if text.lstrip(" ")}
    for split, text in documents:  # the split depends on nothing but the document
        assert select([text.swapcase()], heldout_fraction=heldout, val_fraction=val)[0] == [(split, text.swapcase())]
    assert sum(map(len, selection.keys.values())) + selection.skipped.total() == len(texts)


@given(texts=st.lists(st.text(st.characters(), max_size=8)), batch_bytes=st.integers(1, 30))
def test_batches_hold_every_text_in_order(texts: list[str], batch_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "BATCH_BYTES", batch_bytes)
        batches = list(batch_texts(texts))
    assert [text for batch in batches for text in batch.texts()] == texts
    for batch in batches[:-1]:
        assert batch.size_bytes >= batch_bytes > batch.size_bytes - len(batch.content[-1].encode(errors="surrogatepass"))


def test_fractions_are_those_of_the_parameters() -> None:
    documents, _ = select([f"document {i}" for i in range(20_000)], heldout_fraction=0.1, val_fraction=0.3)
    counts = {split: sum(found == split for found, _ in documents) for split in ("train", "heldout", "val")}
    assert counts["heldout"] == pytest.approx(2000, rel=0.1)
    assert counts["val"] == pytest.approx(6000, rel=0.05)


@pytest.mark.parametrize(("digest", "split"), [
    (b"\x00", "val"), (b"\x3f", "val"), (b"\x40", "heldout"), (b"\x7f", "heldout"), (b"\x80", "train"), (b"\xff", "train"),
])
def test_split_is_decided_by_the_leading_bits(digest: bytes, split: str) -> None:
    assert split_of(digest + bytes(31), heldout_fraction=0.25, val_fraction=0.25) == split


def test_what_is_left_out_is_counted_by_reason() -> None:
    texts = ["", "   ", "  leading spaces", "leading SPACES ", "1234", "12345", "Ωμ1", "block \u2581 character", "lone \ud800 surrogate",
             "\tkept tab "]
    documents, selection = select(texts, min_document_bytes=5)
    assert [text for _, text in documents] == ["leading spaces", "12345", "Ωμ1", "\tkept tab "]
    assert selection.skipped == {"empty": 2, "repeated": 1, "short": 1, "contains U+2581": 1, "contains a lone surrogate": 1}


@given(texts=st.lists(st.text(st.sampled_from("ab \nAB\u2581"), max_size=4), max_size=30), num_val=st.integers(1, 10))
def test_the_first_documents_are_validation_as_they_are_and_later_equals_are_left_out(texts: list[str], num_val: int) -> None:
    documents, selection = select(texts, val_fraction=None, val_documents=num_val)
    trimmed = [text.lstrip(" ") for text in texts]
    assert documents[:num_val] == [("val", text) for text in trimmed[:num_val]]
    given_keys = {" ".join(text.casefold().split()) for text in trimmed[:num_val]}
    rest = documents[num_val:]
    assert {split for split, _ in rest} <= {"train", "heldout"}
    expected = {" ".join(text.casefold().split()) for text in trimmed[num_val:] if text and "\u2581" not in text}
    assert {" ".join(text.casefold().split()) for _, text in rest} == expected - given_keys
    assert len(documents) + selection.skipped.total() == len(texts)
    usable = [text for text in trimmed[num_val:] if text and "\u2581" not in text]
    assert selection.skipped["also in val"] == sum(" ".join(text.casefold().split()) in given_keys for text in usable)


def test_a_given_validation_document_without_utf8_form_is_named() -> None:
    with pytest.raises(ValueError, match=r"tokenize\.val_documents: expected documents .*, found that number 2, here, contains a lone"):
        select(["one", "\ud800", "three"], val_fraction=None, val_documents=3)
    with pytest.raises(ValueError, match=r"number 2, here, contains U\+2581, its sign for a space; replace .*tokenize\.val_fraction"):
        select(["one", "a\u2581", "three"], lossless=True, val_fraction=None, val_documents=3)
    assert len(select(["one", "two", "three", "\ud800"], val_fraction=None, val_documents=3)[0]) == 3


def test_jsonl_source_can_be_read_again(tmp_path: Path) -> None:
    for name, text in (("b", "second"), ("a", "first")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
    source = open_source(tiny_params(path=str(tmp_path)))
    assert isinstance(source, Source)
    assert read(source) == read(source) == ["first", "second"]
    assert source.size_bytes == sum(batch.size_bytes for batch in source.read()) == 17 + 18
    assert source.provenance == {"name": "jsonl", "file_bytes": {"a.jsonl": 17, "b.jsonl": 18}}
    assert open_source(tiny_params(path=str(tmp_path / "b.jsonl"))).provenance["file_bytes"] == {"b.jsonl": 18}


def test_separate_files_give_their_splits_and_what_equals_them_is_left_out(tmp_path: Path) -> None:
    files = {"val": ["one", "", "ONE", "two"], "heldout": ["three", "two ", "three"], "train": ["Three", "four", "one", "five", "four"]}
    for name, texts in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n\n".join(json.dumps({"text": text}) for text in texts))
    params = tiny_params(path=str(tmp_path), val_fraction=None, val_path=str(tmp_path / "val.jsonl"), heldout_fraction=None,
                         heldout_path=str(tmp_path / "heldout.jsonl"))
    source = open_source(params)
    assert isinstance(source, Source)
    selection, found = Selection(params), []
    for given_split, batch in source.batches():
        for text, place in zip(batch.texts(), batch.places(), strict=True):
            _, flaw, digest = examine(text, params.min_document_bytes)
            found.append((text, place.removeprefix(f"{tmp_path}/"), selection.assign(flaw, digest, place, given_split)))
    assert found == [
        ("one", "val.jsonl, line 1", "val"), ("", "val.jsonl, line 3", "val"), ("ONE", "val.jsonl, line 5", "val"),
        ("two", "val.jsonl, line 7", "val"), ("three", "heldout.jsonl, line 1", "heldout"), ("two ", "heldout.jsonl, line 3", None),
        ("three", "heldout.jsonl, line 5", None), ("Three", "train.jsonl, line 1", None), ("four", "train.jsonl, line 3", "train"),
        ("one", "train.jsonl, line 5", None), ("five", "train.jsonl, line 7", "train"), ("four", "train.jsonl, line 9", None)]
    assert selection.skipped == {"also in val": 2, "also in heldout": 1, "repeated": 2}
    assert source.provenance["file_bytes"].keys() == {"train.jsonl"}
    assert source.provenance["separate_file_bytes"].keys() == {"val", "heldout"}


@pytest.mark.parametrize(("changes", "message"), [
    ({"path": "a.jsonl", "val_path": "a.jsonl"}, r"tokenize\.path: expected files beside those of tokenize\.val_path"),
    ({"path": "a.jsonl", "val_path": "none.jsonl"}, r"tokenize\.val_path: expected a file or folder, found nothing at none\.jsonl"),
    ({"path": "a.jsonl", "val_path": "b.jsonl", "heldout_fraction": None, "heldout_path": "b.jsonl"},
     r"tokenize\.heldout_path: expected other files than those of tokenize\.val_path, found .*b\.jsonl in both"),
])
def test_separate_files_that_cannot_be_used_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str],
                                                      message: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}))
    with pytest.raises(ValueError, match=message):
        open_source(tiny_params(val_fraction=None, **changes))


def test_embedded_source_drops_repeated_docstrings_and_sorts_by_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = [["One.", "Two.", "one."], ["TWO. ", "Three."], [], ["Two.", "One."], ["Four."]]
    monkeypatch.setattr(corpus, "harvest", lambda packages: iter(modules))
    monkeypatch.setattr(corpus, "check_pins", lambda requirements, packages: {"ark": "3.0"})
    source = open_source(tiny_params(source="embedded", path="requirements.txt"))
    assert isinstance(source, Source)
    expected = ["One.\n\nTwo.", "Three.", "", "", "Four."]
    assert read(source) == read(source) == sorted(expected, key=normalized_hash)
    assert source.size_bytes == sum(batch.size_bytes for batch in source.read()) == len("".join(expected))
    assert source.provenance["packages"] == {"ark": "3.0"}
