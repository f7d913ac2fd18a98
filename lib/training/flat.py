"""All parameters of a model in one tensor and their gradients in another, so that optimizers and averages make few passes.

What is treated alike lies side by side: the matrices of one shape form one (N, R, C) tensor. Shapes: N matrices of one shape,
R rows (outputs), C columns (inputs), W weights of the model.
"""

from collections.abc import Callable, Hashable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from lib.model.parts import Part, parts_of

OptimizerGroup = Literal["matrix", "embedding", "vector", "head"]
OPTIMIZER_GROUPS: tuple[OptimizerGroup, ...] = ("matrix", "embedding", "vector", "head")

K = TypeVar("K", bound=Hashable)


def group_of(part: Part) -> OptimizerGroup:
    """The optimizer group of a parameter: Muon updates ``matrix``, AdamW the others (pr585, pr410)."""
    if part.kind == "linear":
        return "head" if part.role == "head" else "matrix"
    return "embedding" if part.kind == "table" else "vector"


class FlatParameters:
    """The parameters of a model, moved into one tensor; the model goes on to see them as before.

    They are ordered by group, shape and, if they are matrices, role.

    Attributes:
        weights: (W,) fp32, the storage of all parameters.
        gradients: (W,) fp32, what `collect` has put there.
    """

    def __init__(self, model: nn.Module) -> None:
        def place(item: tuple[Part, nn.Parameter]) -> tuple[int, tuple[int, ...], str]:
            part, parameter = item
            return OPTIMIZER_GROUPS.index(group_of(part)), tuple(parameter.shape), part.role if part.is_matrix else ""

        self._ordered = sorted(((part, model.get_parameter(name)) for name, part in parts_of(model).items()), key=place)
        self._parameters = [parameter for _, parameter in self._ordered]
        self._in_model_order = [name for name, _ in model.named_parameters()]
        self.weights = torch.cat([parameter.detach().flatten() for parameter in self._parameters])
        self.gradients = torch.zeros_like(self.weights)
        for parameter, weight in zip(self._parameters, self._views(self.weights), strict=True):
            parameter.data = weight
        self._gradient_views = self._views(self.gradients)

    def collect(self) -> None:
        """Move the gradients of all parameters to `gradients`; 0 for a parameter that has none."""
        found = [(view, parameter.grad) for view, parameter in zip(self._gradient_views, self._parameters, strict=True)
                 if parameter.grad is not None]
        if len(found) < len(self._parameters):
            self.gradients.zero_()
        if found:
            torch._foreach_copy_([view for view, _ in found], [gradient for _, gradient in found])
        for parameter in self._parameters:
            parameter.grad = None

    def slices(self, key: Callable[[Part, nn.Parameter], K | None]) -> dict[K, slice]:
        """Where in the flat tensors the parameters lie to which `key` gives the same answer; those that get None are left out."""
        found: dict[K, slice] = {}
        end = 0
        for part, parameter in self._ordered:
            start, end = end, end + parameter.numel()
            if (group := key(part, parameter)) is not None:
                first = found[group].start if group in found else start
                assert group not in found or found[group].stop == start, f"{group}: not side by side"
                found[group] = slice(first, end)
        return found

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Copies of the parts of `flat` (W,) by name of their parameters, in the order and shapes of the model."""
        views = {part.name: view for (part, _), view in zip(self._ordered, self._views(flat), strict=True)}
        return {name: views[name].clone() for name in self._in_model_order}

    def _views(self, flat: Tensor) -> list[Tensor]:
        sizes = [parameter.numel() for parameter in self._parameters]
        return [part.view(parameter.shape) for part, parameter in zip(flat.split(sizes), self._parameters, strict=True)]
