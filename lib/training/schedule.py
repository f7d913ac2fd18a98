"""Schedules as pure functions of the fraction of the training budget that is done, 0 <= fraction < 1."""

from collections.abc import Sequence


def lr_multiplier(fraction: float, warmdown: float, floor: float) -> float:
    """Factor on every learning rate: 1, then linear to 0 over the last `warmdown` of the budget, but never below `floor`."""
    return max(floor, min(1.0, (1 - fraction) / warmdown)) if warmdown > 0 else 1.0


def muon_momentum(fraction: float, start: float, end: float, warmup: float) -> float:
    """Momentum: linear from `start` to `end` over the first `warmup` of the budget, then constant."""
    return start + (end - start) * min(1.0, fraction / warmup) if warmup > 0 else end


def part_tokens(fraction: float, schedule: Sequence[tuple[float, int]], last: int) -> int:
    """Tokens of the parts of packed rows: those of the first (end, tokens) pair that ends after `fraction`, then `last` (#2014)."""
    return next((tokens for end, tokens in schedule if fraction < end), last)
