"""Muon, and the parameter groups of Muon and AdamW.

Shapes: N matrices of one shape, R rows (outputs), C columns (inputs).
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lib.model.roles import MATRIX_ROLES, role_of
from lib.training.config import OptimizerParams

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of K. Jordan's Muon, kellerjordan.github.io/posts/muon


def orthogonalize(matrices: Tensor, num_steps: int) -> Tensor:
    """Push all singular values towards 1 by Newton-Schulz iteration (Muon).

    Args:
        matrices: (N, R, C); on GPUs the iteration runs in bf16.
        num_steps: iterations; 5 bring singular values to about 0.7 .. 1.2.

    Returns:
        (N, R, C) of the same dtype.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(num_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates for matrices, batched over those of one shape.

    The update is scaled by sqrt(max(1, R/C)); weight decay is decoupled (K. Jordan's Muon as in pr585).
    """

    def __init__(self, parameters: list[nn.Parameter], *, lr: float, momentum: float, weight_decay: float, num_steps: int) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        super().__init__([{"params": group} for group in by_shape.values()],
                         {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "num_steps": num_steps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters: list[Tensor] = group["params"]
            gradients = torch.stack([parameter.grad for parameter in parameters if parameter.grad is not None])  # (N, R, C)
            state = self.state[parameters[0]]  # one buffer for the whole group
            if not state:
                state["momentum"] = torch.zeros_like(gradients)
            buffer: Tensor = state["momentum"]
            buffer.mul_(group["momentum"]).add_(gradients)
            update = orthogonalize(gradients.add_(buffer, alpha=group["momentum"]), group["num_steps"])
            rows, columns = parameters[0].shape
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(update.unbind()), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


class Optimizers:
    """Muon and AdamW over one model, driven by one learning-rate multiplier."""

    def __init__(self, model: nn.Module, params: OptimizerParams) -> None:
        groups: dict[str, list[nn.Parameter]] = {"matrix": [], "embedding": [], "vector": [], "head": []}
        for name, parameter in model.named_parameters():
            role = role_of(name, parameter.ndim)
            if role not in MATRIX_ROLES:
                groups["vector"].append(parameter)
            elif role == "head":
                groups["head"].append(parameter)
            else:
                groups["embedding" if name.endswith(("token_embedding.weight", "table.weight")) else "matrix"].append(parameter)
        lrs = {"embedding": params.embedding_lr, "vector": params.vector_lr, "head": params.head_lr}
        adam_groups = [{"params": groups[name], "lr": lr} for name, lr in lrs.items() if groups[name]]
        self.muon = Muon(groups["matrix"], lr=params.matrix_lr, momentum=params.momentum, weight_decay=params.weight_decay,
                         num_steps=params.newton_schulz_steps)
        self.adam = torch.optim.AdamW(adam_groups, betas=params.adam_betas, eps=params.adam_eps, weight_decay=params.weight_decay)
        self._initial_lrs = [group["lr"] for group in self._groups()]

    def step(self, lr_multiplier: float, momentum: float) -> None:
        """One update of all parameters from their gradients."""
        for group, lr in zip(self._groups(), self._initial_lrs, strict=True):
            group["lr"] = lr * lr_multiplier
        for group in self.muon.param_groups:
            group["momentum"] = momentum
        self.muon.step()
        self.adam.step()

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])

    def _groups(self) -> list[dict[str, Any]]:
        return self.muon.param_groups + self.adam.param_groups
