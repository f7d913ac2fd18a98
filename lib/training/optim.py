"""Muon, and the groups of Muon and AdamW.

Shapes: N matrices of one shape, n of them in this process, R rows (outputs), C columns (inputs).
"""

from typing import Any

import torch
from torch import Tensor

from lib.distributed import Process
from lib.training.config import OptimizerParams
from lib.training.flat import FlatParameters, group_of

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of K. Jordan's Muon, kellerjordan.github.io/posts/muon


def orthogonalize(matrices: Tensor, num_steps: int) -> Tensor:
    """Push all singular values towards 1 by Newton-Schulz iteration (Muon).

    Args:
        matrices: (N, R, C).
        num_steps: iterations; 5 bring singular values to about 0.7 .. 1.2.

    Returns:
        (N, R, C); bf16 on GPUs, where the iteration runs in it, else of the same dtype.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # a x + (b gram + c gram^2) x
    return x.mT if tall else x


class Muon:
    """Momentum with orthogonalised updates for matrices of one shape, shared out among the processes.

    The update is scaled by sqrt(max(1, R/C)); weight decay is decoupled (K. Jordan's Muon as in pr585). Each process keeps the
    momentum of its matrices and computes their updates, which all processes then exchange.

    Args:
        weights: (N, R, C), updated in place.
        gradients: (N, R, C), the same in every process; overwritten by `step`.
        params: of the optimizer.
        process: which share of the matrices is computed here.
    """

    def __init__(self, weights: Tensor, gradients: Tensor, params: OptimizerParams, process: Process) -> None:
        self._weights, self._gradients, self._params, self._process = weights, gradients, params, process
        self._share = -(-len(weights) // process.world_size)  # matrices of each process but the last ones
        self._own = slice(process.rank * self._share, (process.rank + 1) * self._share)
        self._momentum = torch.zeros_like(gradients[self._own])  # (n, R, C)

    def step(self, lr: float, momentum: float) -> None:
        """One update of all matrices from their gradients."""
        gradients = self._gradients[self._own]
        self._momentum.mul_(momentum).add_(gradients)
        update = orthogonalize(gradients.add_(self._momentum, alpha=momentum), self._params.newton_schulz_steps)
        update = self._process.gather_rows(update, len(self._weights))
        rows, columns = self._weights.shape[1:]
        self._weights.mul_(1 - lr * self._params.weight_decay).add_(update, alpha=-lr * max(1, rows / columns) ** 0.5)

    def state(self) -> Tensor:
        """Momentum of all matrices, (N, R, C); to be called by every process."""
        return self._process.gather_rows(self._momentum, len(self._weights))

    def load_state(self, momentum: Tensor) -> None:
        """Continue from the momentum of all matrices, (N, R, C)."""
        self._momentum.copy_(momentum[self._own])


class Optimizers:
    """Muon and AdamW over one model, driven by one learning-rate multiplier.

    Args:
        parameters: of the model.
        params: learning rates by group, and what the groups share.
        process: every process makes the same update.
    """

    def __init__(self, parameters: FlatParameters, params: OptimizerParams, process: Process) -> None:
        self._params = params
        shapes = parameters.parts(lambda name, p: tuple(p.shape) if group_of(name, p.ndim) == "matrix" else None)
        self._muon = [Muon(parameters.weights[part].view(-1, *shape), parameters.gradients[part].view(-1, *shape), params, process)
                      for shape, part in shapes.items()]
        groups = parameters.parts(lambda name, p: group_of(name, p.ndim))
        adam_groups: list[dict[str, Any]] = []
        for group, lr in (("embedding", params.embedding_lr), ("vector", params.vector_lr), ("head", params.head_lr)):
            if group in groups:
                weights = parameters.weights[groups[group]]
                weights.grad = parameters.gradients[groups[group]]
                adam_groups.append({"params": [weights], "lr": lr})
        self._adam = torch.optim.AdamW(adam_groups, betas=params.adam_betas, eps=params.adam_eps, weight_decay=params.weight_decay,
                                       fused=True)
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
        for muon, momentum in zip(self._muon, state["muon"], strict=True):
            muon.load_state(momentum)
        self._adam.load_state_dict(state["adam"])
