"""The training run: steps, averages, late QAT, interruption and exact resume.

Within a step nothing waits for the device. Every few steps the processes synchronize: losses are read, the main process's
clock, and whether to stop or to save. Shapes: B sequences of this process, T tokens, W weights.
"""

import copy
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lib.artifacts.resume import INTERRUPTED_EXIT_CODE, Saver, interruption, load_resume
from lib.data.loader import Batches, Prefetch
from lib.data.rows import find_parts
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.bpb import Score
from lib.model.gpt import GPT
from lib.progress import Progress, say
from lib.training.averaging import Averages
from lib.training.budget import Budget
from lib.training.config import TrainParams
from lib.training.flat import FlatParameters
from lib.training.optim import Optimizers
from lib.training.qat import FakeQuantization
from lib.training.schedule import lr_multiplier, muon_momentum, part_tokens

WARM_UP_STEPS = 3  # the first two compile and set up; the last is timed
WARM_UP_SECONDS = 1e-3  # time of a step that is assumed before one is timed
CURVE_STEPS = 10  # steps averaged into one point of the loss curve
CURVE_DIGITS = 6  # of the held-out curve, whose further digits depend on the number of threads
SYNC_STEPS = 10  # at most so many steps between two synchronizations,
SYNC_SECONDS = 1.0  # and about this long, unless a step takes longer


class TrainingError(UserError):
    """A run that cannot go on; the message names the step, what was found and the remedy."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        candidates: weights by name of average (``raw``, ``ema``, ``swa``), parameter name -> fp32 tensor.
        losses: mean loss of each step's global batch, in nats per token.
        heldout_curve: (tokens seen, held-out loss in nats per token, held-out bits per byte) of each time that was measured.
        plan: (step from which it held, planned number of steps) pairs, as `TrainParams.budget_steps` takes them.
        num_tokens: tokens trained on, over all processes.
        seconds: time spent in training steps, interruptions left out.
    """

    candidates: dict[str, dict[str, Tensor]]
    losses: list[float]
    heldout_curve: list[tuple[int, float, float]]
    plan: list[tuple[int, int]]
    num_tokens: int
    seconds: float

    @property
    def loss_curve(self) -> list[tuple[int, float]]:
        """(tokens seen, mean loss over the last `CURVE_STEPS` steps) rows."""
        tokens_per_step = self.num_tokens // len(self.losses)
        blocks = [(min(start + CURVE_STEPS, len(self.losses)), self.losses[start:start + CURVE_STEPS])
                  for start in range(0, len(self.losses), CURVE_STEPS)]
        return [(end * tokens_per_step, sum(losses) / len(losses)) for end, losses in blocks]


class Stage(NamedTuple):
    """What the forward pass of a step depends on, beside the batch; each stage of a run has graphs of its own.

    Attributes:
        is_looped: whether the layers of the model's loop are run through several times.
        part_tokens: tokens of the parts of packed rows, at most; None for rows that are not packed.
    """

    is_looped: bool
    part_tokens: int | None


Measure = Callable[[Stage], Score]
"""Scores held-out text with the present weights as they are trained in a stage; every process calls it and gets the score."""


