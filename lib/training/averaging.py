"""Exponential and stochastic weight averages (EMA, SWA arXiv:1803.05407) in the fp32 of the weights, over cached tensor lists."""

from typing import Any

import torch
from torch import Tensor, nn

from lib.training.config import AveragingParams


class Averages:
    """The averages of one model's parameters over a run."""

    def __init__(self, model: nn.Module, params: AveragingParams) -> None:
        self._params = params
        self._names = [name for name, _ in model.named_parameters()]
        self._weights: list[Tensor] = [parameter.detach() for parameter in model.parameters()]
        self._ema = [weight.clone() for weight in self._weights]
        self._swa_sum = [torch.zeros_like(average) for average in self._ema]
        self._num_snapshots = 0

    def update(self, num_steps: int, lr_multiplier: float) -> None:
        """Take in the weights after optimizer step number `num_steps` (from 1), done at `lr_multiplier`."""
        if num_steps % self._params.ema_every_steps == 0:
            torch._foreach_lerp_(self._ema, self._weights, 1 - self._params.ema_decay)
        if lr_multiplier < self._params.swa_below_lr and num_steps % self._params.swa_every_steps == 0:
            torch._foreach_add_(self._swa_sum, self._weights)
            self._num_snapshots += 1

    def candidates(self) -> dict[str, dict[str, Tensor]]:
        """Weights by name of average: ``raw``, ``ema``, and ``swa`` where at least one snapshot was taken."""
        found = {"raw": self._weights, "ema": self._ema}
        if self._num_snapshots:
            found["swa"] = [total / self._num_snapshots for total in self._swa_sum]
        return {kind: {name: weight.clone() for name, weight in zip(self._names, weights, strict=True)} for kind, weights in found.items()}

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume."""
        return {"ema": self._ema, "swa_sum": self._swa_sum, "num_snapshots": self._num_snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        torch._foreach_copy_(self._ema, state["ema"])
        torch._foreach_copy_(self._swa_sum, state["swa_sum"])
        self._num_snapshots = state["num_snapshots"]
