"""What hooks on the modules of a model add up while it runs: second moments of inputs, of output gradients, of tables.

Shapes: R rows, C columns.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations_with_replacement

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib.distributed import Process
from lib.errors import UserError
from lib.model.parts import Part


def matrix_inputs(parts: Mapping[str, Part]) -> dict[str, tuple[str, ...]]:
    """Every distinct input of matrices, and the matrices that read it."""
    inputs: dict[str, tuple[str, ...]] = {}
    for part in parts.values():
        if part.is_matrix:
            inputs[part.source] = (*inputs.get(part.source, ()), part.name)
    return inputs


def count_calls(model: nn.Module, parts: Mapping[str, Part], run_pass: Callable[[], object]) -> dict[str, int]:
    """How often one pass calls each module that uses a matrix.

    Raises:
        UserError: a module that it does not call.
    """
    users, calls = _list_users(model, parts), Counter[str]()
    with ExitStack() as hooks:
        for name, (_, module) in users.items():
            hooks.callback(module.register_forward_pre_hook(lambda *_, name=name: calls.update([name])).remove)
        run_pass()
    if unused := sorted(users.keys() - calls.keys()):
        raise UserError(f"calibrate: {unused[0]}: expected a layer that a forward pass of the model uses, found one that it does not")
    return dict(calls)


class _Sums(ExitStack, ABC):
    """Within the context, hooks on modules add up what passes them in each pair of calls of a pass; all fp64.

    A module is called once in a pass, but for those of layers that are run through again: what two of their calls have in common counts
    as well, because an error of the matrix is in both.

    Args:
        modules: the modules that are watched, by name.
        shapes: name -> shapes of its sums.
        calls: name -> how often a pass calls it.
        device: where the sums are.
    """

    def __init__(self, modules: Mapping[str, nn.Module], shapes: Mapping[str, tuple[tuple[int, ...], ...]], calls: Mapping[str, int],
                 device: torch.device) -> None:
        super().__init__()
        self._num_calls = calls
        self.sums = {name: {pair: tuple(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes[name])
                            for pair in combinations_with_replacement(range(calls[name]), 2)} for name in modules}
        self.begin_pass()
        for name, module in modules.items():
            self.callback(self.watch(name, module).remove)

    @abstractmethod
    def watch(self, name: str, module: nn.Module) -> RemovableHandle:
        """Put a hook on a module."""

    def begin_pass(self) -> None:
        """The next call of each module is the first one of a pass."""
        self._calls = dict.fromkeys(self.sums, 0)
        self._kept: dict[str, dict[int, Tensor]] = {name: {} for name in self.sums}

    def next_call(self, name: str) -> int:
        """Number of the call of a module that begins."""
        self._calls[name] += 1
        return self._calls[name] - 1

    def pairs(self, name: str, call: int, value: Tensor) -> Iterator[tuple[tuple[Tensor, ...], Tensor | None]]:
        """The sums of a call with itself and with each that came before, together with the other's value; None for its own."""
        yield self.sums[name][call, call], None
        for other, kept in self._kept[name].items():
            yield self.sums[name][min(call, other), max(call, other)], kept
        if self._num_calls[name] > 1:
            self._kept[name][call] = value

    def collect(self, process: Process) -> dict[str, dict[tuple[int, int], tuple[Tensor, ...]]]:
        """Module -> pair of calls -> the sums over all processes."""
        return {name: {pair: tuple(process.sum(total) for total in sums) for pair, sums in of_pairs.items()}
                for name, of_pairs in self.sums.items()}


class InputSums(_Sums):
    """Sums of x x^T (C, C) over the inputs x of linear layers, of those with the same input the first one's; x y^T + y x^T of two calls."""

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], calls: Mapping[str, int]) -> None:
        first = {names[0] for names in matrix_inputs(parts).values()}
        users = {name: (part, module) for name, (part, module) in _list_users(model, parts).items()
                 if part.name in first and not isinstance(module, nn.Embedding)}
        shapes = {name: ((_shape(model, part)[1],) * 2,) for name, (part, _) in users.items()}
        super().__init__({name: module for name, (_, module) in users.items()}, shapes, calls, _device(model))

    def watch(self, name: str, module: nn.Module) -> RemovableHandle:
        """Before each call."""
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()  # (tokens, C)
            for (total,), other in self.pairs(name, self.next_call(name), x):
                if other is None:
                    total.add_(_product(x, x))
                else:
                    total.add_(both := _product(x, other)).add_(both.T)

        return module.register_forward_pre_hook(add)


class OutputSums(_Sums):
    """Sums of squared gradients (R,) at the outputs g of linear layers, of products of the gradients of two calls; and, of the modules
    `whole`, of g g^T (R, R), of two calls half of g h^T + h g^T."""

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], calls: Mapping[str, int], whole: Collection[str]) -> None:
        users = {name: (part, module) for name, (part, module) in _list_users(model, parts).items()
                 if not isinstance(module, nn.Embedding)}
        num_rows = {name: _shape(model, part)[0] for name, (part, _) in users.items()}
        shapes = {name: ((rows,), (rows, rows)) if name in whole else ((rows,),) for name, rows in num_rows.items()}
        super().__init__({name: module for name, (_, module) in users.items()}, shapes, calls, _device(model))

    def watch(self, name: str, module: nn.Module) -> RemovableHandle:
        """After each call, on the way back."""
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            call = self.next_call(name)

            def add_gradient(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2).float()  # (tokens, R)
                for (total, *whole), other in self.pairs(name, call, g):
                    total.add_((g.square() if other is None else g * other).sum(0))
                    for matrix in whole:
                        both = _product(g, g if other is None else other)
                        matrix.add_(both if other is None else (both + both.T) / 2)

            output.register_hook(add_gradient)

        return module.register_forward_hook(add)


class TableSums(_Sums):
    """Sums over the gradients g at the outputs of embedding tables: g g^T (C, C), |g|^2 of each row (R,), occurrences of each row (R,).

    The outputs of the tables are where gradients begin: the parameters need none. Of tables that a pass looks up several times nothing
    but the sum over all is kept.
    """

    def __init__(self, model: nn.Module, parts: Mapping[str, Part], calls: Mapping[str, int]) -> None:
        tables = {name: module for name, (_, module) in _list_users(model, parts).items() if isinstance(module, nn.Embedding)}
        shapes = {name: ((table.embedding_dim,) * 2, (table.num_embeddings,), (table.num_embeddings,)) for name, table in tables.items()}
        super().__init__(tables, shapes, dict.fromkeys(calls, 1), _device(model))

    def watch(self, name: str, module: nn.Module) -> RemovableHandle:
        """After each call, on the way back."""
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows, (second, energy, count) = inputs[0].flatten(), self.sums[name][0, 0]

            def add_gradient(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2).float()  # (tokens, C)
                second.add_(_product(g, g))
                energy.index_add_(0, rows, g.square().sum(1).double())
                count.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))

            output.requires_grad_(True)
            output.register_hook(add_gradient)

        return module.register_forward_hook(add)


def _shape(model: nn.Module, part: Part) -> tuple[int, int]:
    """R, C of a matrix."""
    first, second = model.get_parameter(part.name).shape
    return (second, first) if part.transposed else (first, second)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _list_users(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, tuple[Part, nn.Module]]:
    """Name of every module that uses a matrix -> its part and itself."""
    return {name: (part, model.get_submodule(name)) for part in parts.values() if part.is_matrix for name in part.modules}


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x^T y of two (tokens, C), fp32."""
    with torch.autocast(x.device.type, enabled=False):  # hooks run within that of the model, which would round the sums
        return x.T @ y
