"""Muon, and the groups of Muon and AdamW.

Shapes: N matrices of one shape, n of them in this process, R rows (outputs), C columns (inputs).
"""

from typing import Any

import torch
from torch import Tensor

from lib.distributed import Process
from lib.training.config import OptimizerParams
from lib.training.flat import FlatParameters, group_of
from lib.training.orthogonal import ORTHOGONALIZATIONS, SMALLEST_NORM

SMALLEST_SQUARE = 1e-10  # of rows that are normalised by the running mean of their squares


class Muon:
    """Momentum with orthogonalised updates for matrices of one shape, shared out among the processes.

    The update is scaled by sqrt(max(1, R/C)); weight decay is decoupled (K. Jordan's Muon as in pr585). Each process keeps the
    state of its matrices and computes their updates, which all processes then exchange.

    Args:
        weights: (N, R, C), updated in place.
        gradients: (N, R, C), the same in every process; overwritten by `step`.
        params: settings of the optimizer.
        process: says which share of the matrices is computed here.
    """

    def __init__(self, weights: Tensor, gradients: Tensor, params: OptimizerParams, process: Process) -> None:
        self._weights, self._gradients, self._params, self._process = weights, gradients, params, process
        self._share = -(-len(weights) // process.world_size)  # matrices of each process but the last ones
        self._own = slice(process.rank * self._share, (process.rank + 1) * self._share)
        momentum = torch.zeros_like(gradients[self._own])  # (n, R, C)
        self._state = {"momentum": momentum}
        if params.normalize_rows == "after":
            self._state["squares"] = torch.zeros_like(momentum[..., :1])  # (n, R, 1), running means

    def step(self, lr: float, momentum: float) -> None:
        """One update of all matrices from their gradients."""
        params, gradients = self._params, self._gradients[self._own]
        update = gradients.add_(self._state["momentum"].mul_(momentum).add_(gradients), alpha=momentum)  # Nesterov
        if params.normalize_rows == "before":  # MuonEq-R, as in entry #1855
            update = update / update.norm(dim=-1, keepdim=True).clamp_min(SMALLEST_NORM)
        update = ORTHOGONALIZATIONS[params.orthogonalization](update, params.orthogonalization_steps)
        if params.normalize_rows == "after":
            update = self._normalize(update)
        update = self._process.gather_rows(update, len(self._weights))
        rows, columns = self._weights.shape[1:]
        decay: float | Tensor = lr * params.weight_decay.matrix
        if params.cautious_decay:  # arXiv:2510.12402
            decay = decay * (update * self._weights > 0)
        self._weights.mul_(1 - decay).add_(update, alpha=-lr * max(1, rows / columns) ** 0.5)

    def _normalize(self, update: Tensor) -> Tensor:
        """Rows over the root of the running mean of their squares, the whole as large as before (NorMuon, arXiv:2510.05491)."""
        squares = self._state["squares"]
        squares.lerp_(update.float().square().mean(-1, keepdim=True).to(squares.dtype), 1 - self._params.row_beta)
        normalized = update / (squares + SMALLEST_SQUARE).sqrt()
        size = update.norm(dim=(-2, -1), keepdim=True) / normalized.norm(dim=(-2, -1), keepdim=True).clamp_min(SMALLEST_NORM)
        return (normalized * size).to(update.dtype)

    def state(self) -> dict[str, Tensor]:
        """What is kept between steps of all matrices, (N, R, C) and (N, R, 1); to be called by every process."""
        return {name: self._process.gather_rows(value, len(self._weights)) for name, value in self._state.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the result of `state`."""
        for name, value in self._state.items():
            value.copy_(state[name][self._own])


class Optimizers:
    """Muon and AdamW over one model, driven by one learning-rate multiplier.

    Args:
        parameters: parameters of the model.
        params: learning rates by group, and what the groups share.
        process: every process makes the same update.
    """

    def __init__(self, parameters: FlatParameters, params: OptimizerParams, process: Process) -> None:
        self._params = params
        shapes = parameters.slices(lambda part, p: tuple(p.shape) if group_of(part) == "matrix" else None)
        self._muon = [Muon(parameters.weights[part].view(-1, *shape), parameters.gradients[part].view(-1, *shape), params, process)
                      for shape, part in shapes.items()]
        groups = parameters.slices(lambda part, p: group_of(part))
        adam_groups: list[dict[str, Any]] = []
        for group, lr in (("embedding", params.embedding_lr), ("vector", params.vector_lr), ("head", params.head_lr)):
            if group in groups:
                weights = parameters.weights[groups[group]]
                weights.grad = parameters.gradients[groups[group]]
                adam_groups.append({"params": [weights], "lr": lr, "weight_decay": getattr(params.weight_decay, group)})
        self._adam = torch.optim.AdamW(adam_groups, betas=params.adam_betas, eps=params.adam_eps, fused=True)
        self._adam_lrs = [group["lr"] for group in adam_groups]

    def step(self, lr_multiplier: float, momentum: float) -> None:
        """One update of all parameters from their gradients, which it overwrites."""
        for muon in self._muon:
            muon.step(self._params.matrix_lr * lr_multiplier, momentum)
        for group, lr in zip(self._adam.param_groups, self._adam_lrs, strict=True):
            group["lr"] = lr * lr_multiplier
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume with any number of processes; to be called by every process."""
        return {"muon": [muon.state() for muon in self._muon], "adam": self._adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        for muon, its_state in zip(self._muon, state["muon"], strict=True):
            muon.load_state(its_state)
        self._adam.load_state_dict(state["adam"])
