import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import SPLITS, load_split
from lib.data import corpus
from lib.data.config import ExpectParams
from lib.data.corpus import Source, batch_texts, open_source
from lib.data.encoder import encode_documents
from lib.data.tokenization import make_manifest, provide_tokenizer, summarize, write_splits
from lib.data.tokenizer import OPERATORS, Tokenizer, load_tokenizer
from tests.data.test_tokenizer import train
from tests.data.texts import ENGLISH, SCRIPTS, TINY_VOCAB_SIZE, tiny_params, tiny_tokenizer

SENTENCES = [f"Document {i}: {text}" for i in range(4) for text in (ENGLISH, *SCRIPTS.values())]


def make_source(texts: list[str], tokenizer: Path | None = None) -> Source:
    batches = list(batch_texts(texts))
    return Source(lambda: iter(batches), sum(batch.size_bytes for batch in batches), {"name": "test"}, tokenizer)


def write(tmp_path: Path, texts: list[str], **changes: Any) -> dict[str, Any]:
    return write_splits(tiny_params(**changes), make_source(texts), tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize("batch_bytes", [1, 500, 1 << 22])
def test_splits_hold_every_document_once_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_bytes: int) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", batch_bytes)
    result = write(tmp_path, SENTENCES)
    tokenizer = tiny_tokenizer()
    found = []
    for name in SPLITS:
        split = load_split(tmp_path / name, TINY_VOCAB_SIZE)
        tokens = split.tokens()
        documents = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos_id)[1:])
        texts = [next(text for text in SENTENCES if tokenizer.processor.encode(text) == document[1:].tolist()) for document in documents]
        assert texts == sorted(texts, key=SENTENCES.index)
        assert split.raw_bytes == split.accounted_bytes == tokenizer.target_bytes(tokens).sum() == sum(len(text.encode()) for text in texts)
        assert result["splits"][name]["documents"] == result["splits"][name]["distinct_documents"] == len(texts) == split.num_documents
        found += texts
    assert sorted(found) == sorted(SENTENCES)
    assert set(result["shared_documents"].values()) == {0}
    assert len(result["shared_documents"]) == 3


