"""From documents to shards: provides the tokenizer, encodes every document once and checks the bytes that its tokens stand for."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.artifacts.files import write_bytes
from lib.artifacts.tokens import SPLITS, SplitWriter
from lib.data.config import ExpectParams, TokenizeParams
from lib.data.corpus import Selection, ShardSource, Source
from lib.data.resharding import write_shards
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.tokenizer_training import train_tokenizer

BYTES_PER_TOKEN_TOLERANCE = 1e-5  # one unit of the last digit that is published

BATCH_CHARACTERS = 1 << 22  # encoded at a time, on all cores


def provide_tokenizer(params: TokenizeParams, source: Source | ShardSource, path: Path) -> Tokenizer:
    """Train a tokenizer on the source's training documents, or copy the given one byte for byte, to `path`; and load it.

    Raises:
        ValueError: a vocabulary size that cannot be reached, or that differs from the given tokenizer's.
        ArtifactError: a given tokenizer that is missing or refused by `Tokenizer`.
    """
    given = source.tokenizer
    if given is None:
        assert isinstance(source, Source)
        documents = Selection(params).select(source.read("sample for the tokenizer"))
        model = train_tokenizer((text for split, text in documents if split == "train"), params.vocab_size, params.tokenizer_training_bytes)
        write_bytes(path, model)
        return load_tokenizer(path)
    tokenizer = load_tokenizer(given)
    if tokenizer.vocab_size != params.vocab_size:
        raise ValueError(f"tokenize.vocab_size: expected the {tokenizer.vocab_size} pieces of {given}, found {params.vocab_size}")
    write_bytes(path, given.read_bytes())
    return tokenizer


def write_splits(params: TokenizeParams, source: Source | ShardSource, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Write every document of the source to the shards of its split, encoded here unless it comes from shards.

    Args:
        params: the section ``tokenize``.
        source: the documents.
        tokenizer: what encodes them, or did.
        folder: gets a folder for each split.

    Returns:
        What each split holds, which documents were left out, and the evidence that no two splits share a document.

    Raises:
        ValueError: a split without documents, or a lossless tokenizer whose bytes are not those of a document.
        ArtifactError: shards that are not sound, or not of this tokenizer.
    """
    if isinstance(source, ShardSource):
        return write_shards(params, source.shards, tokenizer, folder)
    writers = {split: SplitWriter(folder / split, params.vocab_size, params.shard_tokens) for split in SPLITS}
    selection = Selection(params)
    for batch in _batches(selection.select(source.read("encode"))):
        tokens_of_batch = tokenizer.encode_documents([text for _, text in batch])
        for (split, text), tokens in zip(batch, tokens_of_batch, strict=True):
            raw_bytes, accounted_bytes = len(text.encode()), int(tokenizer.target_bytes(tokens).sum())
            if tokenizer.lossless and accounted_bytes != raw_bytes:
                raise ValueError(f"the tokens of the {split} document that starts {text[:60]!r}: expected {raw_bytes} bytes, its UTF-8 "
                                 f"length, found {accounted_bytes}; it contains U+2581, or the tokenizer is not lossless as its normalizer "
                                 "says")
            writers[split].add(tokens, raw_bytes, accounted_bytes)
    for split in SPLITS:
        if not selection.keys[split]:
            raise ValueError(f"tokenize: expected documents in every split, found none in {split} (kept {_sizes(selection)}; left out "
                             f"{dict(selection.skipped)}); enlarge the corpus, raise the split's fraction or lower min_document_bytes")
    return {
        "splits": {split: {**writers[split].close(), "distinct_documents": len(selection.keys[split])} for split in SPLITS},
        "shared_documents": {f"{a} and {b}": len(selection.keys[a] & selection.keys[b]) for a, b in itertools.combinations(SPLITS, 2)},
        "skipped_documents": dict(sorted(selection.skipped.items())),
    }


def make_manifest(params: TokenizeParams, source: Source | ShardSource, tokenizer: Tokenizer, splits: dict[str, Any]) -> dict[str, Any]:
    """What ``manifest.json`` holds: origin of the documents and of the tokenizer, and what `write_splits` returned.

    Raises:
        ValueError: other validation documents than ``tokenize.expect`` states.
    """
    manifest = {
        "source": source.provenance,
        "tokenizer": {"trained": source.tokenizer is None, "lossless": tokenizer.lossless, "vocab_size": tokenizer.vocab_size,
                      "sha256": tokenizer.sha256},
        **splits,
    }
    _check_expectations(params.expect, summarize(manifest)["val"])
    return manifest


def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
    """The stage's metrics: documents, tokens, bytes and bytes per target token of each split."""
    return {split: {**{key: values[key] for key in ("documents", "tokens", "raw_bytes", "accounted_bytes")},
                    "bytes_per_token": values["accounted_bytes"] / (values["tokens"] - 1)}
            for split, values in manifest["splits"].items()}


def _check_expectations(expect: ExpectParams, val: dict[str, Any]) -> None:
    for key, tolerance in (("documents", 0), ("bytes_per_token", BYTES_PER_TOKEN_TOLERANCE)):
        expected = getattr(expect, f"val_{key}")
        if expected is not None and abs(val[key] - expected) > tolerance:
            raise ValueError(f"tokenize.expect.val_{key}: expected {expected}, found {val[key]}: not the validation documents or not the "
                             "tokenizer that the number is known of; correct the section tokenize, or set the key to null")


def _batches(documents: Iterator[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _sizes(selection: Selection) -> str:
    return ", ".join(f"{len(keys)} {split}" for split, keys in selection.keys.items())
