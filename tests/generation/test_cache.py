"""The cache against the same model without one: the logits of every token, for every option, however the text comes in."""

from typing import Any

import pytest
import torch

from lib.errors import UserError
from lib.generation.cache import KeyValueCache
from tests.model.test_gpt import ARCHITECTURES, FULL, make_model

NUM_TOKENS, TRAINED = 23, FULL["rope_trained_tokens"]


def make_text(options: dict[str, Any]) -> torch.Tensor:
    """Two rows; documents begin at different places, next to each other too, and where another piece begins."""
    tokens = torch.randint(2, 40, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = tokens[0, 7] = tokens[0, 8] = tokens[1, 5] = tokens[1, 16] = options["bos_id"]
    return tokens


@pytest.mark.parametrize("options", ARCHITECTURES.values(), ids=ARCHITECTURES)
@pytest.mark.parametrize("context", [1, 2, 4, TRAINED])
@pytest.mark.parametrize("pieces", [(1,) * NUM_TOKENS, (5, 1, 1, 2, 1, 9, 4), (NUM_TOKENS - 1, 1)], ids=["singly", "pieces", "prompt"])
def test_logits_are_those_without_a_cache(options: dict[str, Any], context: int, pieces: tuple[int, ...]) -> None:
    """Up to the trained length (6), and far beyond it, where old tokens drop out of sight."""
    model, tokens = make_model(options).double(), make_text(options)
    expected = model.logits(tokens, attention_tokens=context)
    cache, end = KeyValueCache(model, context), 0
    for size in pieces:
        found = cache.extend(tokens[:, end:end + size])
        end += size
        torch.testing.assert_close(found, expected[:, end - 1], rtol=0, atol=2e-5)  # angles are of fp32
    torch.testing.assert_close(model.logits(tokens, attention_tokens=context), expected, rtol=0, atol=0)  # the model is as it was


def test_without_a_trained_length_any_context_will_do() -> None:
    model = make_model({**FULL, "rope_trained_tokens": None})
    tokens = make_text(FULL)
    cache = KeyValueCache(model, 100)
    for end in range(1, NUM_TOKENS + 1):
        found = cache.extend(tokens[:, end - 1:end])
    torch.testing.assert_close(found, model.logits(tokens)[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("context", [0, TRAINED + 1])
def test_contexts_that_would_turn_the_kept_keys_are_refused(context: int) -> None:
    with pytest.raises(UserError, match=f"context: expected 1 to 6 tokens.*found {context}"):
        KeyValueCache(make_model(FULL), context)
