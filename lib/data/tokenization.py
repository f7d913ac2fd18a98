"""From documents to shards: provides the tokenizer, encodes every document once and checks the bytes that its tokens stand for."""

import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lib.artifacts.files import write_bytes
from lib.artifacts.tokens import SPLITS, SplitWriter, Tokens
from lib.data.accounting import check_accounting, describe_text
from lib.data.config import ExpectParams, TokenizeParams
from lib.data.corpus import LONE_SURROGATE, Batch, Selection, ShardSource, Source, examine
from lib.data.encoder import decode_documents, encode_documents
from lib.data.resharding import write_shards
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.data.workers import map_in_order
from lib.errors import UserError
from lib.progress import Progress

BYTES_PER_PROCESS = 8_000_000  # of files, to make up for the half second in which a process starts


class EncodedDocument(NamedTuple):
    """One document of a batch; with a lone surrogate, which cannot be encoded, as if it were empty.

    Attributes:
        flaw, digest: as in `Examined`.
        place: where it is, for errors.
        num_tokens: BOS included.
        raw_bytes: UTF-8 bytes of its text.
        accounted_bytes: bytes of its tokens by the tokenizer's accounting.
        reproduced: whether its tokens decode to its text.
    """

    flaw: str | None
    digest: bytes
    place: str
    num_tokens: int
    raw_bytes: int
    accounted_bytes: int
    reproduced: bool


class EncodedBatch(NamedTuple):
    """The documents of a batch in order, and all their tokens, (n,) uint16; `split` as `Source.batches` gives it."""

    split: str | None
    size_bytes: int
    documents: list[EncodedDocument]
    tokens: Tokens


@dataclass(frozen=True)
class BatchEncoder:
    """What a process does with a batch: all that needs no other documents."""

    tokenizer: Tokenizer
    min_document_bytes: int
    num_threads: int

    def __call__(self, given: tuple[str | None, Batch]) -> EncodedBatch:
        """Parse, examine, encode, count and decode.

        Raises:
            ValueError: a batch that holds something else than documents.
        """
        split, batch = given
        examined = [examine(text, self.min_document_bytes) for text in batch.texts()]
        texts = ["" if document.flaw == LONE_SURROGATE else document.text for document in examined]
        tokens = list(encode_documents(self.tokenizer, texts, self.num_threads))
        documents = [
            EncodedDocument(flaw, digest, place, num_tokens=len(ids), raw_bytes=len(text.encode()),
                            accounted_bytes=int(self.tokenizer.target_bytes(ids).sum()), reproduced=text == decoded)
            for (_, flaw, digest), place, text, ids, decoded in zip(
                examined, batch.places(), texts, tokens, decode_documents(self.tokenizer, [ids.tolist() for ids in tokens]), strict=True)]
        return EncodedBatch(split, batch.size_bytes, documents, np.concatenate([np.empty(0, np.uint16), *tokens]))


def provide_tokenizer(params: TokenizeParams, source: Source | ShardSource, path: Path) -> Tokenizer:
    """Train a tokenizer on the source's training documents, or copy the given one byte for byte, to `path`; and load it.

    Raises:
        ValueError: a vocabulary size that cannot be reached, or that differs from the given tokenizer's.
        ArtifactError: a given tokenizer that is missing or refused by `Tokenizer`.
    """
    given = source.tokenizer
    if given is None:
        assert isinstance(source, Source)
        model = train_tokenizer(_training_texts(params, source), params.vocab_size, params.tokenizer_training_bytes,
                                case_transform=params.case_transform)
        write_bytes(path, model)
        return load_tokenizer(path)
    tokenizer = load_tokenizer(given)
    if tokenizer.vocab_size != params.vocab_size:
        raise UserError(f"tokenize.vocab_size: expected the {tokenizer.vocab_size} pieces of {given}, found {params.vocab_size}")
    if tokenizer.case_transform != params.case_transform:
        raise UserError(f"tokenize.case_transform: expected {str(tokenizer.case_transform).lower()}, because {given} has "
                        f"{'' if tokenizer.case_transform else 'not '}all case operators as user-defined pieces, found "
                        f"{str(params.case_transform).lower()}; change it, or use another tokenizer")
    write_bytes(path, given.read_bytes())
    return tokenizer


