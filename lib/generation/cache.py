"""A key-value cache: the model's own forward pass for the latest tokens alone, with the keys and values of earlier ones at hand.

The cache is an attention kernel. It is handed queries, keys and values layer by layer, adds what it has kept of earlier calls, and turns
them to the place that they have in the text. What a token takes from the embeddings of those before it (`OVERLAP`) is computed again.

Shapes: B batch, T tokens, P attending positions, L kept and new keys, H query heads, K key/value heads, E head dimension, V vocabulary.
"""

import copy
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.errors import UserError
from lib.model.attention import Rotation, make_rotation, rotate
from lib.model.gpt import GPT
from lib.model.sdpa import Attend, Kernel, Sight

OVERLAP = 2
"""Tokens before the new ones that the model is given again: the smear gate looks one back, at an embedding whose bigram looks one more."""


class KeyValueCache:
    """The logits after a text that grows, as ``GPT.logits(text, attention_tokens=...)`` gives them, at the cost of what is new.

    Every position attends to the latest `attention_tokens` tokens, itself included; keys that none will see are dropped, so that a text may
    grow without end. NTK scaling, which depends on the distance that attention spans, never sets in.

    Args:
        model: the model that computes; it stays as it is.
        attention_tokens: how many tokens a position attends to at most.

    Raises:
        UserError: `attention_tokens` is above the length that the model's rotary embedding was trained for; keys that are kept would
            have to turn anew with every token.
    """

    def __init__(self, model: GPT, attention_tokens: int) -> None:
        trained = model.params.rope_trained_tokens
        if attention_tokens < 1 or (trained and attention_tokens > trained):
            raise UserError(f"context: expected 1 to {trained or 'any number of'} tokens, the model's rope_trained_tokens, "
                            f"found {attention_tokens}; take fewer")
        self._model = copy.copy(model)  # with the same parameters
        self._model.kernel = Kernel("sdpa", "sdpa: with earlier keys and values", self._within)
        self._attention_tokens = attention_tokens
        self._latest: Tensor | None = None  # (B, OVERLAP or fewer) int64
        self._num_tokens = self._num_dropped = 0
        num_layers = len(model.params.layer_order())  # those that are run through again have keys and values for each time
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * num_layers  # (B, L, K, E)
        self._starts: Tensor | None = None  # (B, L) bool
        self._layers = cycle(range(num_layers))  # whose turn it is

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Add `tokens` (B, T) int64 to the text, T above 0; the logits (B, V) fp32 of the token that follows."""
        for part in tokens.split(self._attention_tokens, dim=1):  # so that masks stay small
            chunk = part if self._latest is None else torch.cat((self._latest, part), dim=1)
            logits = self._model.logits(chunk, slice(-1, None), self._attention_tokens)[:, 0]
            self._latest = chunk[:, -OVERLAP:]
            self._num_tokens += part.shape[1]
            self._drop(max(0, self._num_tokens - self._attention_tokens - OVERLAP) - self._num_dropped)
        return logits

    def _drop(self, num_keys: int) -> None:
        self._num_dropped += num_keys
        self._kept = [None if pair is None else (pair[0][:, num_keys:], pair[1][:, num_keys:]) for pair in self._kept]
        self._starts = None if self._starts is None else self._starts[:, num_keys:]

    def _within(self, sight: Sight, device: torch.device) -> Attend:
        """`Kernel.within`: attention of a chunk's positions to all of the text that they may see."""
        overlap = 0 if self._latest is None else self._latest.shape[1]
        begin = self._num_tokens - overlap  # of the chunk, in the text
        rotation = Rotation(*(part[begin:] for part in make_rotation(self._model.params, begin + 1, self._attention_tokens, device)))
        query = torch.arange(begin + sight.first, begin + sight.last, device=device)[:, None]
        key = torch.arange(self._num_dropped, begin + sight.last, device=device)
        mask = (key <= query) & (key > query - self._attention_tokens)  # (P, L)
        if sight.starts is not None:
            kept = sight.starts[:, :0] if self._starts is None else self._starts
            if kept.shape[1] < len(key):  # the first scope of this forward pass; the second has the same tokens
                kept = self._starts = torch.cat((kept, sight.starts[:, overlap:]), dim=1)
            document = kept.cumsum(1)[:, None]  # (B, 1, L)
            queries = document[..., sight.first - sight.last:, None]
            mask = mask & (queries == document[..., None, :])  # (B, 1, P, L)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = next(self._layers)
            k, v = rotate(k[:, overlap:], rotation), v[:, overlap:]
            if (kept := self._kept[layer]) is not None:
                k, v = torch.cat((kept[0], k), dim=1), torch.cat((kept[1], v), dim=1)
            self._kept[layer] = k, v
            q, k, v = (x.transpose(1, 2) for x in (rotate(q, rotation), k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

        return attend
