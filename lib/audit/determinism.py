"""Kernels that repeat their results, and what can be said of scores on a device that does not repeat them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch

from lib.distributed import Process
from lib.evaluation.score import Forward
from lib.model.gpt import GPT
from lib.params import Precision
from lib.progress import say

REHEARSED_TOKENS = 64
NUM_REPETITIONS = 3
MARGIN = 10.0
"""A difference counts as an effect when it is larger than this many times the largest one among repetitions of the same text."""

Floats = npt.NDArray[np.float32] | npt.NDArray[np.float64]


@contextmanager
def deterministic(model: GPT, precision: Precision, process: Process, *, enabled: bool = True) -> Iterator[str | None]:
    """On GPUs, within the context, kernels that repeat their results: some gradients are else summed in any order.

    Compiled graphs hold for one such mode, so that it is the same for all of an evaluation and for its audit. `start_process` has
    set what cuBLAS needs. A short pass forward and back shows beforehand whether all operations have such kernels.

    Args:
        model: on the process's device; its gradients are not touched.
        precision: dtype of the matrix products.
        process: every process enters this and gets the same answer.
        enabled: whether anything is changed.

    Yields:
        Why results may not repeat, the operation that has no such kernel; None where all have.
    """
    if not enabled or process.device.type != "cuda":
        yield None
        return
    torch.use_deterministic_algorithms(True)
    try:
        obstacle = next(filter(None, process.gather(_rehearse(model, precision))), None)
        if obstacle:
            torch.use_deterministic_algorithms(False)
            say(f"evaluation without deterministic algorithms: {obstacle}", enabled=process.is_main)
        yield obstacle
    finally:
        torch.use_deterministic_algorithms(False)


@torch.enable_grad()
def _rehearse(model: GPT, precision: Precision) -> str | None:
    rows = torch.arange(REHEARSED_TOKENS + 1, device=next(model.parameters()).device)[None] % model.params.vocab_size
    try:
        loss = Forward(model, precision)(rows, slice(None)).sum()
        torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad], allow_unused=True)
    except RuntimeError as error:
        if "determinis" not in str(error).lower():
            raise
        return str(error).splitlines()[0].partition(", but you set")[0]
    return None


def largest_difference(one: Floats, other: Floats) -> float:
    """Largest difference of two arrays, infinite where only one is NaN or where they have different shapes."""
    if one.shape != other.shape:
        return float("inf")
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    differences = np.abs(np.where(same, 0, one) - np.where(same, 0, other))
    return float(np.nan_to_num(differences, nan=np.inf).max(initial=0))


def largest_spread(repetitions: Sequence[Floats]) -> float:
    """Largest difference between any two of several arrays of one shape, at one place; NaN counts for nothing."""
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.ptp(np.stack(repetitions), axis=0), nan=0).max(initial=0))


def judge(difference: float, tolerance: float, noise: Callable[[], float]) -> bool | None:
    """Whether a difference is within what is tolerated; None if it may be the device's own noise.

    Args:
        difference: found between two runs.
        tolerance: between runs on a device that repeats its results.
        noise: the largest difference among repetitions of the same run, measured when it is asked for.
    """
    if difference <= tolerance:
        return True
    return None if tolerance < difference <= tolerance + MARGIN * noise() else False


def worst(*passed: bool | None) -> bool | None:
    """What several judgements come to together: a violation, else not judged, else passed."""
    return min(passed, key=(False, None, True).index)
