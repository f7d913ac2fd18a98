from typing import Any

import pytest

from lib.data.config import TokenizeParams
from lib.params import ParamsError, parse_params
from tests.data.texts import TINY_PARAMS


@pytest.mark.parametrize(("changes", "message"), [
    ({"source": "web"}, "tokenize.source: .*'embedded', 'jsonl', 'shards' or 'hub'"),
    ({"heldout_fraction": 0.5, "val_fraction": 0.5}, "heldout_fraction: expected less than 1 - val_fraction = 0.5.*found 0.5"),
    ({"val_fraction": 0.0}, "tokenize.val_fraction: .*greater than 0"),
    ({"packages": ["numpy", "numpy"]}, "packages: expected each distribution once"),
    ({"vocab_size": 260}, "tokenize.vocab_size: .*greater than 260"),
    ({"vocab_size": 65537}, "tokenize.vocab_size: .*65536"),
    ({"shard_tokens": 2**31}, "tokenize.shard_tokens: .*2147483648"),
    ({"tokenizer": ""}, "tokenize.tokenizer: .*at least 1 character"),
])
def test_bad_values_name_their_key(changes: dict[str, Any], message: str) -> None:
    parse_params(TINY_PARAMS, TokenizeParams, "tokenize.")
    with pytest.raises(ParamsError, match=message):
        parse_params(TINY_PARAMS | changes, TokenizeParams, "tokenize.")
