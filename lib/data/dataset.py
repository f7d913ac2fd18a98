"""The tokens in a folder: ``artifacts/tokenize`` of this project, or shards as the challenge publishes them, without a description.

Published shards are told by their names, ``fineweb_train_000000.bin`` and ``fineweb_val_000000.bin``, and have no held-out documents: the
last ones of the last training shard become that. What no ``split.json`` states - documents and bytes - is 0, or counted where it is needed.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import SPLIT_FILE, Split, load_shards, load_split
from lib.data.tokenizer import Tokenizer
from lib.errors import UserError


def load_training(folder: Path, tokenizer: Tokenizer, heldout_tokens: int) -> tuple[Split, Split]:
    """The training text of a folder, and the held-out documents.

    Args:
        folder: with folders ``train`` and ``heldout``, or with published shards.
        tokenizer: the one that they were made with.
        heldout_tokens: tokens that published shards hold out, at least; whole documents.

    Raises:
        ArtifactError: no shards, or some that are damaged or of another vocabulary.
        UserError: the last published training shard is too short.
    """
    if (folder / "train" / SPLIT_FILE).exists():
        return load_split(folder / "train", tokenizer.vocab_size), load_split(folder / "heldout", tokenizer.vocab_size)
    paths = find_split_shards(folder, "train")
    *shards, last = load_shards(paths, tokenizer.vocab_size)
    starts = np.flatnonzero(last[:max(0, len(last) - heldout_tokens) + 1] == tokenizer.bos_id)
    if not len(starts) or starts[-1] == 0:
        raise UserError(f"{paths[-1]}: expected documents before the last {heldout_tokens} tokens (quantize.heldout_tokens), which are "
                        f"held out, found {len(last)} tokens in all; lower it, or take longer shards")
    parts = (*shards, last[:starts[-1]]), (last[starts[-1]:],)
    text, heldout = (Split(folder, part, 0, 0, 0, tokenizer.vocab_size) for part in parts)
    return text, heldout


def load_validation(folder: Path, tokenizer: Tokenizer) -> Split:
    """The validation text of a folder; arguments and errors as of `load_training`, but for `heldout_tokens`."""
    if (folder / "val" / SPLIT_FILE).exists():
        return load_split(folder / "val", tokenizer.vocab_size)
    split = Split(folder, load_shards(find_split_shards(folder, "val"), tokenizer.vocab_size), 0, 0, 0, tokenizer.vocab_size)
    tokens = split.tokens()
    num_bytes = int(tokenizer.target_bytes(tokens).sum())
    return replace(split, num_documents=int((tokens == tokenizer.bos_id).sum()), raw_bytes=num_bytes, accounted_bytes=num_bytes)


def check_names(folder: Path) -> None:
    """See that a folder has training and validation text, by the names of files alone.

    Raises:
        ArtifactError: it has not.
    """
    for split in ("train", "val"):
        if not (folder / split / SPLIT_FILE).exists():
            find_split_shards(folder, split)


def find_split_shards(folder: Path, split: str) -> list[Path]:
    """Published shards of a split, ``train`` or ``val``, in the order of their names.

    Raises:
        ArtifactError: there are none.
    """
    paths = sorted(folder.glob(pattern := f"*{split}_[0-9]*.bin"))
    if not paths:
        raise ArtifactError(f"{folder}: expected shards {pattern}, or {split}/{SPLIT_FILE}, found neither")
    return paths