def test_shared_documents_come_from_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a broken assignment to splits, the evidence in the manifest shows it."""
    turns = itertools.cycle(SPLITS)
    monkeypatch.setattr("lib.data.corpus.split_of", lambda *_, **__: next(turns))
    result = write(tmp_path, ["same text", "same text", "same text", "other"])
    assert result["shared_documents"] == {"train and heldout": 1, "train and val": 1, "heldout and val": 1}


def test_lossless_tokenizer_with_other_bytes_fails(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._num_bytes[tokenizer.processor.encode("D")[0]] = 3
    with pytest.raises(ValueError, match=r"tokenize\.tokenizer: expected tokens .*found \d+ bytes for the .*, which begins 'Docu"):
        write_splits(tiny_params(), make_source(SENTENCES), tokenizer, tmp_path)


NORMALIZERS = {"expanding": "65\t65 65 65 65\n6F\t6F 6F 6F 6F\n", "folding": "".join(f"{i:X}\t{i + 32:X}\n" for i in range(65, 91))}


def normalizing_tokenizer(folder: Path, name: str) -> Tokenizer:
    (folder / "rules.tsv").write_text(NORMALIZERS[name])
    model = train(vocab_size=400, normalization_rule_tsv=str(folder / "rules.tsv"), normalization_rule_name=None)
    return Tokenizer(model, Path(f"{name}.model"))


def test_a_tokenizer_that_lengthens_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenize\.tokenizer: expected tokens of the \w+ split that stand for at most .*lengthens"):
        write_splits(tiny_params(vocab_size=400), make_source(SENTENCES), normalizing_tokenizer(tmp_path, "expanding"), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("split.json"))


def test_a_tokenizer_that_loses_distinctions_is_stated(tmp_path: Path) -> None:
    tokenizer = normalizing_tokenizer(tmp_path, "folding")
    result = write_splits(tiny_params(vocab_size=400), make_source([*SENTENCES, "small", "letters"]), tokenizer,
                          tmp_path / "out")
    val = result["splits"]["val"]
    assert val["documents"] - val["reproduced_documents"] > 0
    manifest = make_manifest(tiny_params(), make_source([]), tokenizer, result)
    assert summarize(manifest)["text"] == (f"text is not reproduced by the tokenizer: {val['documents'] - val['reproduced_documents']} of "
                                           f"{val['documents']} validation documents")


def test_empty_split_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected documents in every split, found none in .*min_document_bytes"):
        write(tmp_path, ["one document alone", "short"], min_document_bytes=10)


def test_trained_tokenizer_sees_training_documents_only(tmp_path: Path) -> None:
    params = tiny_params()
    source = make_source(SENTENCES)
    tokenizer = provide_tokenizer(params, source, tmp_path / "tokenizer.model")
    assert load_tokenizer(tmp_path / "tokenizer.model").sha256 == tokenizer.sha256
    write_splits(params, source, tokenizer, tmp_path)
    train = [text for text in SENTENCES if tokenizer.processor.encode(text)[:40] in _documents(tmp_path / "train", tokenizer.bos_id)]
    assert 0 < len(train) < len(SENTENCES)
    assert provide_tokenizer(params, make_source(train), tmp_path / "again.model").sha256 == tokenizer.sha256


def _documents(folder: Path, bos_id: int) -> list[list[int]]:
    tokens = load_split(folder, TINY_VOCAB_SIZE).tokens()
    return [document[1:41].tolist() for document in np.split(tokens, np.flatnonzero(tokens == bos_id)[1:])]


def test_given_tokenizer_is_copied(tmp_path: Path) -> None:
    given = tmp_path / "given.model"
    provide_tokenizer(tiny_params(), make_source(SENTENCES), given)
    provide_tokenizer(tiny_params(), make_source([], given), tmp_path / "tokenizer.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == given.read_bytes()
    with pytest.raises(ValueError, match=r"tokenize\.vocab_size: expected the 700 pieces of .*given\.model, found 701"):
        provide_tokenizer(tiny_params(vocab_size=701), make_source([], given), tmp_path / "tokenizer.model")
    with pytest.raises(ArtifactError, match=r"none\.model: no such file"):
        provide_tokenizer(tiny_params(), make_source([], tmp_path / "none.model"), tmp_path / "tokenizer.model")


def test_given_tokenizer_must_fit_the_case_transform(tmp_path: Path) -> None:
    for case_transform in (False, True):
        given, params = tmp_path / f"{case_transform}.model", tiny_params(case_transform=case_transform)
        provide_tokenizer(params, make_source(SENTENCES), given)
        fitting = make_source([], given)
        assert provide_tokenizer(params, fitting, tmp_path / "tokenizer.model").case_transform is case_transform
    with pytest.raises(ValueError, match=r"tokenize\.case_transform: expected true, because .*True\.model has all .*, found false; change"):
        provide_tokenizer(tiny_params(), make_source([], tmp_path / "True.model"), tmp_path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"tokenize\.case_transform: expected false, because .*False\.model has not all .*, found true"):
        provide_tokenizer(tiny_params(case_transform=True), make_source([], tmp_path / "False.model"), tmp_path / "x.model")


def test_case_transform_keeps_documents_and_bytes(tmp_path: Path) -> None:
    params, source = tiny_params(case_transform=True), make_source([*SENTENCES, f"literal {OPERATORS} operators"])
    tokenizer = provide_tokenizer(params, source, tmp_path / "tokenizer.model")
    result = write_splits(params, source, tokenizer, tmp_path)
    manifest = make_manifest(params, source, tokenizer, result)
    assert manifest["tokenizer"]["case_transform"] is summarize(manifest)["case_transform"] is True
    plain = write_splits(tiny_params(), source, tiny_tokenizer(), tmp_path / "plain")
    assert result["skipped_documents"] == plain["skipped_documents"] == {}
    for split in SPLITS:
        for key in ("documents", "raw_bytes", "accounted_bytes"):
            assert result["splits"][split][key] == plain["splits"][split][key]


def test_result_is_the_same_with_any_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 500)
    texts = [*SENTENCES, "", SENTENCES[3], "lone \ud800 surrogate", "contains \u2581"] * 2
    results = [write_splits(tiny_params(), make_source(texts), tiny_tokenizer(), tmp_path / str(n), n) for n in (1, 3)]
    assert results[0] == results[1]
    assert results[0]["skipped_documents"] == {"contains U+2581": 2, "contains a lone surrogate": 2, "empty": 2, "repeated": 110}
    files = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*.*")]
    assert len(files) > len(SPLITS) * 2
    assert all((tmp_path / "1" / file).read_bytes() == (tmp_path / "3" / file).read_bytes() for file in files)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_bad_line_is_named_from_any_process(tmp_path: Path, num_processes: int) -> None:
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "good"}\nbad\n')
    params = tiny_params(path=str(path))
    with pytest.raises(ValueError, match=r"documents\.jsonl, line 2: expected a JSON object"):
        write_splits(params, open_source(params), tiny_tokenizer(), tmp_path, num_processes)


def test_tokenizer_training_reads_no_more_than_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "BATCH_BYTES", 500)
    source = make_source(SENTENCES)
    batches = source.read()
    provide_tokenizer(tiny_params(tokenizer_training_bytes=2000), replace(source, read=lambda: batches), tmp_path / "tokenizer.model")
    assert 2000 < source.size_bytes - sum(batch.size_bytes for batch in batches) < 4500  # about six of ten bytes are for training


def test_manifest_and_metrics(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    manifest = make_manifest(tiny_params(), make_source([]), tokenizer, write(tmp_path, [*SENTENCES, "", SENTENCES[0].upper()]))
    assert manifest["source"] == {"name": "test"}
    assert manifest["tokenizer"] == {"trained": True, "case_transform": False, "lossless": True, "vocab_size": TINY_VOCAB_SIZE,
                                     "sha256": tokenizer.sha256}
    assert manifest["skipped_documents"] == {"empty": 1, "repeated": 1}
    val = json.loads((tmp_path / "val" / "split.json").read_text())
    assert manifest["splits"]["val"] == val | {"distinct_documents": val["documents"], "reproduced_documents": val["documents"]}
    assert summarize(manifest)["val"] == {"documents": val["documents"], "tokens": val["tokens"], "raw_bytes": val["raw_bytes"],
                                          "accounted_bytes": val["raw_bytes"], "bytes_per_token": val["raw_bytes"] / (val["tokens"] - 1)}


@pytest.mark.parametrize("key", ExpectParams.model_fields)
def test_known_facts_are_checked(tmp_path: Path, key: str) -> None:
    splits = write(tmp_path, SENTENCES) | {"byte_sidecar": {"bytes": 12_345}}
    val = splits["splits"]["val"]
    fact = {"val_documents": val["documents"], "val_targets": val["tokens"] - 1, "val_bytes": val["accounted_bytes"],
            "val_bytes_per_token": val["accounted_bytes"] / (val["tokens"] - 1),
            "val_sidecar_bytes_per_token": 12_345 / (val["tokens"] - 1)}[key]

    def check(expected: float) -> None:
        expect = tiny_params().expect.model_dump() | {key: expected}
        make_manifest(tiny_params(expect=expect), make_source([]), tiny_tokenizer(), splits)

    close, far = [fact], [fact + 1, fact - 1]
    if key.endswith("per_token"):  # one unit of the last digit, however many there are
        close = [round(fact, digits) for digits in (3, 5)]  # a zero at the end does not count as a digit
        far = [expected for digits in (3, 5) for units in (-3, -2, 2, 3)
               if len(str(expected := round(fact + units / 10**digits, digits)).partition(".")[2]) == digits]
    for expected in close:
        check(expected)
    for expected in far:
        with pytest.raises(ValueError, match=rf"tokenize\.expect\.{key}: expected {expected}, found {fact}"):
            check(expected)


def test_side_cars_that_are_expected_must_be_there(tmp_path: Path) -> None:
    expect = tiny_params().expect.model_dump() | {"val_sidecar_bytes_per_token": 3.0}
    with pytest.raises(ValueError, match=r"expect\.val_sidecar_bytes_per_token: expected 3\.0, found no side-cars: not the validation"):
        make_manifest(tiny_params(expect=expect), make_source([]), tiny_tokenizer(), write(tmp_path, SENTENCES) | {"byte_sidecar": None})


def test_validation_documents_by_number_may_repeat(tmp_path: Path) -> None:
    texts = ["one", "two", "ONE", "", "one", *SENTENCES]
    result = write(tmp_path, texts, val_fraction=None, val_documents=4)
    assert {key: result["splits"]["val"][key] for key in ("documents", "distinct_documents", "raw_bytes")} == {
        "documents": 4, "distinct_documents": 3, "raw_bytes": 9}
    assert result["skipped_documents"] == {"also in val": 1}
    assert set(result["shared_documents"].values()) == {0}
    expected = np.concatenate(list(encode_documents(tiny_tokenizer(), texts[:4])))
    assert load_split(tmp_path / "val", TINY_VOCAB_SIZE).tokens().tolist() == expected.tolist()
