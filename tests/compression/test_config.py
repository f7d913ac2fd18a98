from typing import get_args

import pytest

from lib.compression.coding import CODECS
from lib.compression.config import CompressParams
from lib.params import ParamsError, parse_params


def test_codec_names_are_the_registry() -> None:
    assert set(get_args(CompressParams.model_fields["codec"].annotation)) == CODECS.keys()


def test_rejects_unknown_codec_and_level() -> None:
    with pytest.raises(ParamsError, match=r"compress\.codec: .*\n.*compress\.level: "):
        parse_params({"codec": "zlib", "level": 23, "limit_bytes": 1}, CompressParams, "compress.")
