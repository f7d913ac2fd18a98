"""What an evaluation leaves to be read: documents that the artifact writes, a passage with the bits of its tokens, documents as points."""

import math
from itertools import islice
from typing import Any

import numpy as np

from lib.data.reading import split_text, stream_text
from lib.data.tokenizer import Tokenizer
from lib.evaluation.config import StrategyName
from lib.evaluation.evaluation import Evaluation
from lib.generation.cache import KeyValueCache
from lib.generation.sampling import Sampling, write_tokens
from lib.model.gpt import GPT

SAMPLINGS = (Sampling(0.8, 0.95, 0), Sampling(0.8, 0.95, 1))
"""How the documents that are written are drawn."""
SAMPLE_TOKENS = 200  # of each, at most
PASSAGE_TOKENS = 300
MAX_POINTS = 1000  # documents, evenly spaced where there are more
BASELINE: StrategyName = "plain"


def make_examples(model: GPT, tokenizer: Tokenizer, evaluation: Evaluation) -> dict[str, Any]:
    """What ``examples.json`` holds; a function of the inputs alone.

    Args:
        model: the artifact's, with its own weights.
        tokenizer: the one that made the text's tokens.
        evaluation: what all strategies gave.

    Returns:
        ``written``: documents, each with ``text``, ``num_tokens``, whether it ``ended``, and how it was drawn. ``passage``: where it is,
        ``document`` and ``first`` target in it; ``parts``, of neighbouring tokens that have a text together: text, number of tokens, and
        bits by each of ``strategies``, plain (where it was run) and the one that counts. ``documents``: ``total``, and ``points`` of some
        or all: tokens, bytes, and bits per byte by the strategy that counts.
    """
    return {"written": [_write(model, tokenizer, evaluation, sampling) for sampling in SAMPLINGS],
            "passage": _choose_passage(tokenizer, evaluation), "documents": _list_points(evaluation)}


def _write(model: GPT, tokenizer: Tokenizer, evaluation: Evaluation, sampling: Sampling) -> dict[str, Any]:
    window = evaluation.params.window_tokens
    cache = KeyValueCache(model, min(window, model.params.rope_trained_tokens or window))
    prompt = np.array([tokenizer.bos_id], np.uint16)
    device = next(model.parameters()).device
    tokens = list(islice(write_tokens(cache, prompt, tokenizer.bos_id, sampling, device), SAMPLE_TOKENS))
    return {"text": "".join(stream_text(tokenizer, [], tokens)), "num_tokens": len(tokens), "ended": len(tokens) < SAMPLE_TOKENS,
            **sampling._asdict()}


def _choose_passage(tokenizer: Tokenizer, evaluation: Evaluation) -> dict[str, Any]:
    """A passage with as much before it as it is long, so that a strategy can adapt, of the first such document; else of the longest."""
    starts, lengths = evaluation.text.documents
    document = int((lengths > 2 * PASSAGE_TOKENS).argmax() if lengths.max() > 2 * PASSAGE_TOKENS else lengths.argmax())
    end = min(2 * PASSAGE_TOKENS, int(lengths[document]) - 1)  # the last target is the BOS of the next document
    begin = max(0, end - PASSAGE_TOKENS)
    targets = slice(int(starts[document]) + begin, int(starts[document]) + end)
    strategies = list(dict.fromkeys(name for name in (BASELINE, evaluation.params.strategy) if name in evaluation.outcomes))
    bits = np.stack([evaluation.outcomes[name].nats[targets].astype(np.float64) / math.log(2) for name in strategies])
    parts, first = [], 0
    for span in split_text(tokenizer, evaluation.text.tokens[1:][targets].tolist()):
        last = first + span.num_tokens
        parts.append([span.text, span.num_tokens, *(round(float(each), 3) for each in bits[:, first:last].sum(1))])
        first = last
    return {"document": document, "first": begin, "strategies": strategies, "parts": parts}


def _list_points(evaluation: Evaluation) -> dict[str, Any]:
    starts, lengths = evaluation.text.documents
    bits = np.add.reduceat(evaluation.outcomes[evaluation.params.strategy].nats, starts, dtype=np.float64) / math.log(2)
    num_bytes = np.add.reduceat(evaluation.text.target_bytes, starts)
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(MAX_POINTS, len(starts))).round().astype(np.int64))
    points = [[int(lengths[n]), int(num_bytes[n]), round(float(bits[n] / num_bytes[n]), 4)] for n in chosen.tolist() if num_bytes[n]]
    return {"total": len(starts), "points": points}
