"""The one table of a model's parameters: what each of them is, what it reads and what it is for.

Training, calibration, quantization, test-time training and reports all ask here, so that none of them knows a model's names. A model
declares what the types of its modules do not tell, as `lib.model.gpt.GPT` does; of any other model, such as those of the library
transformers, everything follows from the types.

Shapes: R rows (outputs), C columns (inputs).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lib.errors import UserError

Kind = Literal["linear", "table", "vector"]
KINDS: tuple[Kind, ...] = ("table", "linear", "vector")
LAYER = "*"  # stands for the number of a layer in declared names
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Declared(NamedTuple):
    """What a model says of a parameter.

    Attributes:
        role: what it is for.
        source: name of the input that a linear layer reads, where several read the same one; empty for an input of its own.
        reader: module that reads a table once more, as a linear layer without a weight of its own (a tied head).
        row_scale: name of the vector that scales the outputs of a linear layer.
    """

    role: str
    source: str = ""
    reader: str = ""
    row_scale: str = ""


class Part(NamedTuple):
    """One parameter of a model.

    Attributes:
        name: dotted name of the parameter.
        kind: linear for the matrix (R, C) of a linear layer, table for the (R, C) of an embedding, vector for everything else, which has
            no matrix product of its own: gains, scales, mixes, biases.
        role: what it is for: the key of bits, reports and groups.
        source: name of the input that a matrix reads; matrices with the same source share their second moments. Empty for a vector.
        layer: number of the layer that it belongs to; None outside of the layers.
        modules: names of the modules that use it in one pass; a table that is also the head has two.
        row_scale: name of the vector that scales the outputs of a linear layer; empty for none.
        transposed: whether the parameter is stored as (C, R), as Conv1D of the library transformers does.
    """

    name: str
    kind: Kind
    role: str
    source: str
    layer: int | None
    modules: tuple[str, ...]
    row_scale: str = ""
    transposed: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is a linear layer's matrix or an embedding's table."""
        return self.kind != "vector"


def parts_of(model: nn.Module) -> dict[str, Part]:
    """Every parameter of a model, name -> part, in the model's order.

    Args:
        model: any module; its attribute ``PARTS``, if it has one, maps names, with `LAYER` for the number of a layer, to what it
            declares. Without it the role of a matrix is the last part of its module's name, such as ``q_proj``, and that of a vector is
            ``vector``; every linear layer has an input of its own.

    Raises:
        UserError: a model that declares its parts leaves one out.
    """
    users: dict[int, list[tuple[str, Kind]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            users.setdefault(id(parameter), []).append((module_name, _kind(module, attribute)))
    return {name: _make_part(model, name, users[id(parameter)]) for name, parameter in model.named_parameters()}


def _kind(module: nn.Module, attribute: str) -> Kind:
    if attribute == "weight" and isinstance(module, nn.Embedding):
        return "table"
    return "linear" if attribute == "weight" and (isinstance(module, nn.Linear) or _is_transposed(module)) else "vector"


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # of transformers.pytorch_utils, a library that is not needed here


def _make_part(model: nn.Module, name: str, users: Sequence[tuple[str, Kind]]) -> Part:
    """A part of a model, from the modules that hold the parameter and what it is to each."""
    kind = min((kind for _, kind in users), key=KINDS.index)  # a table that is also a linear layer's matrix is a table
    modules = tuple(module for module, its_kind in users if its_kind != "vector" or kind == "vector")
    says = _find_declared(model, name) or Declared(modules[0].rpartition(".")[2] if kind != "vector" else kind)
    layer = next(iter(NUMBER.findall(name)), "")
    if says.reader and not any(True for _ in model.get_submodule(says.reader).parameters()):
        modules += (says.reader,)
    source = (says.source.replace(LAYER, layer) or modules[0]) if kind != "vector" else ""
    return Part(name, kind, says.role, source, int(layer) if layer else None, modules, says.row_scale.replace(LAYER, layer),
                _is_transposed(model.get_submodule(modules[0])))


def _find_declared(model: nn.Module, name: str) -> Declared | None:
    """What a model says of a parameter; None if it says nothing of any."""
    declared: Mapping[str, Declared] | None = getattr(model, "PARTS", None)
    if declared is None:
        return None
    if (says := declared.get(NUMBER.sub(LAYER, name))) is None:
        raise UserError(f"{name}: expected a part that the model declares, found none; add it to {type(model).__name__}.PARTS")
    return says


def read_weights(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters on the CPU in fp32, name -> tensor; matrices are (R, C), however they are stored."""
    weights = {name: model.get_parameter(name).detach().float().cpu() for name in parts_of(model)}
    return {name: (weights[name].T if part.transposed and part.is_matrix else weights[name]).clone(memory_format=torch.contiguous_format)
            for name, part in parts_of(model).items()}


@torch.no_grad()
def write_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Make a model's parameters those of `read_weights`, in its own dtype and on its own device."""
    for name, part in parts_of(model).items():
        model.get_parameter(name).copy_(weights[name].T if part.transposed and part.is_matrix else weights[name])
