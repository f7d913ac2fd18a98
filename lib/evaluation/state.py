"""What a model carries besides its weights and could remember a text by: buffers, hooks, gradients, attributes of its modules."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, object]


def describe_state(model: nn.Module) -> State:
    """Name of each thing -> something that is equal as long as the thing is unchanged.

    Of parameters: shape, and whether there is a gradient; of buffers and other tensors: their content; of hooks: their number and
    identities; of other attributes: their value where it is a number or text, its size where it is a container, and its identity.
    """
    return {f"{path}.{name}".lstrip("."): value for path, module in model.named_modules() for name, value in _describe_module(module)}


def differing(before: Mapping[str, object], after: Mapping[str, object]) -> tuple[str, ...]:
    """Names of what was added, removed or changed, sorted."""
    return tuple(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _describe_module(module: nn.Module) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = [("class", id(type(module)))]
    for name, value in vars(module).items():
        if name == "_parameters":
            found += [(key, (id(each), each.requires_grad, each.grad is None)) for key, each in value.items() if each is not None]
        elif name == "_buffers":
            found += [(key, _describe(each)) for key, each in value.items()]
        elif name == "_modules":
            found.append(("modules", tuple((key, id(each)) for key, each in value.items())))
        elif "hooks" in name and isinstance(value, dict):
            found.append((name.strip("_"), tuple(map(id, value.values()))))
        else:
            found.append((name, _describe(value)))
    return found


def _describe(value: Any) -> object:
    if isinstance(value, Tensor):
        content = value.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        return id(value), hashlib.sha256(content.data).hexdigest()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return id(value), len(value) if hasattr(value, "__len__") else None
