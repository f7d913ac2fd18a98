"""From published token shards to splits: all of the validation shards, and the training documents that are not among them.

Documents are cut at BOS and decoded on all cores, because only their text shows which are the same. Input is read and
output written in pieces, so that memory holds a few numbers for each document and never a shard.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.artifacts.files import ArtifactError
from lib.artifacts.tokens import SPLITS, SplitWriter
from lib.data.accounting import check_accounting
from lib.data.config import TokenizeParams
from lib.data.corpus import ALSO_IN_VAL, KEY_BYTES, normalized_hash, split_of
from lib.data.encoder import decode_documents
from lib.data.roundtrip import Reencoding, reencode, too_many_changed
from lib.data.shards import Shards, Stream
from lib.data.sidecar import compare_sidecars
from lib.data.tokenizer import Tokenizer
from lib.data.workers import map_in_order
from lib.errors import UserError
from lib.progress import Progress

SEGMENT_TOKENS = 1 << 22  # one task of a process: seconds
BATCH_TOKENS = 1 << 18  # decoded at a time; as Python objects they take 10 MB
SAMPLED = 32  # of the training documents, the first of each batch and every so many after it are encoded again, of validation all

DIFFER, CUT_OFF = "bytes of text and tokens differ", "cut off by the last shard"
OUTCOMES = (*SPLITS, ALSO_IN_VAL, DIFFER, CUT_OFF)
"""What becomes of a document: the split that it goes to, or the reason why it is left out."""

REMEDY = "give the tokenizer that made the shards"
MAX_DIFFER_FRACTION = 0.01
"""Share of documents whose text has other bytes than their tokens: all in shards of another tokenizer, none in published ones."""

Keys = npt.NDArray[np.void]
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardDocuments:
    """n consecutive documents of a stream.

    Attributes:
        bounds: (n + 1,) where each starts, and where the last ends.
        keys: (n,) leading `KEY_BYTES` of their normalised hashes.
        raw_bytes: (n,) UTF-8 bytes of their decoded texts.
        accounted_bytes: (n,) bytes of their tokens by the tokenizer's accounting.
        outcomes: (n,) uint8, indices into `OUTCOMES`.
        reencoded: (n,) uint8, values of `lib.data.roundtrip.Reencoding`.
    """

    bounds: Int64s
    keys: Keys
    raw_bytes: Int64s
    accounted_bytes: Int64s
    outcomes: npt.NDArray[np.uint8]
    reencoded: npt.NDArray[np.uint8]


class Reader:
    """Reads documents of a stream and decides what becomes of them.

    Args:
        paths: the shards of the stream.
        tokenizer: what the shards were made with.
        heldout_fraction: fraction of training documents that is held out.
        val_keys: keys of the validation documents, which are left out; None: the stream is that of the validation documents.

    Raises:
        ArtifactError: files that are not sound, or do not begin with a document of this tokenizer.
    """

    def __init__(self, paths: tuple[Path, ...], tokenizer: Tokenizer, heldout_fraction: float, val_keys: frozenset[bytes] | None) -> None:
        self.stream = Stream(paths)
        self._tokenizer, self._heldout_fraction, self._val_keys = tokenizer, heldout_fraction, val_keys
        if (first := self.stream.read(0, 1)[0]) != tokenizer.bos_id:
            raise ArtifactError(f"{self.stream.locate(0)}: expected the BOS token {tokenizer.bos_id}, which starts every document, found "
                                f"{first}; start with the first shard, and give the tokenizer that made the shards")

    def __call__(self, segment: tuple[int, int]) -> ShardDocuments:
        """The documents that start from the first position of a segment to the last, which is excluded, to their ends.

        Raises:
            ArtifactError: tokens beyond the vocabulary; a validation document whose text is encoded in another way, or has other bytes
                than its tokens where the tokenizer is lossless.
        """
        start, stop = segment
        tokens = self.stream.read(start, stop)
        if int(tokens.max()) >= self._tokenizer.vocab_size:
            where = self.stream.locate(start + int(tokens.argmax()))
            raise ArtifactError(f"{where}: expected tokens below {self._tokenizer.vocab_size}, the vocabulary of the tokenizer, found "
                                f"{tokens.max()}; give the tokenizer that made the shards")
        starts = start + np.flatnonzero(tokens == self._tokenizer.bos_id)
        end = self.stream.find(self._tokenizer.bos_id, stop) if len(starts) else start
        bounds = np.append(starts, end).astype(np.int64)
        keys, raw_bytes, accounted_bytes = bytearray(), [], [np.zeros(0, np.int64)]
        reencoded = np.full(len(starts), Reencoding.untried, np.uint8)
        for first, last in _batches(bounds):
            tokens = self.stream.read(int(bounds[first]), int(bounds[last]))
            cuts = bounds[first:last + 1] - bounds[first]
            accounted_bytes.append(np.add.reduceat(np.append(0, self._tokenizer.target_bytes(tokens)), cuts[:-1]))
            parts = [tokens[a:b] for a, b in itertools.pairwise(cuts.tolist())]
            texts = decode_documents(self._tokenizer, [part.tolist() for part in parts])
            step = 1 if self._val_keys is None else SAMPLED
            reencoded[first:last:step] = reencode(self._tokenizer, parts[::step], texts[::step], may_be_cut=(
                int(bounds[last]) == len(self.stream) and (len(parts) - 1) % step == 0))
            for text in texts:
                keys += normalized_hash(text)[:KEY_BYTES]
                raw_bytes.append(len(text.encode()))
        documents = ShardDocuments(bounds, np.frombuffer(bytes(keys), f"V{KEY_BYTES}"), np.array(raw_bytes, np.int64),
                              np.concatenate(accounted_bytes), np.full(len(starts), OUTCOMES.index("val"), np.uint8), reencoded)
        self._judge(documents)
        return documents

    def _judge(self, documents: ShardDocuments) -> None:
        differ = np.flatnonzero(documents.raw_bytes != documents.accounted_bytes)
        if self._val_keys is None:
            if len(others := np.flatnonzero(documents.reencoded == Reencoding.other)):
                raise ArtifactError(f"{self.stream.locate(int(documents.bounds[others[0]]))}: expected a document whose text, decoded and "
                                    f"encoded again, gives the same tokens, found other tokens; {REMEDY}")
            if len(differ) and self._tokenizer.lossless:
                raise ArtifactError(f"{self.stream.locate(int(documents.bounds[differ[0]]))}: expected a document of "
                                    f"{documents.accounted_bytes[differ[0]]} bytes by the tokenizer's accounting, found "
                                    f"{documents.raw_bytes[differ[0]]} in its decoded text; give the tokenizer that made the shards")
            return
        for i, key in enumerate(documents.keys.tolist()):
            documents.outcomes[i] = OUTCOMES.index(ALSO_IN_VAL if key in self._val_keys else split_of(key, self._heldout_fraction, 0))
        documents.outcomes[differ] = OUTCOMES.index(DIFFER)
        if len(documents.outcomes) and documents.bounds[-1] == len(self.stream):
            documents.outcomes[-1] = OUTCOMES.index(CUT_OFF)


def write_shards(params: TokenizeParams, shards: Shards, tokenizer: Tokenizer, folder: Path, num_processes: int) -> dict[str, Any]:
    """Write the splits of a published dataset.

    Validation is the validation shards as they are: every document, in order, repetitions too. Of the training documents are left
    out: those that are also in the validation shards, but for white space and case; those whose text has other bytes than their
    tokens; and the last, which the next shard may go on with. Repetitions among the others stay, as published.

    Args:
        params: the section ``tokenize``.
        shards: the files.
        tokenizer: what they were made with.
        folder: gets a folder for each split.
        num_processes: processes that decode.

    Returns:
        As `lib.data.tokenization.write_splits`; and what came of comparing the byte side-cars, None without them.

    Raises:
        ArtifactError: files that are not sound, or not of this tokenizer; or as `compare_sidecars`.
        ValueError: a split without documents, or whose tokens stand for more bytes than its text has.
    """
    writers = {split: SplitWriter(folder / split, params.vocab_size, params.shard_tokens) for split in SPLITS}
    skipped: Counter[str] = Counter()
    keys: dict[str, list[Keys]] = {split: [np.zeros(0, f"V{KEY_BYTES}")] for split in SPLITS}
    val_keys = comparison = None
    for description, paths in (("validation shards", shards.val), ("training shards", shards.train)):
        reader = Reader(paths, tokenizer, params.heldout_fraction or 0, val_keys)
        for documents in _read(reader, num_processes, description):
            for outcome, first, last in _runs(documents.outcomes):
                if outcome not in writers:
                    skipped[outcome] += last - first
                    continue
                keys[outcome].append(documents.keys[first:last])
                tokens = reader.stream.read(int(documents.bounds[first]), int(documents.bounds[last]))
                writers[outcome].add(tokens, int(documents.raw_bytes[first:last].sum()), int(documents.accounted_bytes[first:last].sum()),
                                     num_documents=last - first)
        if val_keys is None:
            comparison = compare_sidecars(shards, tokenizer)
            val_keys = frozenset(key for part in keys["val"] for key in part.tolist())
    distinct = {split: np.unique(np.concatenate(keys[split])) for split in SPLITS}
    for split in SPLITS:
        if not len(distinct[split]):
            raise UserError(f"tokenize: expected documents in every split, found none in {split} (left out: {dict(skipped)}); "
                            "take more shards, or raise tokenize.heldout_fraction")
    check_accounting(writers, tokenizer)
    return {
        "splits": {split: {**writers[split].close(), "distinct_documents": len(distinct[split]), "reproduced_documents": None}
                   for split in SPLITS},
        "shared_documents": {f"{a} and {b}": len(np.intersect1d(distinct[a], distinct[b])) for a, b in itertools.combinations(SPLITS, 2)},
        "skipped_documents": dict(sorted(skipped.items())),
        "byte_sidecar": None if comparison is None else asdict(comparison),
    }


def _read(reader: Reader, num_processes: int, description: str) -> Iterator[ShardDocuments]:
    """All documents of the reader's stream in order."""
    stream = reader.stream
    segments = [(start, min(start + SEGMENT_TOKENS, len(stream))) for start in range(0, len(stream), SEGMENT_TOKENS)]
    num_documents = num_differ = 0
    counts = np.zeros(len(Reencoding), np.int64)
    with Progress(description, len(stream), "token") as progress:
        for (start, stop), documents in zip(segments, map_in_order(reader, segments, min(num_processes, len(segments))), strict=True):
            num_documents += len(documents.outcomes)
            num_differ += int((documents.raw_bytes != documents.accounted_bytes).sum())
            counts += np.bincount(documents.reencoded, minlength=len(Reencoding))
            yield documents
            progress.update(stop - start, documents=num_documents)
    if num_differ > max(1, MAX_DIFFER_FRACTION * num_documents):
        raise ArtifactError(f"{stream.paths[0].parent}: expected documents whose decoded text has as many bytes as their tokens stand for, "
                            f"found {num_differ} of {num_documents} others; {REMEDY}")
    num_tried = int(counts.sum() - counts[Reencoding.untried])
    num_other = int(counts[Reencoding.other])
    if num_other > MAX_DIFFER_FRACTION * num_tried or too_many_changed(int(counts[Reencoding.changed]), num_tried):
        raise ArtifactError(f"{stream.paths[0].parent}: expected documents whose text, decoded and encoded again, gives the same tokens, "
                            f"found others in {num_other + counts[Reencoding.changed]} of {num_tried} {description}; {REMEDY}")


def _batches(bounds: Int64s) -> Iterator[tuple[int, int]]:
    """First and last (exclusive) document of consecutive groups with at most `BATCH_TOKENS`, or one document."""
    first = 0
    while first < len(bounds) - 1:
        last = max(int(np.searchsorted(bounds, bounds[first] + BATCH_TOKENS, side="right")) - 1, first + 1)
        yield first, last
        first = last


def _runs(outcomes: npt.NDArray[np.uint8]) -> Iterator[tuple[str, int, int]]:
    """Each outcome with the first and last (exclusive) of consecutive documents that share it."""
    cuts = [0, *(np.flatnonzero(np.diff(outcomes)) + 1).tolist(), len(outcomes)]
    return ((OUTCOMES[outcomes[first]], first, last) for first, last in itertools.pairwise(cuts) if first < last)
