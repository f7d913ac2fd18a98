"""Choice of the checkpoint."""

import pytest
import torch

from lib.evaluation.bpb import Score
from lib.training.selection import score_candidates, select

SCORES = {"raw": Score(2.0, 1.5, 10, 20), "ema": Score(1.9, 1.4, 10, 20)}


def test_heldout_takes_the_best_and_a_name_takes_itself() -> None:
    assert select(SCORES, "heldout") == "ema"
    assert select({**SCORES, "swa": SCORES["ema"]}, "heldout") == "ema"
    assert select(SCORES, "raw") == "raw"


def test_an_average_that_was_never_taken_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"averaging\.select: expected one of raw, ema, found swa; no snapshot was taken"):
        select(SCORES, "swa")


def test_each_candidate_is_scored_with_its_own_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    candidates = {kind: {"weight": torch.full((1, 1), value)} for kind, value in (("raw", 1.0), ("ema", 2.0))}
    scores = score_candidates(model, candidates, lambda: Score(model.weight.item(), 0.0, 1, 1))
    assert {kind: score.loss for kind, score in scores.items()} == {"raw": 1.0, "ema": 2.0}
