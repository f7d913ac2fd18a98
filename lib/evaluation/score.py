"""Scoring windows of a token stream: the loss of every target exactly once, over any number of processes.

Shapes: N targets, B windows of a batch, T inputs of a window, P scored targets of a window.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.distributed import Process
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.windows import Windows, batch_size, split_batches
from lib.params import Precision


@contextmanager
def mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Training or evaluation mode for one phase; the mode before it comes back at its end."""
    before = model.training
    model.train(training)
    try:
        yield
    finally:
        model.train(before)


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context in which matrix products run in bfloat16 where `precision` says so."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def load_stream(tokens: npt.NDArray[np.uint16], device: torch.device) -> Tensor:
    """Tokens as (N+1,) int32 on the device: half the memory of int64, in a type that can be gathered."""
    return torch.from_numpy(tokens.astype(np.int32)).to(device)


def gather_rows(stream: Tensor, start: Tensor, num_tokens: int) -> Tensor:
    """Rows of `num_tokens` tokens of the stream from each of `start` (B,), as (B, `num_tokens`) int64."""
    return stream.unfold(0, num_tokens, 1)[start].long()


class Forward:
    """A model's forward pass as scoring and adaptation call it, compiled for the shapes that repeat.

    Attributes:
        model: called as `GPT.forward`.
        compiled: whether calls with `repeats` are compiled; others would each compile anew.

    Args:
        model: see above.
        precision: precision of the matrix products.
        compiled: see above.
    """

    def __init__(self, model: nn.Module, precision: Precision, *, compiled: bool = False) -> None:
        self.model, self.compiled, self._precision = model, compiled, precision

    def __call__(self, rows: Tensor, positions: slice, attention_tokens: int | None = None, hints: Tensor | None = None, *,
                 repeats: bool = False) -> Tensor:
        """Losses (B, P) fp32 of the tokens that follow the `positions` of `rows` (B, T+1) int64.

        With `hints` (B, P), other tokens, (2, B, P): their losses as well. Those of negative ones mean nothing.
        """
        targets = rows[:, 1:][:, positions]
        if hints is not None:
            targets = torch.stack((targets, hints.clamp(min=0).long()))
        with autocast(rows.device, self._precision):
            nats: Tensor = self.model(rows[:, :-1], targets, positions, attention_tokens, compiled=repeats and self.compiled)
        return nats

    def log_probabilities(self, rows: Tensor, position: int, attention_tokens: int | None = None) -> Tensor:
        """The distribution (B, V) over the token that follows one position of `rows` (B, T+1) int64."""
        with autocast(rows.device, self._precision):
            logits: Tensor = self.model.logits(rows[:, :-1], slice(position, position + 1), attention_tokens)  # type: ignore[operator]
        return logits[:, 0].log_softmax(-1)


class Scorer:
    """Scores windows of one stream with a model as it is at that time; each process computes its share of the batches.

    Args:
        forward: forward pass of the model.
        stream: (N+1,) int32 on the device of the model, from `load_stream`.
        sheet: where the losses go.
        batch_tokens: inputs in one forward pass.
        process: says which share of the batches is computed here.
        advance: called after each batch (of any process) with its number of inputs.
    """

    def __init__(self, forward: Forward, stream: Tensor, sheet: ScoreSheet, *, batch_tokens: int, process: Process,
                 advance: Callable[[int], None] = lambda _: None) -> None:
        self._forward, self._stream, self._sheet = forward, stream, sheet
        self._batch_tokens, self._process, self._advance = batch_tokens, process, advance

    @torch.no_grad()
    def score(self, windows: Windows) -> None:
        """Score the targets of consecutive windows, without gradients."""
        self._sheet.ledger.scored(int(windows.first_scored[0]), int(windows.end[-1]) - 1)
        starts = torch.from_numpy(windows.start).to(self._stream.device)
        done = 0
        with mode(self._forward.model, training=False):
            batches = split_batches(windows, self._batch_tokens, self._process.world_size)
            shapes = Counter(map(_shape, batches))
            for number, batch in enumerate(batches):
                size = len(batch.start)
                if number % self._process.world_size == self._process.rank:
                    full = size == batch_size(int(windows.length.max()), self._batch_tokens)  # such a batch may come again in a later call
                    self._score_batch(starts[done : done + size], batch, repeats=full or shapes[_shape(batch)] > 1)
                done += size
                self._advance(batch.work)

    def _score_batch(self, start: Tensor, batch: Windows, *, repeats: bool) -> None:
        _, length, num_scored = _shape(batch)
        rows = gather_rows(self._stream, start, length + 1)  # (B, T+1)
        scored = slice(length - num_scored, length)
        targets = self._targets(start + scored.start, num_scored)  # (B, P)
        nats = self._forward(rows, scored, batch.attention_tokens, self._sheet.hints(targets), repeats=repeats)
        self._sheet.write(targets, nats, torch.arange(scored.start, length, device=start.device))
        if (wanted := self._sheet.wanted) is not None:
            for row in np.flatnonzero((batch.first_scored <= wanted) & (wanted < batch.end)).tolist():
                position = wanted - int(batch.start[row])
                self._sheet.write_distribution(self._forward.log_probabilities(rows[row:row + 1], position, batch.attention_tokens)[0])

    def _targets(self, first: Tensor, num_scored: int) -> Tensor:
        return first[:, None] + torch.arange(num_scored, device=first.device)  # (B, P)


def _shape(batch: Windows) -> tuple[int, int, int]:
    """Windows of a batch, inputs of each, scored targets of each."""
    return len(batch.start), int(batch.length[0]), int(batch.num_scored[0])
