from typing import Any

import pytest

from lib.data.config import TokenizeParams
from lib.params import ParamsError, parse_params
from tests.data.texts import TINY_PARAMS

EMBEDDED: dict[str, Any] = {"source": "embedded"}
SHARDS: dict[str, Any] = {"source": "shards", "val_fraction": None, "min_document_bytes": 0, "tokenizer": "a.model"}
HUB: dict[str, Any] = {"source": "hub", "path": "data/README.md", "val_fraction": None, "min_document_bytes": 0}
SEPARATE: dict[str, Any] = {"val_fraction": None, "val_path": "v.jsonl", "heldout_fraction": None, "heldout_path": "h.jsonl"}
DOCUMENTS: dict[str, Any] = {"hub": TINY_PARAMS["hub"] | {"start": "documents"}}


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": "web"}, "tokenize.source: expected embedded, jsonl, shards or hub"),
    ({"heldout_fraction": 0.5, "val_fraction": 0.5}, "heldout_fraction: expected less than 1 - val_fraction = 0.5.*found 0.5"),
    ({"val_fraction": 0.0}, "tokenize.val_fraction: expected a number above 0"),
    ({"packages": ["numpy", "numpy"]}, "packages: expected each distribution once"),
    ({"vocab_size": 260}, "tokenize.vocab_size: expected a number above 260"),
    ({"vocab_size": 65537}, "tokenize.vocab_size: .*65536"),
    ({"shard_tokens": 2**31}, "tokenize.shard_tokens: .*2147483648"),
    ({"tokenizer": ""}, "tokenize.tokenizer: expected text of 1 or more characters"),
    ({"hub": TINY_PARAMS["hub"] | {"train_shards": 0}}, "tokenize.hub.train_shards: expected a number above 0"),
    ({"hub": TINY_PARAMS["hub"] | {"start": "middle"}}, "tokenize.hub.start: expected shards or documents"),
    ({"val_documents": 5}, "tokenize.val_documents: expected exactly one of val_fraction, val_documents and val_path.*found 0.2, 5 and"),
    ({"val_fraction": None}, "tokenize.val_documents: expected exactly one of .*found None, None and"),
    (EMBEDDED | {"val_documents": 5}, "tokenize.val_documents: expected null for source embedded.*found 5"),
    (EMBEDDED | {"val_fraction": None}, "tokenize.val_documents: expected exactly one of"),
    ({"val_path": "val.jsonl"}, "tokenize.val_documents: expected exactly one of .*found 0.2, None and val.jsonl"),
    ({"heldout_path": "heldout.jsonl"}, "tokenize.heldout_fraction: expected a fraction, or null and a heldout_path, found 0.2 and"),
    ({"heldout_fraction": None}, "tokenize.heldout_fraction: expected a fraction, or null and a heldout_path, found None and"),
    (SHARDS | {"val_path": "val.jsonl"}, "tokenize.val_path: expected data/README.md, which is none.*found val.jsonl"),
    (SHARDS | {"val_fraction": 0.2}, "tokenize.val_fraction: expected null.*found 0.2"),
    (SHARDS | {"val_documents": 5}, "tokenize.val_documents: expected null.*found 5"),
    (SHARDS | {"tokenizer": None}, "tokenize.tokenizer: expected the SentencePiece .model file that made the shards, found null"),
    (SHARDS | {"min_document_bytes": 9}, "tokenize.min_document_bytes: expected 0.*found 9"),
    (HUB | {"tokenizer": "a.model"}, "tokenize.tokenizer: expected null.*found a.model"),
    (HUB | {"path": "data"}, "tokenize.path: expected data/README.md.*found data"),
    (HUB | {"val_documents": 5}, "tokenize.val_documents: expected null"),
    (HUB | {"min_document_bytes": 9}, "tokenize.min_document_bytes: expected 0"),
    (HUB | DOCUMENTS, "tokenize.val_documents: expected exactly one"),
])
def test_bad_values_name_their_key(changes: dict[str, Any], message: str) -> None:
    parse_params(TINY_PARAMS, TokenizeParams, "tokenize.")
    with pytest.raises(ParamsError, match=message):
        parse_params(TINY_PARAMS | changes, TokenizeParams, "tokenize.")


@pytest.mark.parametrize("changes", [
    EMBEDDED, SHARDS, HUB, SEPARATE, EMBEDDED | SEPARATE, HUB | DOCUMENTS | SEPARATE,
    {"val_fraction": None, "val_documents": 5}, HUB | DOCUMENTS | {"val_documents": 5},
    HUB | DOCUMENTS | {"val_fraction": 0.2, "min_document_bytes": 9},
])
def test_each_source_can_be_used(changes: dict[str, Any]) -> None:
    parse_params(TINY_PARAMS | changes, TokenizeParams, "tokenize.")
