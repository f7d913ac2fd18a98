"""Second moments of inputs and output gradients: what an error in a matrix costs, measured on training text.

Shapes: N sequences, T tokens, R rows, C columns, V vocabulary. The loss of a model whose linear layer has the weight W + E instead
of W (R, C) is higher by about 1/2 tr(G E H E^T) per token: H = E[x x^T] of the input, G = E[g g^T] of the loss gradients at the
output (K-FAC, arXiv:1503.05671). With labels drawn from the model itself G is the Fisher information, and the figure is the KL
divergence between the two models. Of tables and of layers with more than `MAX_OUTPUTS` rows only the diagonal of G is kept.

An embedding table is a linear layer whose input is one-hot. Read by columns, its H is the second moment of the gradients at its
output and its g says how much of them each row receives. What a pass uses several times costs the sum: a table that is also the head, the
matrices of a layer that is run through again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.artifacts.hessians import Moments
from lib.artifacts.tokens import Split
from lib.calibration.sums import InputSums, OutputSums, TableSums, count_calls, matrix_inputs
from lib.data.loader import sample_sequences
from lib.distributed import Process
from lib.errors import UserError
from lib.model.parts import parts_of
from lib.params import Precision
from lib.progress import Progress

PRIOR_OCCURRENCES = 20.0
"""Each row of a table counts as seen this often more than it was, with the mean gradient: rows that calibration hardly saw must not
look worthless. Of 0.5 to 50 the best on the default model's three tables, by held-out KL at equal bytes."""
MAX_OUTPUTS = 4096
"""Rows of a linear layer up to which all of G is kept: a head of a large vocabulary, whose G is nearly diagonal, would fill the memory."""


class Cost(NamedTuple):
    """What errors cost in the matrices that read one input, in one of the times that a pass uses them.

    Attributes:
        hessian: H (C, C) of the input.
        gradients: name of the matrix -> g (R,).
        outputs: name of the matrix -> G (R, R), of those whose whole G is kept.
        is_own: whether it is of one call; False for what two calls have in common, which may be negative.
    """

    hessian: Tensor
    gradients: dict[str, Tensor]
    outputs: dict[str, Tensor]
    is_own: bool = True


