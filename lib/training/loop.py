"""The training run: budget, steps, averages, late QAT, interruption and exact resume, choice of the checkpoint.

Shapes: B sequences of this process, T tokens.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from lib.data.loader import Loader
from lib.distributed import Process
from lib.model.gpt import GPT
from lib.progress import Progress, say
from lib.training.averaging import Averages
from lib.training.config import TrainParams
from lib.training.optim import Optimizers
from lib.training.qat import FakeQuantization
from lib.training.resume import load_resume, save_resume
from lib.training.schedule import lr_multiplier, muon_momentum

CURVE_STEPS = 10  # steps averaged into one point of the loss curve; losses are read from the device only then
RESUME_INTERVAL_SECONDS = 1.0  # at least this long between two saved states,
RESUME_SHARE = 0.02  # and long enough that saving takes no more than this share of the time
INTERRUPTED_EXIT_CODE = 130


class TrainingError(ValueError):
    """A run that cannot go on; the message names the step, what was found and the remedy."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        candidates: weights by name of average (``raw``, ``ema``, ``swa``), parameter name -> fp32 tensor.
        loss_curve: (tokens seen, mean loss in nats per token over the last steps) rows.
        num_steps: optimizer steps done.
        num_tokens: tokens trained on, over all processes.
        seconds: time spent in training steps, interruptions left out.
    """

    candidates: dict[str, dict[str, Tensor]]
    loss_curve: list[tuple[int, float]]
    num_steps: int
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Training rate over all processes."""
        return self.num_tokens / self.seconds


