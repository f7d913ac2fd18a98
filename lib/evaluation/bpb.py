"""From nats per token to bits per byte, the number that is compared. N targets."""

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lib.errors import UserError


class Score(NamedTuple):
    """The score of a token stream.

    Attributes:
        loss: mean nats per token (val_loss of the challenge).
        bpb: bits per byte of text: sum of nats / ln 2 / sum of bytes, both sums over exactly the scored tokens.
        num_tokens: scored tokens.
        num_bytes: UTF-8 bytes that they stand for.
    """

    loss: float
    bpb: float
    num_tokens: int
    num_bytes: int


def make_score(nats: npt.NDArray[np.float32], target_bytes: npt.NDArray[np.int64]) -> Score:
    """Sum up, in fp64.

    Args:
        nats: (N,) loss of each target.
        target_bytes: (N,) bytes of each target.

    Raises:
        ValueError: arrays of different length, or no bytes.
    """
    num_bytes = int(target_bytes.sum())
    if nats.shape != target_bytes.shape or num_bytes < 1:
        raise UserError(f"expected as many losses as targets and at least one byte, found {nats.shape} losses, "
                        f"{target_bytes.shape} targets, {num_bytes} bytes")
    total = float(nats.sum(dtype=np.float64))
    return Score(total / len(nats), total / math.log(2) / num_bytes, len(nats), num_bytes)


def running_bpb(nats: npt.NDArray[np.float32], target_bytes: npt.NDArray[np.int64], num_points: int) -> list[tuple[int, float]]:
    """Bits per byte of the first n targets, for about `num_points` evenly spaced n, the last of them N.

    Args:
        nats: (N,) loss of each target.
        target_bytes: (N,) bytes of each target.
        num_points: points of the curve; fewer where there are fewer targets, or where the first targets have no bytes.

    Returns:
        Pairs of n and bits per byte.
    """
    ends = np.unique(np.linspace(0, len(nats), num_points + 1).round().astype(np.int64))
    total = np.add.reduceat(nats, ends[:-1], dtype=np.float64).cumsum()
    num_bytes = np.add.reduceat(target_bytes, ends[:-1]).cumsum()
    return [(int(n), float(t / math.log(2) / b)) for n, t, b in zip(ends[1:], total, num_bytes, strict=True) if b]


def check_bytes(target_bytes: npt.NDArray[np.int64], accounted_bytes: int, where: str) -> None:
    """Compare the bytes of all targets with what was counted when the text was tokenized.

    Raises:
        ValueError: they differ: tokenizer and shards do not belong together, or the byte accounting is wrong.
    """
    if (found := int(target_bytes.sum())) != accounted_bytes:
        raise UserError(f"{where}: expected {accounted_bytes:,} bytes of text, found {found:,} with this tokenizer; "
                        "`dvc repro -f tokenize` makes shards and tokenizer anew")
