"""Score-first test-time training (pr585): a chunk is scored without gradients, then trained on, then the next chunk is scored.

So the model that scores a target has been trained on earlier targets only, and nothing is scored twice. `Adaptation` records
the evidence. Shapes: N targets, T tokens of a row, R rows of one optimizer step.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.distributed import Process
from lib.evaluation.config import EvaluateParams, ScoreFirstParams
from lib.evaluation.score import Scorer, autocast, gather_rows, mode
from lib.evaluation.trainable import describe_groups, match_groups
from lib.evaluation.windows import Integers, sliding_windows
from lib.progress import say

ADAM_BETA2 = 0.999  # pr585 leaves torch's default

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], ScoreFirstParams], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, settings: torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(settings.momentum, ADAM_BETA2), weight_decay=settings.weight_decay),
    "sgd": lambda parameters, settings: torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay),
}


class Adaptation(NamedTuple):
    """What happened to one chunk, in the order of the fields: its targets were scored, then some were trained on (the last chunk: none)."""

    chunk: int
    first_scored: int
    last_scored: int
    first_trained: int | None
    last_trained: int | None
    num_steps: int
    lr: float


def chunk_lr(settings: ScoreFirstParams, chunk: int, num_chunks: int) -> float:
    """Learning rate after chunk 0 .. `num_chunks` - 2; the cosine reaches 0 at the last chunk, which is never trained on."""
    if settings.lr_schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * chunk / (num_chunks - 1)))


class Adapter:
    """Trains named groups of a model's parameters on rows of tokens; all others are frozen.

    Args:
        model: changed in place.
        stream: (N+1,) int32 on the model's device.
        params: the section ``evaluate``.
        process: each process trains on its share of every step's rows; all end with the same weights.
        advance: called after each step with the work done, in inputs scored.

    Raises:
        ValueError: a trainable group that does not exist or matches nothing.
    """

    def __init__(self, model: nn.Module, stream: Tensor, params: EvaluateParams, process: Process, advance: Callable[[int], None]) -> None:
        self._model, self._stream, self._params, self._process, self._advance = model, stream, params, process, advance
        parameters = dict(model.named_parameters())
        sizes = {name: parameter.numel() for name, parameter in parameters.items()}
        members = match_groups(params.score_first.trainable, sizes)
        say(f"score_first trains {describe_groups(members, sizes)}", enabled=process.is_main)
        names = {name for group in members.values() for name in group}
        self._frozen = [parameter for name, parameter in parameters.items() if name not in names]
        self._trainable = [parameter for name, parameter in parameters.items() if name in names]
        self._optimizer = OPTIMIZERS[params.score_first.optimizer](self._trainable, params.score_first)

    def train(self, row_starts: Integers, lr: float) -> int:
        """Train on the rows of `window_tokens` targets whose first inputs are given, `epochs` times in order.

        Returns:
            The number of optimizer steps.
        """
        settings = self._params.score_first
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        starts = torch.from_numpy(row_starts).to(self._stream.device)
        batches = torch.split(starts, settings.batch_sequences)
        with mode(self._model, training=True), _frozen(self._frozen):
            for _ in range(settings.epochs):
                for batch in batches:
                    self._step(batch)
        return settings.epochs * len(batches)

    def _step(self, starts: Tensor) -> None:
        num_targets = len(starts) * self._params.window_tokens
        own = starts[self._process.rank :: self._process.world_size]
        self._optimizer.zero_grad()
        if len(own):
            rows = gather_rows(self._stream, own, self._params.window_tokens + 1)  # (R, T+1)
            with autocast(self._stream.device, self._params.precision):
                nats = self._model(rows[:, :-1], rows[:, 1:])  # (R, T)
            (nats.sum() / num_targets).backward()
        self._sum_gradients()
        nn.utils.clip_grad_norm_(self._trainable, self._params.score_first.grad_clip)
        self._optimizer.step()
        self._advance(training_work(num_targets))

    def _sum_gradients(self) -> None:
        if self._process.world_size == 1:
            return
        # A process without rows contributes zeros: it must take part, or the others wait for ever.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainable]
        total = self._process.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(self._trainable, torch.split(total, [p.numel() for p in self._trainable]), strict=True):
            parameter.grad = gradient.view_as(parameter)


@contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    # Not for longer than the training: torch chooses the kernel of a matrix product by requires_grad, even without gradients, and
    # a model that scores with other kernels than before gives scores that differ in the last bits.
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def training_work(num_targets: int) -> int:
    """Cost of training on rows of tokens, in inputs scored: the backward pass costs about twice the forward pass."""
    return 3 * num_targets


def score_first(model: nn.Module, stream: Tensor, params: EvaluateParams, process: Process,
                advance: Callable[[int], None] = lambda _: None) -> tuple[npt.NDArray[np.float32], list[Adaptation]]:
    """Score a stream with sliding windows, adapting a copy of the model chunk by chunk.

    Args:
        model: the artifact's model; it is not changed.
        stream: (N+1,) int32 on the model's device, from `load_stream`.
        params: the section ``evaluate``.
        process: every process calls this and gets the whole result.
        advance: called with each piece of work done, in inputs scored.

    Returns:
        (N,) fp32 nats, and what was done chunk by chunk.

    Raises:
        ValueError: a trainable group that does not exist or matches nothing.
    """
    settings = params.score_first
    adapted = copy.deepcopy(model)
    scorer = Scorer(adapted, stream, batch_windows=params.batch_windows, precision=params.precision, process=process, advance=advance)
    adapter = Adapter(adapted, stream, params, process, advance)
    num_targets = len(stream) - 1
    windows = sliding_windows(num_targets, params.window_tokens, params.stride_tokens)
    num_chunks = -(-num_targets // settings.chunk_tokens)
    first_windows = np.searchsorted(windows.first_scored, np.arange(num_chunks + 1) * settings.chunk_tokens).tolist()
    log = []
    for chunk in range(num_chunks):
        scored = windows.select(slice(first_windows[chunk], first_windows[chunk + 1]))
        scorer.score(scored)
        first_scored, last_scored = int(scored.first_scored[0]), int(scored.end[-1]) - 1
        assert first_scored == chunk * settings.chunk_tokens, "chunks and scored ranges must begin together"
        if chunk == num_chunks - 1:  # nothing is left to gain from
            log.append(Adaptation(chunk, first_scored, last_scored, None, None, 0, 0.0))
            continue
        rows = np.arange(first_scored, first_scored + settings.chunk_tokens, params.window_tokens)
        first_trained, last_trained = int(rows[0]), int(rows[-1]) + params.window_tokens - 1
        assert last_trained <= last_scored, "a target must be scored before it is trained on"
        lr = chunk_lr(settings, chunk, num_chunks)
        log.append(Adaptation(chunk, first_scored, last_scored, first_trained, last_trained, adapter.train(rows, lr), lr))
    return scorer.collect(), log
