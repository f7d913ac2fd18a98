"""N-gram tilt: where a long context has come before and one token nearly always followed, that token is made likelier.

The distribution stays one: p'(a) = p(a) e^(b [a = h]) / (1 + p(h) (e^b - 1)) with hint h and boost b (#2135, with one length of context).
Only scores are tilted, not what is trained on. Shapes: N targets, B rows, P targets of a row, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from lib.evaluation.config import TiltParams

NO_HINT = -1
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, its bits without a pattern: 2^64 over the golden ratio

AnyTokens = npt.NDArray[np.integer]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Hints(NamedTuple):
    """What is made likelier at every target, and by how much.

    Attributes:
        tokens: (N,) int32, `NO_HINT` where nothing is.
        boosts: (N,) fp32, 0 there.
    """

    tokens: npt.NDArray[np.int32]
    boosts: npt.NDArray[np.float32]


def find_hints(tokens: AnyTokens, params: TiltParams) -> Hints:
    """The hint of every target and its boost: of the longest n-grams of ``evaluate.tilt.boosts`` that have one.

    Args:
        tokens: (N+1,) integers of 16 bits.
        params: the section ``evaluate.tilt``.
    """
    hints = Hints(np.full(len(tokens) - 1, NO_HINT, np.int32), np.zeros(len(tokens) - 1, np.float32))
    for order, boost in params.boosts:
        found = follow_ngrams(tokens, order, params.threshold)
        new = (hints.tokens == NO_HINT) & (found != NO_HINT)
        hints.tokens[new], hints.boosts[new] = found[new], boost
    return hints


def follow_ngrams(tokens: AnyTokens, num_tokens: int, threshold: float) -> npt.NDArray[np.int32]:
    """The hint of every target: what a pass from left to right expects that has counted which tokens followed each context.

    The context is the last `num_tokens` - 1 tokens, whichever documents they belong to; there is no hint before so many. Before a target is
    counted, its hint is the token that first reached the largest count of its context, if that is `threshold` of all at least. So target
    i's depends on tokens 0 .. i alone, none of which is the target.

    The pass is made by sorting, in 35 bytes per token, up to 110 where most contexts repeat. Should two contexts have one hash, they may
    lose counts, nothing else.

    Args:
        tokens: (N+1,) integers of 16 bits.
        num_tokens: length of the n-grams, which end with the target.
        threshold: see above.

    Returns:
        (N,) int32, `NO_HINT` where there is none.
    """
    length, num_targets = num_tokens - 1, len(tokens) - 1
    hints = np.full(num_targets, NO_HINT, np.int32)
    keys = np.zeros(max(0, num_targets + 1 - length), np.uint64)  # context n is tokens n .. n + length - 1
    for first in range(length):
        keys *= MULTIPLIER
        keys += tokens[first:first + len(keys)].astype(np.uint64)
    order = np.argsort(keys, kind="stable")  # equal contexts side by side, in the order of the stream
    begins = np.ones(len(keys) + 1, np.bool_)
    begins[1:-1] = np.diff(keys[order]) != 0
    repeated = ~(begins[:-1] & begins[1:])
    context, begins = order[repeated], begins[:-1][repeated]
    for token in range(length):
        begins[1:] |= tokens[context[1:] + token] != tokens[context[:-1] + token]
    following = tokens[context + length].astype(np.int64)
    group = np.cumsum(begins)
    pair = group << 16 | following
    order = np.argsort(pair, kind="stable")
    count = np.empty_like(pair)  # how often the following token has followed, this time included
    count[order] = 1 + _place_in_run(np.diff(pair[order], prepend=-1) != 0)
    best = np.maximum.accumulate(count + group * len(group)) - group * len(group)
    leads = begins | (np.diff(best, prepend=0) > 0)
    leader = following[np.maximum.accumulate(np.where(leads, np.arange(len(leads)), 0))]
    total = _place_in_run(begins)  # how often the context has come before
    later = np.flatnonzero(total)
    hinted = later[best[later - 1] / total[later] >= threshold]
    hints[context[hinted] + length - 1] = leader[hinted - 1]
    return hints


def _place_in_run(begins: Flags) -> Integers:
    """How many come before each in its run; runs begin at the flags, the first of which is set."""
    number = np.arange(len(begins))
    place: Integers = number - np.maximum.accumulate(np.where(begins, number, 0))
    return place


class Tilt(NamedTuple):
    """The hints of a stream, and what they are worth.

    Attributes:
        hints: (N+1,) int32 on the device, `NO_HINT` where there is none, as for the target N, which belongs to nothing.
        boosts: (N+1,) fp32, 0 where there is none.
        hits: (N+1,) bool, whether the target is the hinted token.
    """

    hints: Tensor
    boosts: Tensor
    hits: Tensor

    @classmethod
    def of(cls, stream: Tensor, params: TiltParams | None) -> "Tilt | None":
        """The tilt of a stream (N+1,) on its device; None without `params`."""
        if params is None:
            return None
        hints, boosts = (pad(torch.from_numpy(found), (0, 1), value=nothing).to(stream.device)
                         for found, nothing in zip(find_hints(stream.cpu().numpy(), params), (NO_HINT, 0), strict=True))
        return cls(hints, boosts, hints == pad(stream[1:], (0, 1)))

    def losses(self, nats: Tensor, targets: Tensor) -> Tensor:
        """Losses (B, P) of `targets` (B, P) after the tilt, from `nats` (2, B, P) of the targets and of their hints before it."""
        boost = self.boosts[targets]
        return nats[0] - boost * self.hits[targets] + torch.log1p(torch.exp(-nats[1]) * torch.expm1(boost))

    def distribution(self, log_probabilities: Tensor, target: int) -> Tensor:
        """The distribution (V,) of a target after the tilt, from that before it, as logarithms."""
        if (hint := int(self.hints[target])) == NO_HINT:
            return log_probabilities
        tilted = log_probabilities.clone()
        tilted[hint] += self.boosts[target]
        return tilted.log_softmax(-1)