class Run:
    """The state of one training run, between steps; `state_dict` is all that a continued run needs."""

    def __init__(self, model: GPT, params: TrainParams, loader: Batches, process: Process) -> None:
        self.params, self.process = params, process
        self.model = model
        self.batches = Prefetch(loader, process)
        self.parameters = FlatParameters(model)
        self.optimizers = Optimizers(self.parameters, params.optimizer, process)
        self.averages = Averages(self.parameters.weights, params.averaging)
        self.fake_quantization = FakeQuantization(self.parameters, params.qat)
        self.budget = Budget(params)
        self.num_steps = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.heldout_curve: list[tuple[int, float, float]] = []
        self._pending: list[Tensor] = []  # loss share and gradient norm (2,) of each step since the last synchronization
        self._clock = time.monotonic()

    @property
    def is_finished(self) -> bool:
        """Whether the budget leaves no further step."""
        return self.budget.is_finished(self.num_steps)

    @property
    def num_tokens(self) -> int:
        """Tokens trained on so far, over all processes."""
        return self.num_steps * self.params.tokens_per_step

    @property
    def is_sync_due(self) -> bool:
        """Whether enough steps were made since the last synchronization."""
        steps = min(SYNC_STEPS, int(SYNC_SECONDS * len(self.losses) / self.seconds)) if self.seconds else 1
        return len(self._pending) >= steps or self.is_measure_due or self.budget.is_near_the_end(self.num_steps)

    @property
    def is_measure_due(self) -> bool:
        """Whether the run is finished, or held-out text is scored after this step."""
        curve = self.params.heldout_curve
        return self.is_finished or (curve is not None and self.num_steps % curve.every_steps == 0)

    def warm_up(self) -> None:
        """Make a few steps and undo them: compilation and a first look at the clock belong to no budget."""
        state = copy.deepcopy(self.state_dict())
        if not self.budget.has_plan:
            self.budget.start(WARM_UP_SECONDS)
        now, params = self.budget.plan.fraction(self.num_steps), self.params
        changes = {end for end in (params.loop_start, *(end for end, _ in params.sequence_schedule)) if now < end < 1}
        for stage in dict.fromkeys(self.stage_at(fraction) for fraction in (*sorted(changes, reverse=True), now)):
            for _ in range(WARM_UP_STEPS):
                self.process.synchronize()
                start = time.monotonic()
                self.step(stage)
                self.process.synchronize()
        seconds, = self.process.max(time.monotonic() - start)
        self.load_state_dict(state)
        if not self.budget.has_plan:
            self.budget.start(seconds)

    def stage_at(self, fraction: float) -> Stage:
        """The stage of the run when `fraction` of the budget is done."""
        params = self.params
        return Stage(self.model.params.loop is not None and fraction >= params.loop_start,
                     part_tokens(fraction, params.sequence_schedule, params.sequence_tokens) if params.row_tokens else None)

    def step(self, stage: Stage | None = None) -> None:
        """One optimizer step on the next global batch; `stage` in place of that of the plan."""
        optimizer = self.params.optimizer
        fraction = self.budget.plan.fraction(self.num_steps)
        multiplier = lr_multiplier(fraction, optimizer.warmdown, optimizer.lr_floor)
        with self.fake_quantization.applied(self.fake_quantization.is_on(multiplier)):
            loss = self.backward(stage or self.stage_at(fraction))
        self.parameters.collect()
        gradients = self.process.sum(self.parameters.gradients)
        norm = torch.linalg.vector_norm(gradients)
        gradients.mul_((optimizer.grad_clip / (norm + 1e-6)).clamp(max=1))  # as torch.nn.utils.clip_grad_norm_
        self._pending.append(torch.stack((loss, norm)))
        self.optimizers.step(multiplier, muon_momentum(fraction, optimizer.momentum_start, optimizer.momentum, optimizer.momentum_warmup))
        self.num_steps += 1
        self.averages.update(self.num_steps, multiplier)

    def backward(self, stage: Stage) -> Tensor:
        """Gradients of the mean loss over the global batch, this process's share of the sum; returns its share of the loss."""
        tokens = self.batches.of_step(self.num_steps)  # (B, T+1)
        total = torch.zeros((), device=self.process.device)
        span, bos_id = stage.part_tokens, self.model.params.bos_id
        for rows in tokens.split(self.params.micro_batch_sequences):
            if len(rows):  # a process has none when there are fewer rows than processes
                with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.params.precision == "bf16"):
                    inputs = rows[:, :-1]
                    losses = self.model(inputs, rows[:, 1:], attention_tokens=span, looped=stage.is_looped, compiled=self.params.compile,
                                        starts=None if span is None else find_parts(inputs, bos_id, span))
                loss = losses.sum() / self.params.tokens_per_step
                loss.backward()
                total += loss.detach()
        return total

    def sync(self, *, stop: bool = False, save: bool = False) -> tuple[bool, bool]:
        """Wait for the device, read the losses and the clock, and agree with all processes.

        Args:
            stop: whether this process was asked to stop.
            save: whether it is time to save, by the clock of the main process.

        Returns:
            Whether any process was asked to stop, and whether to save; the same in every process.

        Raises:
            TrainingError: a loss or a gradient was not finite.
        """
        figures = torch.stack(self._pending).double()  # (number of steps, 2)
        main = float(self.process.is_main)
        figures[:, 1] *= main  # all processes have the same norm; only losses are shared out
        self.process.synchronize()  # the clock is read after the work
        now = time.monotonic()
        wishes = torch.tensor([stop, main * save, main * (now - self._clock)], dtype=torch.float64, device=self.process.device)
        *values, num_stop, num_save, seconds = self.process.sum(torch.cat((figures.flatten(), wishes))).tolist()
        self._clock = now
        self._pending.clear()
        for loss, norm in zip(values[::2], values[1::2], strict=True):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingError(f"train: step {len(self.losses) + 1}: expected a finite loss and gradient, found a loss of {loss} and "
                                    f"a norm of {norm}; lower the learning rates (train.optimizer) and rerun; the state of an earlier "
                                    "step is kept")
            self.losses.append(loss)
        self.seconds += seconds
        self.budget.revise(self.num_steps, self.seconds)
        return num_stop > 0, num_save > 0

    def measure(self, measure: Measure) -> None:
        """Add a point to the held-out curve: the weights after the last step, in its stage."""
        score = measure(self.stage_at(self.budget.plan.fraction(self.num_steps - 1)))
        self.heldout_curve.append((self.num_tokens, round(score.loss, CURVE_DIGITS), round(score.bpb, CURVE_DIGITS)))

    def check_weights(self) -> None:
        """A loss tells of the weights before its step; those after it must be finite to be kept.

        Raises:
            TrainingError: they are not.
        """
        if not self.parameters.weights.isfinite().all():
            raise TrainingError(f"train: step {self.num_steps}: expected finite weights, found infinite ones or NaN; lower the "
                                "learning rates (train.optimizer) and rerun; the state of an earlier step is kept")

    def start_clock(self) -> None:
        """Count the time from now on; what came since the last `sync` is not training."""
        self._clock = time.monotonic()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a continued run needs, after a synchronization; to be called by every process."""
        assert not self._pending
        return {"weights": self.parameters.weights, "optimizers": self.optimizers.state_dict(), "averages": self.averages.state_dict(),
                "num_steps": self.num_steps, "seconds": self.seconds, "losses": self.losses, "heldout_curve": self.heldout_curve,
                "budget": self.budget.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of `state_dict`."""
        self.parameters.weights.copy_(state["weights"])
        self.optimizers.load_state_dict(state["optimizers"])
        self.averages.load_state_dict(state["averages"])
        self.budget.load_state_dict(state["budget"])
        self.num_steps, self.seconds, self.losses = state["num_steps"], state["seconds"], state["losses"]
        self.heldout_curve = state["heldout_curve"]
        self._pending.clear()


