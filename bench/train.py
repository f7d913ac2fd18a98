"""Training by the project's loop against a plain eager loop, in turn in one run, on random tokens and one device.

``python -m bench.train [--preset NAME]`` prints tokens per second, milliseconds per step, model FLOPs utilisation and peak memory.
The plain loop is what training scripts do without much thought: the forward pass uncompiled, fp32 logits stored, the optimizers one
tensor at a time, EMA over `state_dict`, the loss read from the device in every step. Both have the same attention kernel, start
from the same weights, see the same batches and make the same steps, those at the beginning of a long run: full learning rate, no
fake quantization, no snapshots. Their losses must agree. ``--preset pr585 --sequences 48`` is one GPU's share of #585.
``--profile STEPS`` adds where the time of the project's loop goes: kernels of a GPU, operators of a CPU.

Model FLOPs per token, forward and backward: 6 for each weight of a matrix that is multiplied with (a table that is only looked up does
not count, a tied head does), and 12 * layers * width * T/2 for attention, of whose T keys a query sees half on average. T are the
tokens of a row, of packed rows those of a part (some are shorter, because documents end).
"""

import argparse
import platform
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from bench.evaluate import Stopwatch
from lib.artifacts.tokens import Split
from lib.data.loader import Loader
from lib.data.rows import find_parts
from lib.distributed import Process, start_process
from lib.evaluation.evaluation import peak_memory_mib
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.kernels import choose_kernel
from lib.model.parts import parts_of
from lib.model.sdpa import Kernel
from lib.params import PARAMS_FILE, Precision
from lib.presets import load_settings
from lib.training.config import TrainParams
from lib.training.flat import group_of
from lib.training.loop import Run
from lib.training.schedule import muon_momentum, part_tokens

NUM_BLOCKS = 10  # of each loop, in turn; medians are of blocks
LONG_RUN_STEPS = 10**9  # so that schedules stay where they begin
EPOCH_STEPS = 20  # after so many the random tokens come again
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}  # relative; sums in another order are taken up by every later step
PEAK_TFLOPS = {"A100": 312.0, "H100": 989.4, "H200": 989.4, "B200": 2250.0}  # bf16 without sparsity, SXM, NVIDIA's data sheets
PROFILE_ROWS = 30
NAME_WIDTH = 90  # of kernels, whose names have no end
MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}  # of the product that measures other devices


class Loop(Protocol):
    """A way to train.

    Attributes:
        losses: losses of the steps until the last call of `sync`.
    """

    losses: list[float]

    def step(self) -> None:
        """One optimizer step on the next batch."""

    def sync(self) -> object:
        """Wait for the device and read what is to be read."""


class Measured(NamedTuple):
    """One loop: median seconds per step, all losses, and the most memory in MiB that it held, None where that is not known."""

    seconds: float
    losses: list[float]
    peak_mib: float | None


class PlainLoop:
    """A training loop without any thought of speed; for one process, with the schedules' values at the beginning."""

    def __init__(self, model: GPT, params: TrainParams, loader: Loader, process: Process) -> None:
        self.model, self.params, self.loader, self.process = model, params, loader, process
        groups: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, part in parts_of(model).items():
            groups[group_of(part)].append(model.get_parameter(name))
        settings = params.optimizer
        lrs = {"embedding": settings.embedding_lr, "vector": settings.vector_lr, "head": settings.head_lr}
        self.adam = torch.optim.AdamW([{"params": groups[group], "lr": lr, "weight_decay": getattr(settings.weight_decay, group)}
                                       for group, lr in lrs.items() if groups[group]],
                                      betas=settings.adam_betas, eps=settings.adam_eps, foreach=False)
        self.matrices = [(weight, torch.zeros_like(weight)) for weight in groups["matrix"]]  # with their momentum
        self.ema = {name: weight.clone() for name, weight in model.state_dict().items()}
        self.losses: list[float] = []

    def step(self) -> None:
        """One optimizer step on the next batch."""
        tokens = self.loader.batch(len(self.losses), self.process).to(self.process.device)  # (B, T+1)
        total = torch.zeros((), device=self.process.device)
        span = first_part_tokens(self.params)
        for rows in tokens.split(self.params.micro_batch_sequences):
            with torch.autocast(self.process.device.type, torch.bfloat16, enabled=self.params.precision == "bf16"):
                starts = None if span is None else find_parts(rows[:, :-1], self.model.params.bos_id, span)
                logits = self.model.logits(rows[:, :-1], attention_tokens=span, starts=starts)
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / tokens[:, 1:].numel()
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.params.optimizer.grad_clip)
        self.update_matrices()
        self.adam.step()
        self.model.zero_grad()
        self.losses.append(total.item())
        if len(self.losses) % self.params.averaging.ema_every_steps == 0:
            for name, weight in self.model.state_dict().items():
                self.ema[name].mul_(self.params.averaging.ema_decay).add_(weight, alpha=1 - self.params.averaging.ema_decay)

    @torch.no_grad()
    def update_matrices(self) -> None:
        """Muon, one matrix at a time."""
        settings = self.params.optimizer
        momentum = muon_momentum(0, settings.momentum_start, settings.momentum, settings.momentum_warmup)
        for weight, buffer in self.matrices:
            assert weight.grad is not None
            buffer.mul_(momentum).add_(weight.grad)
            update = newton_schulz(weight.grad.add(buffer, alpha=momentum), settings.orthogonalization_steps)
            weight.mul_(1 - settings.matrix_lr * settings.weight_decay.matrix)
            weight.add_(update, alpha=-settings.matrix_lr * max(1, len(weight) / weight.shape[1]) ** 0.5)

    def sync(self) -> None:
        """Nothing: every step has done it."""


