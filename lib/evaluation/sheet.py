"""The losses of one stream's targets, written in any order by any number of processes, each exactly once.

Shapes: N targets, B rows, P targets of a row, V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.distributed import Process
from lib.evaluation.ledger import Ledger
from lib.evaluation.tilt import NO_HINT, Tilt

Losses = npt.NDArray[np.float32]


class ScoreSheet:
    """Losses and the evidence on how they came about.

    Nothing waits for the device before `collect`, so that a GPU is never idle between batches.

    Args:
        num_targets: N.
        device: where the losses are computed.
        tilt: what the losses and the wanted distribution are tilted by; None for nothing.
        wanted: a target; who scores it shall also call `write_distribution`, and the audit compares the two. None for none.

    Attributes:
        ledger: what was scored and trained on.
        wanted: as above.
    """

    def __init__(self, num_targets: int, device: torch.device, *, tilt: Tilt | None = None, wanted: int | None = None) -> None:
        self.num_targets, self.ledger, self.wanted, self._tilt = num_targets, Ledger(), wanted, tilt
        self._nats = torch.zeros(num_targets + 1, device=device)  # the last place is for what is not wanted
        self._context = torch.zeros(num_targets + 1, device=device, dtype=torch.int32)
        self._counts = torch.zeros(num_targets + 1, device=device, dtype=torch.int32)
        self._distribution: Tensor | None = None
        self._gain = torch.zeros((), device=device, dtype=torch.float64)

    def hints(self, targets: Tensor) -> Tensor | None:
        """The tokens (B, P) whose losses the tilt needs besides those of the `targets` (B, P), `NO_HINT` for none; None without tilt."""
        return None if self._tilt is None else self._tilt.hints[targets]

    def write(self, targets: Tensor, nats: Tensor, context: Tensor) -> None:
        """Write losses.

        Args:
            targets: (B, P) int64; N for a loss that belongs to no target.
            nats: (B, P) fp32; (2, B, P), of the targets and of their hints, where there is a tilt.
            context: (B, P) or (P,) int64, number of inputs that the model saw before the target's own.
        """
        if self._tilt is not None:
            untilted, nats = nats[0], self._tilt.losses(nats, targets)
            self._gain += (untilted - nats).double().sum()
        self._nats[targets] = nats
        self._context[targets] = context.to(torch.int32).expand_as(targets)
        self._counts.index_put_((targets,), torch.ones_like(targets, dtype=torch.int32), accumulate=True)

    def write_distribution(self, log_probabilities: Tensor) -> None:
        """The distribution (V,) that the wanted target was scored with, before the tilt."""
        assert self.wanted is not None
        log_probabilities = log_probabilities.float()
        self._distribution = log_probabilities if self._tilt is None else self._tilt.distribution(log_probabilities, self.wanted)

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

    def tilt_figures(self, process: Process) -> dict[str, float]:
        """How many targets have a hint, and the nats per target that the tilt has saved; nothing without tilt."""
        if self._tilt is None:
            return {}
        num_tilted, gain = int((self._tilt.hints != NO_HINT).sum()), float(process.sum(self._gain.clone()))
        return {"tilted_targets": num_tilted, "tilt_gain": gain / self.num_targets}

    def num_scored(self, end: int, process: Process) -> int:
        """How many of the first `end` targets have been scored, in all processes together."""
        return int(process.sum(self._counts[:end].sum()))

    def collect_unfinished(self, process: Process) -> tuple[Losses, npt.NDArray[np.bool_]]:
        """What there is: (N,) fp32 nats, and which targets were scored."""
        scored = process.sum(self._counts[:-1].clone()) == 1
        return process.sum(self._nats[:-1].clone()).cpu().numpy(), scored.cpu().numpy()

    def collect_distribution(self, process: Process) -> Losses:
        """(V,) log-probabilities from which the wanted target was scored, the same in every process.

        Raises:
            RuntimeError: `write_distribution` was called in no process, or in more than one.
        """
        found = process.merge({} if self._distribution is None else {process.rank: self._distribution.cpu().numpy()})
        if len(found) != 1:
            raise RuntimeError(f"expected the distribution of the wanted target once, found it {len(found)} times")
        return next(iter(found.values()))
