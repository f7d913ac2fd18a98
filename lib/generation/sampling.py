"""Text that a model writes: one token after the other, drawn from its own distribution. V vocabulary."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lib.generation.cache import KeyValueCache


class Sampling(NamedTuple):
    """How tokens are drawn.

    Attributes:
        temperature: that logits are divided by; 0 always takes the most probable token.
        top_p: only the most probable tokens that together have this probability can be drawn (nucleus sampling, arXiv:1904.09751).
        seed: of the draws.
    """

    temperature: float
    top_p: float
    seed: int


def draw_token(logits: npt.NDArray[np.float64], sampling: Sampling, uniform: float) -> int:
    """One token.

    Args:
        logits: (V,).
        sampling: temperature and top-p; where two tokens are as probable, the smaller one comes first.
        uniform: from [0, 1), which decides: it is looked up among the cumulative probabilities, most probable token first.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = np.exp((logits - logits.max()) / sampling.temperature)
    order = np.argsort(-probabilities, kind="stable")
    mass = probabilities[order].cumsum()
    nucleus = mass[:np.searchsorted(mass, sampling.top_p * mass[-1]) + 1]
    return int(order[np.searchsorted(nucleus, uniform * nucleus[-1], side="right")])


def write_tokens(cache: KeyValueCache, prompt: npt.NDArray[np.uint16], bos_id: int, sampling: Sampling,
                 device: torch.device) -> Iterator[int]:
    """Tokens that go on from a prompt, as they are drawn, to the end of the document: until the model draws BOS, which is not given.

    Args:
        cache: of the model, with no text yet.
        prompt: (n,) tokens, BOS first.
        bos_id: the BOS token.
        sampling: how tokens are drawn; the same seed gives the same text.
        device: of the model.
    """
    uniforms = np.random.default_rng(sampling.seed)
    latest = prompt.astype(np.int64)
    while True:
        logits = cache.extend(torch.from_numpy(latest)[None].to(device))[0].double().cpu().numpy()
        token = draw_token(logits, sampling, uniforms.random())
        if token == bos_id:
            return
        yield token
        latest = np.array([token])