def draw_sequences(split: Split, num_sequences: int, sequence_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of training sequences, both spread over all shards: for calibration and for verification.

    Args:
        split: the training tokens.
        num_sequences: number of sequences of each set.
        sequence_tokens: T.
        seed: decides which sequences.

    Returns:
        (num_sequences, T) int64 each.

    Raises:
        ValueError: the split has fewer sequences than both sets need.
    """
    sequences = sample_sequences(split, 2 * num_sequences, sequence_tokens, seed)[:, :-1]  # in the order of the split
    return sequences[::2], sequences[1::2]


def check_reserve(seconds: float, reserve_seconds: float | None) -> None:
    """Make sure that calibration, which counts as training, kept to the part of a training budget that was left for it.

    Raises:
        ValueError: it took longer.
    """
    if reserve_seconds is not None and seconds > reserve_seconds:
        raise UserError(f"calibrate: expected at most the {reserve_seconds:g} s that train.reserve_seconds left of the training budget, "
                        f"took {seconds:.1f} s; lower calibrate.num_sequences, or raise train.reserve_seconds and train again")


def collect_moments(model: nn.Module, logits: Callable[[Tensor], Tensor], sequences: Tensor, *, num_gradient_sequences: int,
                    batch_sequences: int, precision: Precision, seed: int, process: Process, description: str,
                    with_outputs: bool = False) -> Moments:
    """Second moments over all tokens of some sequences; sums of a batch in fp32, over batches in fp64.

    Args:
        model: any module with `lib.model.parts`, on the process's device; its gradients are not touched.
        logits: one forward pass of the model, tokens (B, T) -> logits (B, T, V).
        sequences: (N, T) int64 tokens.
        num_gradient_sequences: at most N; this many of the sequences, evenly spread, for everything that needs gradients.
        batch_sequences: sequences per forward pass.
        precision: precision of matrix products.
        seed: decides the labels that are drawn from the model.
        process: says which share of the sequences is computed here; every process gets the result.
        description: what the progress display says.
        with_outputs: whether all of G is collected, not only its diagonal.

    Returns:
        On the CPU, for every input and matrix of `matrix_inputs`.
    """
    parts = parts_of(model)
    whole = {part.modules[0] for part in parts.values() if with_outputs and part.kind == "linear"
             and max(model.get_parameter(part.name).shape) <= MAX_OUTPUTS}
    with_gradients = sequences[torch.arange(num_gradient_sequences) * len(sequences) // num_gradient_sequences]
    generator = torch.Generator(process.device).manual_seed((seed + process.rank) % 2**64)
    with Progress(description, len(sequences) + len(with_gradients), "seq", enabled=process.is_main) as progress, \
            torch.no_grad(), _products(precision):
        calls = count_calls(model, parts, lambda: _logits(logits, sequences[:1, :2].to(process.device), precision))
        with InputSums(model, parts, calls) as inputs:
            for batch in torch.split(sequences[process.rank::process.world_size], batch_sequences):
                inputs.begin_pass()
                _logits(logits, batch.to(process.device), precision)
                progress.update(len(batch) * process.world_size)
        with _frozen(model), OutputSums(model, parts, calls, whole) as outputs, TableSums(model, parts, calls) as tables:
            for batch in torch.split(with_gradients[process.rank::process.world_size], max(1, batch_sequences // 2)):
                outputs.begin_pass()
                tables.begin_pass()
                _backward(logits, batch.to(process.device), precision, generator)
                progress.update(len(batch) * process.world_size)
    hessians, gradients, of_tables = (sums.collect(process) for sums in (inputs, outputs, tables))
    found = Moments({}, {}, {})
    for source, names in matrix_inputs(parts).items():
        costs = []
        for module in parts[names[0]].modules:
            costs += [Cost(hessian, {names[0]: of_rows}, {}) for second, energy, count in of_tables.get(module, {}).values()
                      for hessian, of_rows in [_table_moments(second / with_gradients.numel(), energy, count)]]
            readers = {name: parts[name].modules[0] for name in names} if len(names) > 1 else {names[0]: module}
            for pair, (hessian,) in hessians.get(module, {}).items():
                of_pair = {name: [each / with_gradients.numel() for each in gradients[reader][pair]] for name, reader in readers.items()}
                costs.append(Cost(hessian / sequences.numel(), {name: of_rows for name, (of_rows, *_) in of_pair.items()},
                                  {name: matrix for name, (_, *matrices) in of_pair.items() for matrix in matrices}, pair[0] == pair[1]))
        total = _merge(costs)
        found.hessians[source] = total.hessian.float().cpu()
        for name, gradient in total.gradients.items():
            scale = parts[name].row_scale  # the gradient at an output of the weight, before it is scaled
            scales = model.get_parameter(scale).detach().double() if scale else torch.ones_like(gradient)
            found.gradients[name] = (gradient * scales.square()).float().cpu()
            if name in total.outputs:
                found.outputs[name] = (total.outputs[name] * scales * scales[:, None]).float().cpu()
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter needs gradients."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def _products(precision: Precision) -> Iterator[None]:
    """Within the context products of fp32 matrices are TF32 on GPUs if `precision` is bf16: TF32 holds every bf16 number exactly."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if precision == "bf16":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _logits(logits: Callable[[Tensor], Tensor], tokens: Tensor, precision: Precision) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return logits(tokens)


@torch.enable_grad()
def _backward(logits: Callable[[Tensor], Tensor], tokens: Tensor, precision: Precision, generator: torch.Generator) -> None:
    """Gradients of the summed loss of labels that are drawn from the model, at every output that has a hook."""
    outputs = _logits(logits, tokens, precision).flatten(0, 1)  # (tokens, V)
    labels = torch.multinomial(outputs.detach().softmax(1), 1, generator=generator)[:, 0]
    F.cross_entropy(outputs, labels, reduction="sum").backward()


def _table_moments(second: Tensor, energy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """H (C, C) and g (R,) of a table, from gradients' second moment, and per row their summed squares and occurrences."""
    trace = second.trace()
    if trace == 0:  # the table has no influence on the loss
        return second, energy
    smoothed = energy + PRIOR_OCCURRENCES * energy.sum() / count.sum()
    return second / trace, smoothed * (trace / smoothed.sum())


def _merge(costs: Sequence[Cost]) -> Cost:
    """The one cost that is closest to the sum of several: equal to it for each row over all columns, and for all rows together."""
    if len(costs) == 1:
        return costs[0]
    worth = torch.stack([sum(gradient.sum() for gradient in cost.gradients.values()) for cost in costs])  # type: ignore[misc]
    norm = worth[[cost.is_own for cost in costs]].sum()
    if norm <= 0:  # without influence on the loss
        return Cost(torch.stack([cost.hessian for cost in costs if cost.is_own]).mean(0), costs[0].gradients,
                    costs[0].outputs)
    hessian = torch.stack([share * cost.hessian for share, cost in zip(worth / norm, costs, strict=True)]).sum(0)
    gradients, outputs = ({name: torch.stack([of_cost[name] * cost.hessian.trace() for of_cost, cost in zip(each, costs, strict=True)]
                                             ).sum(0) / hessian.trace() for name in each[0]}
                          for each in ([cost.gradients for cost in costs], [cost.outputs for cost in costs]))
    return Cost(hessian, gradients, outputs)
