"""Second moments of inputs and output gradients: what an error in a matrix costs, measured on training text.

Shapes: N sequences, T tokens, R rows, C columns, V vocabulary. The loss of a model whose linear layer has the weight W + E instead
of W (R, C) is higher by about 1/2 tr(G E H E^T) per token: H = E[x x^T] of the input, G = E[g g^T] of the loss gradients at the
output (K-FAC, arXiv:1503.05671). Of G only the diagonal is kept. With labels drawn from the model itself G is the Fisher
information, and the figure is the KL divergence between the two models.

An embedding table is a linear layer whose input is one-hot. Read by columns, its H is the second moment of the gradients at its
output and its g says how much of them each row receives. A tied head adds what it costs as an output layer.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.artifacts.hessians import Moments
from lib.artifacts.tokens import Split
from lib.data.loader import sample_sequences
from lib.distributed import Process
from lib.errors import UserError
from lib.model.gpt import GPT, TiedHead
from lib.params import Precision
from lib.progress import Progress

HEAD = "head"
PRIOR_OCCURRENCES = 20.0
"""Each row of a table counts as seen this often more than it was, with the mean gradient: rows that calibration hardly saw must not
look worthless. Of 0.5 to 50 the best on the default model's three tables, by held-out KL at equal bytes."""


