"""Exponential and stochastic weight averages (EMA, SWA arXiv:1803.05407) in the fp32 of the weights."""

from typing import Any

import torch
from torch import Tensor

from lib.training.config import AveragingParams


class Averages:
    """The averages over a run of the weights (W,), which an optimizer updates in place."""

    def __init__(self, weights: Tensor, params: AveragingParams) -> None:
        self._weights, self._params = weights, params
        self._ema = weights.clone()
        self._swa_sum = torch.zeros_like(weights)
        self._num_snapshots = 0

    def update(self, num_steps: int, lr_multiplier: float) -> None:
        """Take in the weights after optimizer step number `num_steps` (from 1), done at `lr_multiplier`."""
        if num_steps % self._params.ema_every_steps == 0:
            self._ema.lerp_(self._weights, 1 - self._params.ema_decay)
        if lr_multiplier < self._params.swa_below_lr and num_steps % self._params.swa_every_steps == 0:
            self._swa_sum.add_(self._weights)
            self._num_snapshots += 1

    def candidates(self) -> dict[str, Tensor]:
        """Weights (W,) by name of average: ``raw``, ``ema``, and ``swa`` where at least one snapshot was taken."""
        found = {"raw": self._weights, "ema": self._ema}
        if self._num_snapshots:
            found["swa"] = self._swa_sum / self._num_snapshots
        return found

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume."""
        return {"ema": self._ema, "swa_sum": self._swa_sum, "num_snapshots": self._num_snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self._ema.copy_(state["ema"])
        self._swa_sum.copy_(state["swa_sum"])
        self._num_snapshots = state["num_snapshots"]
