"""Validation text in a folder of shards: a split of this project, or published shards without a description."""

from dataclasses import replace
from pathlib import Path

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import SPLIT_FILE, Split, load_shards, load_split
from lib.data.tokenizer import Tokenizer

SHARDS = "*val_[0-9]*.bin"
"""Names of validation shards, here and in the challenge's data (``fineweb_val_000000.bin``)."""


def load_validation(folder: Path, tokenizer: Tokenizer) -> Split:
    """The validation text of a folder.

    Args:
        folder: with a ``split.json``, or else with files `SHARDS`, which are read in the order of their names. What no ``split.json``
            states - documents and bytes - is then counted from the tokens.
        tokenizer: the one that the shards were made with.

    Raises:
        ArtifactError: no shards, or some that are damaged or of another vocabulary.
    """
    if (folder / SPLIT_FILE).exists():
        return load_split(folder, tokenizer.vocab_size)
    paths = sorted(folder.glob(SHARDS))
    if not paths:
        raise ArtifactError(f"{folder}: expected validation shards {SHARDS}, found none")
    split = Split(folder, load_shards(paths, tokenizer.vocab_size), 0, 0, 0, tokenizer.vocab_size)
    tokens = split.tokens()
    num_bytes = int(tokenizer.target_bytes(tokens).sum())
    return replace(split, num_documents=int((tokens == tokenizer.bos_id).sum()), raw_bytes=num_bytes, accounted_bytes=num_bytes)