def newton_schulz(matrix: Tensor, num_steps: int) -> Tensor:
    """The iteration of Muon for one matrix (R, C), in bf16 on GPUs (kellerjordan.github.io/posts/muon)."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / (x.norm() + 1e-7)
    if len(matrix) > matrix.shape[1]:
        x = x.T
    for _ in range(num_steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


def first_part_tokens(params: TrainParams) -> int | None:
    """Tokens of the parts of packed rows at the beginning of a run, at most; None for rows that are not packed."""
    return part_tokens(0, params.sequence_schedule, params.sequence_tokens) if params.row_tokens else None


def make_loader(params: TrainParams, vocab_size: int) -> Loader:
    """Batches of random tokens."""
    num_tokens = params.tokens_per_row * (params.batch_sequences * EPOCH_STEPS + 1)
    tokens = np.random.default_rng(0).integers(0, vocab_size, num_tokens).astype(np.uint16)
    split = Split(Path("random tokens"), (tokens,), 1, num_tokens, num_tokens, vocab_size)
    return Loader(split, params.tokens_per_row, params.batch_sequences, seed=0)


def make_loops(model_params: ModelParams, params: TrainParams, kernel: Kernel, process: Process) -> dict[str, Callable[[], Loop]]:
    """By name, how to make each loop, ready for its first step."""
    params = params.model_copy(update={"budget_steps": LONG_RUN_STEPS, "budget_seconds": None, "reserve_seconds": None})

    def make_model() -> GPT:
        model = GPT(model_params, kernel).to(process.device)
        initialize(model, 0)
        return model

    def make_run() -> Run:
        run = Run(make_model(), params, make_loader(params, model_params.vocab_size), process)
        run.warm_up()
        return run

    return {"lib.training.loop": make_run,
            "plain eager loop": lambda: PlainLoop(make_model(), params, make_loader(params, model_params.vocab_size), process)}


def measure(loops: Mapping[str, Callable[[], Loop]], process: Process, num_steps: int) -> dict[str, Measured]:
    """Make all loops, and let them make steps in turn, in blocks, so that what else the machine does affects all alike.

    The first block is not counted. Memory is that of making a loop and of its first block; a CPU only tells it for the first loop.
    """
    block_steps = -(-num_steps // NUM_BLOCKS)
    stopwatch = Stopwatch(process, processor=False)
    made: dict[str, Loop] = {}
    peaks: dict[str, float | None] = {}
    seconds: dict[str, list[float]] = defaultdict(list)

    def run_block(loop: Loop) -> None:
        for _ in range(block_steps):
            loop.step()
        loop.sync()

    for name, make in loops.items():
        others_mib = 0.0
        if process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(process.device)
            others_mib = peak_memory_mib(process.device)
        first = not made
        made[name] = make()
        run_block(made[name])
        peaks[name] = peak_memory_mib(process.device) - others_mib if first or process.device.type == "cuda" else None
    for _ in range(-(-num_steps // block_steps)):
        for name, loop in made.items():
            seconds[name].append(stopwatch.time(partial(run_block, loop))[0] / block_steps)
    return {name: Measured(median(seconds[name]), loop.losses, peaks[name]) for name, loop in made.items()}


def flops_per_token(model: GPT, num_tokens: int) -> float:
    """Operations of forward and backward pass, T = `num_tokens`; see the head of this file."""
    order = model.params.layer_order()
    weights = sum(model.get_parameter(name).numel() * (1 if part.layer is None else order.count(part.layer))
                  for name, part in parts_of(model).items() for module in part.modules
                  if part.is_matrix and not isinstance(model.get_submodule(module), nn.Embedding))
    return 6 * weights + 12 * len(order) * model.params.model_dim * num_tokens / 2


def find_peak(process: Process, precision: Precision) -> tuple[float, str]:
    """TFLOP/s that the device can do at most, and where the figure comes from."""
    if process.device.type == "cuda" and precision == "bf16":
        name = torch.cuda.get_device_name(process.device)
        for part, peak in PEAK_TFLOPS.items():
            if part in name:
                return peak, f"of the {part} in bf16"
    size = MATRIX_SIZE[process.device.type]
    matrix = torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=process.device)
    stopwatch = Stopwatch(process, processor=False)
    seconds = min(stopwatch.time(lambda: matrix @ matrix)[0] for _ in range(20))
    return 2 * size**3 / seconds / 1e12, f"measured, the fastest of 20 {precision} products of matrices of {size}"


def print_table(measured: Mapping[str, Measured], tokens_per_step: int, flops: float, peak_tflops: float) -> None:
    """A line for each loop, the ratio of the first two, and whether their losses agree."""
    print(f"{'':20}{'tokens/s':>12}{'ms/step':>10}{'utilisation':>13}{'peak MiB':>10}{'last loss':>11}")
    for name, (seconds, losses, peak_mib) in measured.items():
        rate = tokens_per_step / seconds
        print(f"{name:20}{rate:12,.0f}{1000 * seconds:10.2f}{rate * flops / (peak_tflops * 1e12):13.1%}"
              f"{'-' if peak_mib is None else f'{peak_mib:,.0f}':>10}{losses[-1]:11.5f}")
    ours, plain = measured.values()
    print(f"{plain.seconds / ours.seconds:.2f} x as fast as the plain loop, ratio of medians")


def print_profile(make: Callable[[], Loop], process: Process, num_steps: int) -> None:
    """Calls and milliseconds of a step by kernel, the longest first, of a new loop after one step that is not counted.

    Args:
        make: makes the loop.
        process: on a CPU the times are those of operators, without the operators that they call.
        num_steps: number of steps that are recorded.
    """
    cuda, loop = process.device.type == "cuda", make()
    loop.step()
    loop.sync()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(num_steps):
            loop.step()
        loop.sync()
    milliseconds = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / num_steps
                    for event in recorded.key_averages()}
    calls, total = {event.key: event.count / num_steps for event in recorded.key_averages()}, sum(milliseconds.values())
    print(f"{total:.2f} ms of {'kernels' if cuda else 'operators'} in a step of the project's loop")
    print(f"{'calls':>8}{'ms':>10}{'share':>8}  name")
    for name in sorted(milliseconds, key=lambda name: -milliseconds[name])[:PROFILE_ROWS]:
        print(f"{calls[name]:8,.0f}{milliseconds[name]:10.3f}{milliseconds[name] / total:8.1%}  {name[:NAME_WIDTH]}")


def check_losses(measured: Mapping[str, Measured], precision: Precision) -> None:
    """Compare the mean losses of all steps.

    Raises:
        AssertionError: they differ, so that the loops do not do the same work.
    """
    ours, plain = (fmean(each.losses) for each in measured.values())
    assert abs(ours - plain) <= LOSS_TOLERANCE[precision] * plain, f"mean losses differ: {ours} and {plain}"


def main() -> None:
    """Measure both loops and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=str(PARAMS_FILE), help="name of a preset, or a complete parameter file (default: %(default)s)")
    parser.add_argument("--sequences", type=int, help="sequences per step on this device; train.batch_sequences where not given")
    parser.add_argument("--compile", action="store_true", help="as if train.compile were true")
    parser.add_argument("--steps", type=int, default=100, help="measured steps of each loop, in blocks")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="steps of the project's loop whose kernels are listed")
    parser.add_argument("--device-peak-tflops", type=float, help="that utilisation is a share of")
    options = parser.parse_args()
    settings = load_settings(options.preset)
    section, params = settings.model, settings.train
    params = params.model_copy(update={"batch_sequences": options.sequences or params.batch_sequences,
                                       "compile": options.compile or params.compile})
    with start_process() as process:
        kernel = choose_kernel(section.attention, section, params.precision, process.device)
        loops = make_loops(section.architecture, params, kernel, process)
        measured = measure(loops, process, options.steps)
        with torch.device("meta"):
            model = GPT(section.architecture)
        flops = flops_per_token(model, first_part_tokens(params) or params.sequence_tokens)
        peak, source = (options.device_peak_tflops, "given") if options.device_peak_tflops else find_peak(process, params.precision)
        print(f"{Stopwatch(process, processor=False).describe()}, Python {platform.python_version()}; attention by {kernel.reason}")
        print(f"{options.preset}: {model.num_parameters:,} parameters, {params.precision}, {'' if params.compile else 'not '}compiled; "
              f"{params.batch_sequences} sequences of {params.tokens_per_row} tokens in a step, at most {params.micro_batch_sequences} "
              "at once")
        print(f"{flops / 1e6:,.2f} million model FLOPs per token; the device's peak is {peak:,.3f} TFLOP/s, {source}")
        print_table(measured, params.tokens_per_step, flops, peak)
        check_losses(measured, params.precision)
        if options.profile:
            print_profile(loops["lib.training.loop"], process, options.profile)


if __name__ == "__main__":
    main()