class Run:
    """The state of one training run, between steps; `state_dict` is all that a continued run needs."""

    def __init__(self, model: GPT, params: TrainParams, loader: Loader, process: Process) -> None:
        self.params, self.loader, self.process = params, loader, process
        self.model = model
        self.losses_of = torch.compile(model, fullgraph=True) if params.compile else model
        self.optimizers = Optimizers(model, params.optimizer)
        self.averages = Averages(model, params.averaging)
        self.fake_quantization = FakeQuantization(model, params.qat)
        self.num_steps = 0
        self.seconds = 0.0
        self.loss_curve: list[tuple[int, float]] = []
        self._pending_losses: list[Tensor] = []

    @property
    def budget(self) -> float:
        """The whole budget, in steps or seconds."""
        budget = self.params.budget_steps if self.params.budget_seconds is None else self.params.budget_seconds
        assert budget is not None
        return budget

    @property
    def done(self) -> float:
        """How much of the budget is done, in steps or seconds."""
        return self.num_steps if self.params.budget_seconds is None else self.seconds

    @property
    def is_finished(self) -> bool:
        """Whether the budget has no room for another step as long as the mean of those done."""
        return self.num_steps > 0 and self.done * (self.num_steps + 1) > self.budget * self.num_steps

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, over all processes."""
        return self.num_steps * self.params.batch_sequences * self.params.sequence_tokens

    def step(self) -> None:
        """One optimizer step on the next global batch."""
        fraction = self.done / self.budget
        multiplier = lr_multiplier(fraction, self.params.optimizer.warmdown)
        momentum = muon_momentum(fraction, self.params.optimizer.momentum_start, self.params.optimizer.momentum,
                                 self.params.optimizer.momentum_warmup)
        with self.fake_quantization.applied(self.fake_quantization.is_on(multiplier)):
            self._pending_losses.append(self.backward())
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        if self.process.world_size > 1:
            flat = self.process.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in
                                             zip(flat.split([gradient.numel() for gradient in gradients]), gradients, strict=True)])
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.optimizer.grad_clip)
        self._pending_losses[-1] += 0 * norm  # an infinite gradient makes the recorded loss NaN, before a spoilt state is saved
        self.optimizers.step(multiplier, momentum)
        self.model.zero_grad()
        self.num_steps += 1
        self.averages.update(self.num_steps, multiplier)

    def backward(self) -> Tensor:
        """Gradients of the mean loss over the global batch, this process's share of the sum; returns its share of the loss."""
        inputs, targets = self.loader.batch(self.num_steps, self.process)  # (B, T) each
        device = self.process.device
        total = torch.zeros((), device=device)
        size = self.params.micro_batch_sequences
        for rows, row_targets in zip(inputs.to(device).split(size), targets.to(device).split(size), strict=True):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.params.precision == "bf16"):
                loss = self.losses_of(rows, row_targets).sum() / (self.params.batch_sequences * self.params.sequence_tokens)
            loss.backward()
            total += loss.detach()
        return total

    def record_losses(self) -> float:
        """Add the mean loss of the steps since the last call to the curve; the only read from the device within the run.

        Raises:
            TrainingError: the loss is not finite.
        """
        loss = self._mean_pending_loss()
        self._pending_losses.clear()
        self.loss_curve.append((self.num_tokens, loss))
        return loss

    def _mean_pending_loss(self) -> float:
        loss = float(self.process.sum(torch.stack(self._pending_losses).mean()))
        if not math.isfinite(loss):
            raise TrainingError(f"train: step {self.num_steps}: expected a finite loss, found {loss}; lower the learning rates "
                                "(train.optimizer) and rerun: the last good state is kept")
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run needs.

        Raises:
            TrainingError: a loss since the last curve point was not finite, so that this state is not worth keeping.
        """
        if self._pending_losses:
            self._mean_pending_loss()
        return {"pending_losses": self._pending_losses,
                "model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(), "averages": self.averages.state_dict(),
                "num_steps": self.num_steps, "seconds": self.seconds, "loss_curve": self.loss_curve}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.averages.load_state_dict(state["averages"])
        self.num_steps, self.seconds = state["num_steps"], state["seconds"]
        self.loss_curve = [(tokens, loss) for tokens, loss in state["loss_curve"]]
        self._pending_losses = state["pending_losses"]


def train(model: GPT, params: TrainParams, loader: Loader, process: Process, resume_path: Path) -> TrainResult:
    """Train an initialised model on this process's device for the whole budget.

    On SIGINT or SIGTERM the state is saved and the process exits with status 130; the next call with the same `resume_path`
    continues and, on a CPU, ends in the same weights bit for bit.

    Raises:
        TrainingError: the loss became infinite or NaN.
        SystemExit: interrupted.
    """
    run = Run(model, params, loader, process)
    state = load_resume(resume_path, process.device)
    if state is not None:
        run.load_state_dict(state)
        say(f"train: continuing after step {run.num_steps}", enabled=process.is_main)
    if params.compile:
        run.backward()  # compile before the clock starts; the gradients are thrown away
        model.zero_grad()
    next_save, loss = time.monotonic() + RESUME_INTERVAL_SECONDS, math.nan
    unit = "step" if params.budget_steps is not None else "s"
    with interruption() as is_interrupted, Progress("train", run.budget, unit, enabled=process.is_main) as progress:
        progress.update(run.done)
        while not run.is_finished:
            start, done = time.monotonic(), run.done
            run.step()
            elapsed, stop, save = _agree(process, time.monotonic() - start, is_interrupted(), time.monotonic() > next_save)
            run.seconds += elapsed
            at_curve_point = run.num_steps % CURVE_STEPS == 0 or run.is_finished
            if at_curve_point:
                loss = run.record_losses()
            progress.update(run.done - done, loss=loss, tokens_per_second=f"{run.num_tokens / run.seconds:,.0f}")
            if stop or (save and at_curve_point):
                save_start, resume_state = time.monotonic(), run.state_dict()
                if process.is_main:
                    save_resume(resume_path, resume_state)
                next_save = time.monotonic() + max(RESUME_INTERVAL_SECONDS, (time.monotonic() - save_start) / RESUME_SHARE)
            if stop:
                say(f"train: interrupted after step {run.num_steps}; rerun to continue", enabled=process.is_main)
                raise SystemExit(INTERRUPTED_EXIT_CODE)
    return TrainResult(run.averages.candidates(), run.loss_curve, run.num_steps, run.num_tokens, run.seconds)


def _agree(process: Process, elapsed: float, stop: bool, save: bool) -> tuple[float, bool, bool]:
    """The main process's clock, and whether any process wants to stop or to save: the same answer in every process."""
    if process.world_size == 1:
        return elapsed, stop, save
    main = process.is_main
    wishes = torch.tensor([elapsed if main else 0.0, float(stop), float(save and main)], dtype=torch.float64, device=process.device)
    elapsed, num_stop, num_save = process.sum(wishes).tolist()
    return elapsed, num_stop > 0, num_save > 0


@contextmanager
def interruption() -> Iterator[Callable[[], bool]]:
    """Within the context SIGINT and SIGTERM only set a flag, which the yielded function returns."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
