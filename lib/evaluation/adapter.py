"""Training named groups of the model's own parameters on rows of the text that is scored.

Shapes: N targets, T tokens of a row, R rows of one forward pass.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from lib.evaluation.config import AdaptationParams
from lib.evaluation.job import Job
from lib.evaluation.score import gather_rows, mode
from lib.evaluation.trainable import match_groups
from lib.evaluation.windows import Integers, batch_size
from lib.model.attention import ALL_POSITIONS
from lib.model.parts import parts_of

ADAM_BETA2 = 0.999  # pr585 leaves torch's default
BACKWARD_WORK = 2  # cost of a backward pass in forward passes

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], AdaptationParams], torch.optim.Optimizer]] = {
    "adamw": lambda parameters, settings: torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(settings.momentum, ADAM_BETA2), weight_decay=settings.weight_decay),
    "sgd": lambda parameters, settings: torch.optim.SGD(
        parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay),
}


def scheduled_lr(settings: AdaptationParams, part: int, num_parts: int) -> float:
    """Learning rate of part 0 .. `num_parts` - 1; a cosine starts at ``lr`` and would reach 0 after the last part."""
    if settings.lr_schedule == "constant":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * part / num_parts))


def training_work(num_targets: int) -> int:
    """Cost of training on rows of tokens once, in inputs scored."""
    return (1 + BACKWARD_WORK) * num_targets


class Adapter:
    """Trains named groups of the model's parameters; each process trains on its share of every step's rows, all end with the same weights.

    Args:
        job: the job whose model is changed.
        settings: what is trained, and how.
        targets: (M,) numbers of the targets of another text, put together from documents of the stream, that is trained on instead of it.

    Raises:
        ValueError: a trainable group that does not exist or matches nothing.
    """

    def __init__(self, job: Job, settings: AdaptationParams, targets: Integers | None = None) -> None:
        self._job, self._settings, self._targets = job, settings, targets
        self._text = job.stream
        if targets is not None:
            self._text = job.stream[torch.from_numpy(np.append(targets, targets[-1] + 1)).to(job.stream.device)]
        parameters = dict(job.forward.model.named_parameters())
        members = match_groups(settings.trainable, parts_of(job.forward.model))
        names = {name for group in members.values() for name in group}
        self._frozen = [parameter for name, parameter in parameters.items() if name not in names]
        self._trainable = [parameter for name, parameter in parameters.items() if name in names]
        self._optimizer = OPTIMIZERS[settings.optimizer](self._trainable, settings)

    def train(self, row_starts: Integers, lr: float, epochs: int) -> None:
        """Train on the rows of `window_tokens` targets whose first inputs are given, `epochs` times in order.

        Args:
            row_starts: first inputs of rows that lie side by side.
            lr: learning rate.
            epochs: passes over the rows.
        """
        if not len(row_starts) or not epochs:
            return
        window_tokens = self._job.params.window_tokens
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        batches = torch.split(torch.from_numpy(row_starts).to(self._job.stream.device), self._settings.batch_sequences)
        with mode(self._job.forward.model, training=True), frozen(self._frozen):
            for _ in range(epochs):
                for batch in batches:
                    self._step(batch)
        self._optimizer.zero_grad()
        trained = np.arange(row_starts[0], row_starts[-1] + window_tokens)
        if self._targets is not None:
            trained = self._targets[trained]
        for run in np.split(trained, np.flatnonzero(np.diff(trained) != 1) + 1):
            self._job.sheet.ledger.trained(int(run[0]), int(run[-1]), epochs * len(batches), lr)

    def affordable_epochs(self, num_targets: int, num_left: int) -> int:
        """Epochs on the next `num_targets` targets when `num_left` (these among them) are still to be trained on.

        All that the settings say, or fewer where ``evaluate.when_late`` allows it and the time would not suffice.
        """
        wanted = self._settings.epochs
        if self._job.params.when_late == "fail":
            return wanted
        epochs = int(wanted * self._job.limit.affordable(wanted * training_work(num_left)) + 1e-6)
        self._job.limit.leave_out((wanted - epochs) * training_work(num_targets))
        return epochs

    def _step(self, starts: Tensor) -> None:
        window_tokens, process = self._job.params.window_tokens, self._job.process
        num_targets = len(starts) * window_tokens
        own = starts[process.rank :: process.world_size]
        self._optimizer.zero_grad()
        if len(own):
            full = len(own) == -(-self._settings.batch_sequences // process.world_size)
            for part in torch.split(own, batch_size(window_tokens, self._job.params.batch_tokens)):
                rows = gather_rows(self._text, part, window_tokens + 1)  # (R, T+1)
                (self._job.forward(rows, ALL_POSITIONS, repeats=full).sum() / num_targets).backward()
        self._sum_gradients()
        if self._settings.grad_clip is not None:
            nn.utils.clip_grad_norm_(self._trainable, self._settings.grad_clip)
        self._optimizer.step()
        self._job.limit.advance(training_work(num_targets))

    def _sum_gradients(self) -> None:
        if self._job.process.world_size == 1:
            return
        # A process without rows contributes zeros: it must take part, or the others wait for ever.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._trainable]
        total = self._job.process.sum(torch.cat([gradient.flatten() for gradient in gradients]))
        for parameter, gradient in zip(self._trainable, torch.split(total, [p.numel() for p in self._trainable]), strict=True):
            parameter.grad = gradient.view_as(parameter)


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """No gradients for some parameters, for the time of the training only.

    torch chooses the kernel of a matrix product by requires_grad, even without gradients, and a model that scores with other
    kernels than before gives scores that differ in the last bits.
    """
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