def write_splits(params: TokenizeParams, source: Source | ShardSource, tokenizer: Tokenizer, folder: Path,
                 num_processes: int | None = None) -> dict[str, Any]:
    """Write every document of the source to the shards of its split, encoded here unless it comes from shards.

    Args:
        params: the section ``tokenize``.
        source: the documents.
        tokenizer: what encodes them, or did.
        folder: gets a folder for each split.
        num_processes: how many encode or decode, with the same result; None = one for each core, if the source is large enough for that.

    Returns:
        What each split holds, which documents were left out, and the evidence that no two splits share a document.

    Raises:
        ValueError: a split without documents; tokens that stand for more bytes than the text has; a lossless tokenizer that does not
            reproduce a document or its bytes.
        ArtifactError: shards that are not sound, or not of this tokenizer.
    """
    if isinstance(source, ShardSource):
        return write_shards(params, source.shards, tokenizer, folder, num_processes or os.cpu_count() or 1)
    writers = {split: SplitWriter(folder / split, params.vocab_size, params.shard_tokens) for split in SPLITS}
    selection, reproduced = Selection(params, tokenizer.lossless), Counter[str]()
    if num_processes is None:
        num_processes = max(1, min(os.cpu_count() or 1, source.size_bytes // BYTES_PER_PROCESS))
    encoder = BatchEncoder(tokenizer, params.min_document_bytes, num_threads=-1 if num_processes == 1 else 1)
    num_documents = num_tokens = 0
    with Progress("encode", source.size_bytes, "B") as progress:
        for batch in map_in_order(encoder, source.batches(), num_processes):
            end = 0
            for document in batch.documents:
                start, end = end, end + document.num_tokens
                if split := selection.assign(document.flaw, document.digest, document.place, batch.split):
                    _check_document(document, split, tokenizer)
                    reproduced[split] += document.reproduced
                    writers[split].add(batch.tokens[start:end], document.raw_bytes, document.accounted_bytes)
            num_documents, num_tokens = num_documents + len(batch.documents), num_tokens + len(batch.tokens)
            progress.update(batch.size_bytes, documents=f"{num_documents:,}", tokens=f"{num_tokens:,}")
    for split in SPLITS:
        if not selection.keys[split]:
            raise UserError(f"tokenize: expected documents in every split, found none in {split} (kept {_sizes(selection)}; left out "
                            f"{dict(selection.skipped)}); enlarge the corpus, raise the split's fraction, add to "
                            "its file or lower min_document_bytes")
    check_accounting(writers, tokenizer)
    return {
        "splits": {split: {**writers[split].close(), "distinct_documents": len(selection.keys[split]),
                           "reproduced_documents": reproduced[split]} for split in SPLITS},
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
        "tokenizer": {"trained": source.tokenizer is None, "case_transform": tokenizer.case_transform,
                      "lossless": tokenizer.lossless, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
        **splits,
    }
    _check_expectations(params.expect, manifest)
    return manifest


def summarize(manifest: dict[str, Any]) -> dict[str, Any]:
    """The stage's metrics: whether capitals are operators, whether the validation text is reproduced; documents, tokens, bytes and bytes
    per target token of each split."""
    splits = {split: {**{key: values[key] for key in ("documents", "tokens", "raw_bytes", "accounted_bytes")},
                      "bytes_per_token": values["accounted_bytes"] / (values["tokens"] - 1)}
              for split, values in manifest["splits"].items()}
    return {"case_transform": manifest["tokenizer"]["case_transform"], "text": describe_text(manifest), **splits}


def _check_expectations(expect: ExpectParams, manifest: dict[str, Any]) -> None:
    val, sidecar = manifest["splits"]["val"], manifest.get("byte_sidecar")
    num_targets, num_bytes = val["tokens"] - 1, val["accounted_bytes"]
    facts = {"val_documents": val["documents"], "val_targets": num_targets, "val_bytes": num_bytes,
             "val_bytes_per_token": num_bytes / num_targets, "val_sidecar_bytes_per_token": sidecar and sidecar["bytes"] / num_targets}
    for key, found in facts.items():
        expected = getattr(expect, key)
        if expected is not None and (found is None or abs(found - expected) > _last_digit(expected)):
            raise UserError(f"tokenize.expect.{key}: expected {expected}, found {'no side-cars' if found is None else found}: not the "
                            "validation documents or not the tokenizer that the number is known of; correct the section tokenize, or set "
                            "the key to null")


def _last_digit(number: float) -> float:
    """One unit of the last digit that a number is given with; 0 for whole numbers."""
    return 0 if isinstance(number, int) else 10.0 ** int(Decimal(str(number)).as_tuple().exponent)


def _check_document(document: EncodedDocument, split: str, tokenizer: Tokenizer) -> None:
    if tokenizer.lossless and (document.accounted_bytes != document.raw_bytes or not document.reproduced):
        found = f"{document.accounted_bytes} bytes" if document.reproduced else "another text"
        raise UserError("tokenize.tokenizer: expected tokens that stand for the text of every document, because the normalizer keeps it, "
                        f"found {found} for the {split} document of {document.raw_bytes} bytes, {document.place}; give another tokenizer, "
                        "or set it to null")


def _training_texts(params: TokenizeParams, source: Source) -> Iterator[str]:
    selection = Selection(params)
    for given, batch in source.batches():
        for untrimmed, place in zip(batch.texts(), batch.places(), strict=True):
            text, flaw, digest = examine(untrimmed, params.min_document_bytes)
            if selection.assign(flaw, digest, place, given) == "train":
                yield text


def _sizes(selection: Selection) -> str:
    return ", ".join(f"{len(keys)} {split}" for split, keys in selection.keys.items())