def train(model: GPT, params: TrainParams, loader: Batches, process: Process, resume_path: Path, *,
          status: Callable[[], Mapping[str, str]], measure: Measure | None = None) -> TrainResult:
    """Train an initialised model on this process's device for the whole budget.

    On SIGINT or SIGTERM the state is saved and the process exits with status 130; the next call with the same `resume_path`
    continues and, on a CPU, ends in the same weights bit for bit. The state of the finished run stays at `resume_path` until
    the caller has written the result. `status` gives further figures for the progress line; it is asked after each synchronization.
    `measure` scores the held-out text of ``train.heldout_curve``; None for no curve. The time of both is not that of training.

    Raises:
        TrainingError: the loss or the gradient became infinite or NaN, or the processes have different parameters or data.
        ArtifactError: a saved state is damaged.
        SystemExit: interrupted.
    """
    if len(set(process.gather(resume_path.name))) > 1:
        raise TrainingError("train: expected the same params.yaml, seed and training text in every process, found different ones; "
                            "nodes that do not share a folder need copies of params.yaml and artifacts/tokenize")
    run = Run(model, params, loader, process)
    state = process.broadcast(load_resume(resume_path) if process.is_main else None)
    if state is not None:
        run.load_state_dict(state)
        say(f"train: continuing after step {run.num_steps}", enabled=process.is_main)
    if (params.compile and not run.is_finished) or not run.budget.has_plan:
        run.warm_up()
    with interruption() as is_interrupted, Progress("train", run.budget.plan.num_steps, "step", enabled=process.is_main,
                                                    initial=run.num_steps) as progress:
        saver = Saver(resume_path, "train")
        run.start_clock()
        while not run.is_finished:
            run.step()
            if not run.is_sync_due:
                continue
            num_known = len(run.losses)
            stop, save = run.sync(stop=is_interrupted(), save=saver.is_due)
            progress.update(len(run.losses) - num_known, total=run.budget.plan.num_steps, loss=run.losses[-1],
                            tokens_per_second=f"{run.num_tokens / run.seconds:,.0f}", **status())
            if measure and run.is_measure_due:
                run.measure(measure)
            run.start_clock()
            if stop or save or run.is_finished:
                run.check_weights()
                saver.save(run.num_steps, run.state_dict, write=process.is_main)
                run.start_clock()
            if stop and not run.is_finished:
                say(f"train: interrupted after step {run.num_steps}; rerun to continue", enabled=process.is_main)
                raise SystemExit(INTERRUPTED_EXIT_CODE)
    candidates = {kind: run.parameters.by_name(weights) for kind, weights in run.averages.candidates().items()}
    return TrainResult(candidates, run.losses, run.heldout_curve, run.budget.plan.revisions, run.num_tokens, run.seconds)
