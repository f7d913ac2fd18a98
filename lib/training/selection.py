"""Choice of the checkpoint among the raw and the averaged weights, by parameter or on held-out training documents."""

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from lib.errors import UserError
from lib.evaluation.bpb import Score


def score_candidates(model: nn.Module, candidates: Mapping[str, Mapping[str, Tensor]],
                     score: Callable[[], Score]) -> dict[str, Score]:
    """What `score` gives for each candidate's weights, loaded into `model` one after the other."""
    scores = {}
    for kind, weights in candidates.items():
        model.load_state_dict(weights)
        scores[kind] = score()
    return scores


def select(scores: Mapping[str, Score], choice: str) -> str:
    """The candidate that becomes the checkpoint.

    Args:
        scores: held-out score of each candidate.
        choice: a candidate, or ``heldout`` for the one with the fewest bits per byte; among equals the first.

    Raises:
        ValueError: the candidate was not made in this run.
    """
    if choice == "heldout":
        return min(scores, key=lambda kind: scores[kind].bpb)
    if choice not in scores:
        raise UserError(f"train.averaging.select: expected one of {', '.join(scores)}, found {choice}; no snapshot was taken: "
                        "lower averaging.swa_every_steps or raise averaging.swa_below_lr")
    return choice