def draw_sequences(split: Split, num_sequences: int, sequence_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of training sequences, both spread over all shards: for calibration and for verification.

    Args:
        split: the training tokens.
        num_sequences: of each set.
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


def matrix_inputs(model: GPT) -> dict[str, tuple[str, ...]]:
    """Every distinct input of linear layers and tables, and the matrices that read it."""
    return model.linear_inputs() | {name: (f"{name}.weight",) for name in _tables(model)}


def collect_moments(model: GPT, sequences: Tensor, *, num_gradient_sequences: int, batch_sequences: int, precision: Precision, seed: int,
                    process: Process, description: str) -> Moments:
    """Second moments over all tokens of some sequences; sums of a batch in fp32, over batches in fp64.

    Args:
        model: on the process's device; its gradients are not touched.
        sequences: (N, T) int64 tokens.
        num_gradient_sequences: at most N; this many of the sequences, evenly spread, for everything that needs gradients.
        batch_sequences: sequences per forward pass.
        precision: of matrix products.
        seed: decides the labels that are drawn from the model.
        process: which share of the sequences is computed here; every process gets the result.
        description: what the progress display says.

    Returns:
        On the CPU, for every input and matrix of `matrix_inputs`.
    """
    device = process.device
    with_gradients = sequences[torch.arange(num_gradient_sequences) * len(sequences) // num_gradient_sequences]
    generator = torch.Generator(device).manual_seed((seed + process.rank) % 2**64)
    with Progress(description, len(sequences) + len(with_gradients), "seq", enabled=process.is_main) as progress, \
            torch.no_grad(), _products(precision):
        with _InputSums(model, device) as inputs:
            for batch in torch.split(sequences[process.rank::process.world_size], batch_sequences):
                _logits(model, batch.to(device), precision)
                progress.update(len(batch) * process.world_size)
        with _frozen(model), _OutputSums(model, device) as outputs, _TableSums(model, device) as tables:
            for batch in torch.split(with_gradients[process.rank::process.world_size], max(1, batch_sequences // 2)):
                _backward(model, batch.to(device), precision, generator)
                progress.update(len(batch) * process.world_size)
    hessians = {name: process.sum(value) / sequences.numel() for name, value in inputs.sums.items()}
    gradients = {name: process.sum(value) / with_gradients.numel() for name, value in outputs.sums.items()}
    for name, scale in model.output_scales().items():  # the gradient at an output of the weight, before it is scaled
        gradients[name] = gradients[name] * scale.detach().double().square()
    for name, sums in tables.sums.items():
        second, energy, count = (process.sum(value) for value in sums)
        hessians[name], gradients[f"{name}.weight"] = _table_moments(second / with_gradients.numel(), energy, count)
    if isinstance(model.head, TiedHead):
        name, weight = "token_embedding", "token_embedding.weight"
        hessians[name], gradients[weight] = _add(hessians[name], gradients[weight], hessians.pop(HEAD), gradients.pop(f"{HEAD}.weight"))
    return Moments({name: value.float().cpu() for name, value in hessians.items()},
                   {name: value.float().cpu() for name, value in gradients.items()})


@contextmanager
def _frozen(model: GPT) -> Iterator[None]:
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


def _logits(model: GPT, tokens: Tensor, precision: Precision) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.logits(tokens)


def _gram(x: Tensor) -> Tensor:
    """x^T x of (tokens, C), fp32."""
    with torch.autocast(x.device.type, enabled=False):  # hooks run within that of the model, which would round the sums
        return x.T @ x


@torch.enable_grad()
def _backward(model: GPT, tokens: Tensor, precision: Precision, generator: torch.Generator) -> None:
    """Gradients of the summed loss of labels that are drawn from the model, at every output that has a hook."""
    logits = _logits(model, tokens, precision).flatten(0, 1)  # (tokens, V)
    labels = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
    F.cross_entropy(logits, labels, reduction="sum").backward()


def _table_moments(second: Tensor, energy: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """H (C, C) and g (R,) of a table, from gradients' second moment, and per row their summed squares and occurrences."""
    trace = second.trace()
    if trace == 0:  # the table has no influence on the loss
        return second, energy
    smoothed = energy + PRIOR_OCCURRENCES * energy.sum() / count.sum()
    return second / trace, smoothed * (trace / smoothed.sum())


def _add(hessian: Tensor, gradients: Tensor, other_hessian: Tensor, other_gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The one H and g closest to the sum of two costs of a matrix: of each row, and of all rows together, the sum over E = identity."""
    share = gradients.sum() / (gradients.sum() + other_gradients.sum())
    both = share * hessian + (1 - share) * other_hessian
    return both, (gradients * hessian.trace() + other_gradients * other_hessian.trace()) / both.trace()


def _tables(model: GPT) -> dict[str, nn.Embedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _linears(model: GPT) -> dict[str, tuple[nn.Module, torch.Size]]:
    """Name of the weight -> its layer and the weight's shape (R, C); a tied head as if it had a weight of its own."""
    names = [name for weights in model.linear_inputs().values() for name in weights]
    linears = {name: (model.get_submodule(name.removesuffix(".weight")), model.get_parameter(name).shape) for name in names}
    head = {f"{HEAD}.weight": (model.head, model.token_embedding.weight.shape)} if isinstance(model.head, TiedHead) else {}
    return linears | head


class _InputSums(ExitStack):
    """Within the context, adds up x x^T of every input of linear layers: name of the input -> (C, C) fp64."""

    def __init__(self, model: GPT, device: torch.device) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        linears = _linears(model)
        for name, weight in ({name: weights[0] for name, weights in model.linear_inputs().items()} | {HEAD: f"{HEAD}.weight"}).items():
            linear, (_, num_columns) = linears[weight]
            self.sums[name] = torch.zeros(num_columns, num_columns, dtype=torch.float64, device=device)
            self.callback(linear.register_forward_pre_hook(self._watch_input(self.sums[name])).remove)

    @staticmethod
    def _watch_input(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2).float()  # (tokens, C)
            total.add_(_gram(x))

        return watch


class _OutputSums(ExitStack):
    """Within the context, adds up the squared gradients at every output of linear layers: name of the weight -> (R,) fp64."""

    def __init__(self, model: GPT, device: torch.device) -> None:
        super().__init__()
        self.sums: dict[str, Tensor] = {}
        for name, (linear, (num_rows, _)) in _linears(model).items():
            self.sums[name] = torch.zeros(num_rows, dtype=torch.float64, device=device)
            self.callback(linear.register_forward_hook(self._watch_output(self.sums[name])).remove)

    @staticmethod
    def _watch_output(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(gradient: Tensor) -> None:
            total.add_(gradient.flatten(0, -2).float().square().sum(0))

        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(add)

        return watch


class _TableSums(ExitStack):
    """Within the context, sums of gradients g at the outputs of embedding tables, all fp64.

    Name of the table -> g g^T (C, C), |g|^2 of each row (R,), occurrences of each row (R,). The outputs of the tables are where
    gradients begin: the parameters need none.
    """

    def __init__(self, model: GPT, device: torch.device) -> None:
        super().__init__()
        self.sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, table in _tables(model).items():
            shapes = ((table.embedding_dim,) * 2, (table.num_embeddings,), (table.num_embeddings,))
            second, energy, count = (torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes)
            self.sums[name] = second, energy, count
            self.callback(table.register_forward_hook(self._watch_output(*self.sums[name])).remove)

    @staticmethod
    def _watch_output(second: Tensor, energy: Tensor, count: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].flatten()

            def add(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2).float()  # (tokens, C)
                second.add_(_gram(g))
                energy.index_add_(0, rows, g.square().sum(1).double())
                count.index_add_(0, rows, torch.ones_like(rows, dtype=torch.float64))

            output.requires_grad_(True)
            output.register_hook(add)

        return watch
