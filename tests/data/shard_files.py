"""Token shards as they are published, made by hand."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from lib.data.encoder import encode_documents
from lib.data.tokenizer import Tokenizer


def shard_bytes(tokens: Sequence[int]) -> bytes:
    """The content of a shard file."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.array(tokens, "<u2").tobytes()


def tokens_of(tokenizer: Tokenizer, texts: Iterable[str]) -> list[int]:
    """Documents, each with BOS in front, one after the other."""
    return [token for tokens in encode_documents(tokenizer, list(texts)) for token in tokens.tolist()]


def write_shards(folder: Path, split: str, tokens: Sequence[int], shard_tokens: int) -> list[Path]:
    """Cut tokens into shard files, wherever that is."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for start in range(0, len(tokens), shard_tokens):
        paths.append(folder / f"web_{split}_{len(paths):06d}.bin")
        paths[-1].write_bytes(shard_bytes(tokens[start:start + shard_tokens]))
    return paths
