"""The losses of one stream's targets, written in any order by any number of processes, each exactly once.

Shapes: N targets, B rows, P targets of a row, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.distributed import Process
from lib.evaluation.ledger import Ledger

Losses = npt.NDArray[np.float32]


class ScoreSheet:
    """Losses and the evidence on how they came about.

    Nothing waits for the device before `collect`, so that a GPU is never idle between batches.

    Args:
        num_targets: N.
        device: where the losses are computed.
        wants_last: whether who scores target N - 1 shall also call `write_last`; the audit compares the two.
        wanted: the target whose distribution shall be written with `write_last` instead of the last one's.

    Attributes:
        ledger: what was scored and trained on.
        wanted: target whose distribution shall be written; None for none.
    """

    def __init__(self, num_targets: int, device: torch.device, *, wants_last: bool = False, wanted: int | None = None) -> None:
        self.num_targets, self.ledger, self.wanted = num_targets, Ledger(), num_targets - 1 if wants_last else wanted
        self._nats = torch.zeros(num_targets + 1, device=device)  # the last place is for what is not wanted
        self._context = torch.zeros(num_targets + 1, device=device, dtype=torch.int32)
        self._counts = torch.zeros(num_targets + 1, device=device, dtype=torch.int32)
        self._last: Tensor | None = None

    @property
    def wants_last(self) -> bool:
        """Whether somebody shall call `write_last`."""
        return self.wanted is not None

    def write(self, targets: Tensor, nats: Tensor, context: Tensor) -> None:
        """Write losses.

        Args:
            targets: (B, P) int64; N for a loss that belongs to no target.
            nats: (B, P) fp32.
            context: (B, P) or (P,) int64, number of inputs that the model saw before the target's own.
        """
        self._nats[targets] = nats
        self._context[targets] = context.to(torch.int32).expand_as(targets)
        self._counts.index_put_((targets,), torch.ones_like(targets, dtype=torch.int32), accumulate=True)

    def write_last(self, log_probabilities: Tensor) -> None:
        """The distribution (V,) that the wanted target, the last one as a rule, was scored with."""
        self._last = log_probabilities.float()

    def copy(self, targets: Tensor, other: "ScoreSheet") -> None:
        """Take over losses (B, P) of another sheet of the same stream, as far as this process has computed them."""
        self._nats[targets], self._context[targets] = other._nats[targets], other._context[targets]
        self._counts.index_put_((targets,), other._counts[targets], accumulate=True)

    def collect(self, process: Process) -> tuple[Losses, npt.NDArray[np.int32]]:
        """Combine the shares of all processes, once, after everything has been scored.

        Returns:
            (N,) fp32 nats and (N,) int32 numbers of inputs before each target, the same in every process.

        Raises:
            RuntimeError: a target that was not scored, or scored more than once.
        """
        counts = process.sum(self._counts[:-1].clone())
        if wrong := int((counts != 1).sum()):
            first = int((counts != 1).int().argmax())
            raise RuntimeError(f"expected every target to be scored exactly once; {wrong} were not, "
                               f"the first is target {first}, scored {int(counts[first])} times")
        return process.sum(self._nats[:-1].clone()).cpu().numpy(), process.sum(self._context[:-1].clone()).cpu().numpy()

    def num_scored(self, end: int, process: Process) -> int:
        """How many of the first `end` targets have been scored, in all processes together."""
        return int(process.sum(self._counts[:end].sum()))

    def collect_unfinished(self, process: Process) -> tuple[Losses, npt.NDArray[np.bool_]]:
        """What there is: (N,) fp32 nats, and which targets were scored."""
        scored = process.sum(self._counts[:-1].clone()) == 1
        return process.sum(self._nats[:-1].clone()).cpu().numpy(), scored.cpu().numpy()

    def collect_last(self, process: Process) -> Losses:
        """(V,) log-probabilities from which the last target was scored, the same in every process.

        Raises:
            RuntimeError: `write_last` was called in no process, or in more than one.
        """
        found = process.merge({} if self._last is None else {process.rank: self._last.cpu().numpy()})
        if len(found) != 1:
            raise RuntimeError(f"expected the distribution of the last target once, found it {len(found)} times")
        return next(iter(found.values()))
