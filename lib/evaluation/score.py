"""Scoring a token stream window by window: the loss of every target exactly once, over any number of processes.

Shapes: N targets, B windows of a batch, T inputs of a window, P scored targets of a window.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lib.distributed import Process
from lib.evaluation.windows import Windows, plain_windows, split_batches
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


class Scorer:
    """Collects the loss of every target of one stream; each process computes its share of the batches.

    Nothing waits for the device before `collect`, so that a GPU is never idle between batches.

    Args:
        model: called as `GPT.forward`; may change between calls of `score`.
        stream: (N+1,) int32 on the device of the model, from `load_stream`.
        batch_windows: windows in one forward pass.
        precision: of the matrix products.
        process: which share of the batches is computed here.
        advance: called after each batch (of any process) with its number of inputs.
    """

    def __init__(self, model: nn.Module, stream: Tensor, *, batch_windows: int, precision: Precision, process: Process,
                 advance: Callable[[int], None] = lambda _: None) -> None:
        self._model, self._stream, self._batch_windows = model, stream, batch_windows
        self._precision, self._process, self._advance = precision, process, advance
        self._nats = torch.zeros(len(stream) - 1, device=stream.device)
        self._counts = torch.zeros(len(stream) - 1, device=stream.device, dtype=torch.int32)

    @torch.no_grad()
    def score(self, windows: Windows) -> None:
        """Score the targets of some windows, with the model as it is now and without gradients."""
        starts = torch.from_numpy(windows.start).to(self._stream.device)
        done = 0
        with mode(self._model, training=False), autocast(self._stream.device, self._precision):
            for number, batch in enumerate(split_batches(windows, self._batch_windows)):
                size, length, num_scored = len(batch.start), int(batch.length[0]), int(batch.num_scored[0])
                if number % self._process.world_size == self._process.rank:
                    self._score_batch(starts[done : done + size], length, num_scored)
                done += size
                self._advance(size * length)

    def _score_batch(self, start: Tensor, length: int, num_scored: int) -> None:
        rows = gather_rows(self._stream, start, length + 1)  # (B, T+1)
        scored = slice(length - num_scored, length)
        nats = self._model(rows[:, :-1], rows[:, 1:][:, scored], scored)  # (B, P)
        target = start[:, None] + torch.arange(scored.start, scored.stop, device=start.device)  # (B, P)
        self._nats[target] = nats
        self._counts.index_put_((target,), torch.ones_like(target, dtype=torch.int32), accumulate=True)

    def collect(self) -> npt.NDArray[np.float32]:
        """Combine the shares of all processes, once, after everything has been scored.

        Returns:
            (N,) fp32 nats, the same in every process.

        Raises:
            RuntimeError: a target that was not scored, or scored more than once.
        """
        counts = self._process.sum(self._counts)
        if wrong := int((counts != 1).sum()):
            first = int((counts != 1).int().argmax())
            raise RuntimeError(f"expected every target to be scored exactly once; {wrong} were not, "
                               f"the first is target {first}, scored {int(counts[first])} times")
        nats: npt.NDArray[np.float32] = self._process.sum(self._nats).cpu().numpy()
        return nats


def score_plain(model: nn.Module, tokens: npt.NDArray[np.uint16], *, window_tokens: int, batch_windows: int, precision: Precision,
                process: Process) -> npt.NDArray[np.float32]:
    """Loss of every target in windows side by side.

    Args:
        model: called as `GPT.forward`, on the process's device.
        tokens: (N+1,) uint16.
        window_tokens: inputs that the model sees at once.
        batch_windows: windows in one forward pass.
        precision: of the matrix products.
        process: every process calls this and gets the whole result.

    Returns:
        (N,) fp32 nats.

    Raises:
        ValueError: fewer than two tokens.
    """
    scorer = Scorer(model, load_stream(tokens, process.device), batch_windows=batch_windows, precision=precision, process=process)
    scorer.score(plain_windows(len(tokens) - 1, window_tokens))
    return scorer.collect()
