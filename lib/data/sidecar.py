"""Byte side-cars of published validation shards, which say how many bytes each token stands for, against this project's accounting.

None of their numbers is used. They are made from the text, which shards do not have: a token counts what its part of the text takes
before the normalizer and without the operators of the case transform, a character in byte pieces all at its last one. So they agree with
the accounting at every other token and in the sum of every run of byte pieces, except where the normalizer has changed the text.
"""

from dataclasses import dataclass

import numpy as np

from lib.artifacts.files import ArtifactError
from lib.data.shards import Shards, Stream, sidecar_name
from lib.data.tokenizer import SPACE, Tokenizer
from lib.progress import say

SEGMENT_TOKENS = 1 << 20  # compared at a time, and the rest of a document

MAX_DIFFER_FRACTION = 0.05
"""Share of tokens that a normalizer may have changed: 0.6 % by nmt_nfkc on web text; one of other shards differs at most tokens."""

REMEDY = ("name the dataset or the tokenizer that the side-car belongs to; or, to do without it, use tokenize.source: shards with a folder "
          "that has none")


@dataclass(frozen=True)
class SidecarComparison:
    """What came of a comparison over all tokens of the validation shards.

    Attributes:
        bytes: sum of the side-cars.
        accounted_bytes: sum by the accounting of this project.
        differing: tokens, a run of byte pieces as one, with other bytes: 0 where the tokenizer is lossless.
    """

    bytes: int
    accounted_bytes: int
    differing: int


def compare_sidecars(shards: Shards, tokenizer: Tokenizer) -> SidecarComparison | None:
    """Compare the side-cars of all validation shards, and say what came of it; None where they are not complete.

    Args:
        shards: the files; validation shards that begin with BOS and have no token beyond the vocabulary.
        tokenizer: what they were made with.

    Raises:
        ArtifactError: a side-car that is not sound, of another length than its shard, or of other bytes: any, for a lossless tokenizer;
            for others, bytes of BOS or an operator, bytes that differ at too many tokens, or fewer than the accounting in all.
    """
    known = {path.name for path in shards.val_bytes}
    if missing := [path.name for path in shards.val if sidecar_name(path.name) not in known]:
        say(f"tokenize: no byte side-car for {', '.join(missing)}; bytes are counted without a comparison")
        return None
    tokens, sidecars = Stream(shards.val), Stream(shards.val_bytes)
    for shard, sidecar, expected, found in zip(tokens.paths, sidecars.paths, tokens.lengths, sidecars.lengths, strict=True):
        if found != expected:
            raise ArtifactError(f"{sidecar}: expected {expected} numbers, as many as tokens in {shard.name}, found {found}; {REMEDY}")
    totals, start = np.zeros(3, np.int64), 0
    while start < len(tokens):
        end = tokens.find(tokenizer.bos_id, start + SEGMENT_TOKENS)
        totals += _compare_documents(tokens, sidecars, tokenizer, start, end)
        start = end
    theirs, ours, differing = totals.tolist()
    if differing > MAX_DIFFER_FRACTION * len(tokens):
        raise ArtifactError(f"{sidecars.paths[0].parent}: expected byte side-cars of {shards.val[0].name} and the following, found other "
                            f"bytes than by the tokenizer's accounting at {differing} of {len(tokens)} tokens; {REMEDY}")
    if theirs < ours:
        raise ArtifactError(f"{sidecars.paths[0].parent}: expected byte side-cars of at least the {ours:,} bytes that the tokens stand for "
                            f"by the tokenizer's accounting, found {theirs:,}: bits per byte would be too low; {REMEDY}")
    say(f"tokenize: byte side-cars of {theirs:,} bytes, by this project's accounting {ours:,}, which counts; {differing:,} of "
        f"{len(tokens):,} tokens differ")
    return SidecarComparison(theirs, ours, differing)


def _compare_documents(tokens: Stream, sidecars: Stream, tokenizer: Tokenizer, start: int, end: int) -> tuple[int, int, int]:
    """What `SidecarComparison` says, of the whole documents from one position of the streams to another."""
    ids, found = tokens.read(start, end), sidecars.read(start, end).astype(np.int64)
    expected = np.append(0, tokenizer.target_bytes(ids))
    is_byte = np.array([tokenizer.processor.is_byte(i) for i in range(tokenizer.vocab_size)])[ids]
    firsts = np.flatnonzero(~is_byte | ~np.append(False, is_byte[:-1]))  # of every group: a token, or a run of byte pieces
    found_sums, expected_sums = np.add.reduceat(found, firsts), np.add.reduceat(expected, firsts)
    differ = found_sums != expected_sums
    # A space right after BOS has no bytes here, though it may have been in the text.
    wrong = differ & (tokenizer.lossless | ((expected_sums == 0) & (ids[firsts] != tokenizer.processor.piece_to_id(SPACE))))
    if wrong.any():
        group = int(wrong.argmax())
        first, end_of_group = np.append(firsts, len(ids))[group:group + 2].tolist()
        length = end_of_group - first
        what = f"the {length} byte pieces from here" if length > 1 else f"token {ids[first]}"
        raise ArtifactError(f"{sidecars.locate(start + first)}: expected {expected_sums[group]} bytes for {what}, by the tokenizer's "
                            f"accounting, found {found_sums[group]}; {REMEDY}")
    return int(found.sum()), int(expected.sum()), int(differ.sum())
