"""The scorer against the straightforward one of the reference scripts, and what the protocol of entry #585 would take on eight GPUs.

``python -m bench.evaluate [--preset NAME]`` scores the same sliding windows in three strides with both. The straightforward scorer
computes the last block, logits and losses of all positions of a window and fetches them from the device window by window; it takes
one window at a time, or as many as ours in one forward pass. All must agree in bits per byte.

``python -m bench.evaluate --preset pr585 --protocol`` runs score-first test-time training on some chunks of random
tokens with `run_strategy`, as the stage does, and projects to the tokens and processes of the entry. Weights are random in both.
"""

import argparse
import math
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.distributed import Process, start_process
from lib.evaluation.bpb import make_score
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Outcome, peak_memory_mib, run_strategy
from lib.evaluation.job import Job
from lib.evaluation.limit import TimeLimit
from lib.evaluation.score import Forward, Scorer, autocast, load_stream
from lib.evaluation.sheet import Losses, ScoreSheet
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.tilt import Tilt
from lib.evaluation.trainable import match_groups
from lib.evaluation.windows import Documents, Windows, batch_size, one_pass_windows, sliding_windows, split_batches
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.parts import parts_of
from lib.params import PARAMS_FILE
from lib.presets import load_settings

STRIDES = (2, 8, 64)  # to the window: the default run, between, the published system
NUM_BATCHES = {"cpu": 4, "cuda": 16}  # full ones, besides the first window
REPEATS = 4  # the fastest counts: other work on the machine only adds time
TOLERANCE_BPB = {"fp32": 1e-6, "bf16": 1e-3}  # compiled matrix products round elsewhere
WEIGHT_STD = 0.02  # added to the initial weights, of which some are zero, so that every layer changes the score

ENTRY_TOKENS, ENTRY_PROCESSES = 62_021_846, 8  # #585
ENTRY_SECONDS = "164 + 525 = 689"  # #585, sliding and then test-time training that scored everything again
GOAL_SECONDS = 200
ALL_REDUCE_BYTES_PER_SECOND = 100e9  # assumed of a bus between GPUs; NVLink of Hopper has several times that

T = TypeVar("T")


class Measured(NamedTuple):
    """One way to score: wall seconds of the first call, which may compile, seconds of the fastest of the others, and the losses."""

    first_seconds: float
    seconds: float
    nats: Losses


@dataclass(frozen=True)
class Stopwatch:
    """Seconds on a device.

    Attributes:
        process: the process whose device is waited for.
        processor: whether to count the processor time of all threads, which other work on the machine hardly changes, and not wall time.
    """

    process: Process
    processor: bool

    def now(self) -> float:
        """Seconds since some moment, when the device has done what it was given."""
        self.process.synchronize()
        return time.process_time() if self.processor else time.perf_counter()

    def time(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds of one call, and what it returns."""
        start = self.now()
        result = call()
        return self.now() - start, result

    def describe(self) -> str:
        """Device and what is measured."""
        name = f"cpu {platform.machine()}, {torch.get_num_threads()} threads"
        if self.process.device.type == "cuda":
            name = torch.cuda.get_device_name(self.process.device)
        return f"torch {torch.__version__}, {name}, {'processor' if self.processor else 'wall'} time"


class Projection(NamedTuple):
    """Seconds of the whole text on all processes.

    Attributes:
        scoring: windows of every chunk split over the processes, all of which wait for the one that has most to do.
        training: rows of every step likewise.
        all_reduce: seconds of adding up the gradients of every step, at an assumed speed, not overlapped with anything.
    """

    scoring: float
    training: float
    all_reduce: float


def make_model(params: ModelParams, device: torch.device) -> GPT:
    """A model in which nothing is zero."""
    model = GPT(params)
    initialize(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=WEIGHT_STD)
    return model.to(device).eval()


def make_stream(num_targets: int, vocab_size: int, device: torch.device) -> Tensor:
    """Random tokens."""
    return load_stream(np.random.default_rng(0).integers(0, vocab_size, num_targets + 1).astype(np.uint16), device)


@torch.no_grad()
def score_straightforwardly(model: GPT, stream: Tensor, windows: Windows, params: EvaluateParams, batch_tokens: int) -> Losses:
    """Losses of all positions of every window, and one transfer from the device for each window."""
    tokens = stream.long()
    nats = np.empty(len(tokens) - 1, np.float32)
    for batch in split_batches(windows, batch_tokens):
        length, num_scored = int(batch.length[0]), int(batch.num_scored[0])
        rows = torch.stack([tokens[start : start + length + 1] for start in batch.start.tolist()])
        with autocast(tokens.device, params.precision):
            logits = model.logits(rows[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), length)
        for first, row in zip(batch.first_scored.tolist(), losses, strict=True):
            nats[first : first + num_scored] = row[length - num_scored:].cpu().numpy()
    return nats


def score_with_lib(forward: Forward, stream: Tensor, windows: Windows, params: EvaluateParams, process: Process) -> Losses:
    """The scorer that evaluate uses."""
    sheet = ScoreSheet(len(stream) - 1, process.device)
    Scorer(forward, stream, sheet, batch_tokens=params.batch_tokens, process=process).score(windows)
    return sheet.collect(process)[0]


def measure(ways: Mapping[str, Callable[[], Losses]], stopwatch: Stopwatch) -> dict[str, Measured]:
    """Call all in turn, several times, so that what else the machine does affects all alike."""
    measured: dict[str, Measured] = {}
    for name, score in ways.items():
        seconds, nats = Stopwatch(stopwatch.process, processor=False).time(score)  # compilers are processes of their own
        measured[name] = Measured(seconds, math.inf, nats)
    for _ in range(REPEATS):
        for name, score in ways.items():
            seconds, nats = stopwatch.time(score)
            measured[name] = Measured(measured[name].first_seconds, min(measured[name].seconds, seconds), nats)
    return measured


def share_before_last_block(model: GPT, score: Callable[[], Losses], stopwatch: Stopwatch) -> float:
    """Part of the time of a scorer that runs between a window's embedding and the last block: no scorer can leave that out."""
    begun, spent = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal begun
        begun = stopwatch.now()

    def end(*_: object) -> None:
        nonlocal spent
        spent += stopwatch.now() - begun

    last = model.blocks[-1].get_submodule("attention")
    handles = [model.token_embedding.register_forward_pre_hook(begin), last.register_forward_pre_hook(end)]
    seconds, _ = stopwatch.time(score)
    for handle in handles:
        handle.remove()
    return spent / seconds


def compare(model: GPT, params: EvaluateParams, stopwatch: Stopwatch, num_batches: int, *, compiled: bool) -> dict[str, Measured]:
    """Measure all ways to score for one stride and print a line for each.

    Raises:
        AssertionError: they do not agree.
    """
    torch.compiler.reset()  # or the compiled code of the last stride counts against the limit of torch
    window, stride, size = params.window_tokens, params.stride_tokens, batch_size(params.window_tokens, params.batch_tokens)
    stream = make_stream(window + num_batches * size * stride, model.params.vocab_size, stopwatch.process.device)
    windows = sliding_windows(len(stream) - 1, window, stride)
    forwards = {"lib.evaluation.score": Forward(model, params.precision)}
    if compiled:
        forwards["lib.evaluation.score, compiled"] = Forward(model, params.precision, compiled=True)
    straightforward: dict[str, Callable[[], Losses]] = {
        f"{count} window{'s' * (count > 1)} at a time, all positions": partial(
            score_straightforwardly, model, stream, windows, params, count * window) for count in (1, size)}
    ours: dict[str, Callable[[], Losses]] = {
        name: partial(score_with_lib, forward, stream, windows, params, stopwatch.process) for name, forward in forwards.items()}
    measured = measure(straightforward | ours, stopwatch)
    share = share_before_last_block(model, list(straightforward.values())[-1], stopwatch)

    print(f"stride {stride} of windows of {window}: {len(windows.start)} windows, {len(stream) - 1:,} targets")
    fastest = min(measured[name].seconds for name in straightforward)
    bpbs = {name: make_score(each.nats, np.ones(len(each.nats), np.int64)).bpb for name, each in measured.items()}
    for name, each in measured.items():
        print(f"  {name:40}{each.seconds:8.3f} s{len(each.nats) / each.seconds:12,.0f} targets/s{fastest / each.seconds:7.2f} x"
              f"   bpb {bpbs[name]:.8f}" + (f"   first call {each.first_seconds:.1f} s" if "compiled" in name else ""))
    scored = int(windows.num_scored.sum()) / windows.work
    print(f"  {share:.0%} of the straightforward scorer's time is in blocks before the last, which every window must compute, and "
          f"{scored:.0%} of the rest is for scored positions: at most {1 / (share + (1 - share) * scored):.2f} x with the same kernels",
          flush=True)
    difference = max(bpbs.values()) - min(bpbs.values())
    assert difference <= TOLERANCE_BPB[params.precision], f"bpb differs by {difference}"
    return measured


def run_once(name: StrategyName, forward: Forward, stream: Tensor, documents: Documents, *, params: EvaluateParams,
             process: Process) -> Outcome:
    """One strategy on its own, without a limit."""
    limit = TimeLimit(math.inf, process)
    limit.plan(STRATEGIES[name].work(documents, params))
    sheet = ScoreSheet(len(stream) - 1, process.device, tilt=Tilt.of(stream, params.tilt))
    return run_strategy(name, Job(forward, stream, documents, params, process, limit, sheet))


def scoring_work(num_targets: int, params: EvaluateParams, num_processes: int) -> int:
    """Inputs that the process with most to do scores; nobody goes on to the next chunk before a chunk is scored."""
    chunk = params.score_first.chunk_tokens
    # All chunks after the first are alike, but for the size of the last.
    chunks = Counter((min(first, chunk), min(chunk, num_targets - first)) for first in range(0, num_targets, chunk))
    return sum(count * largest_share(first, first + size, params, num_processes) for (first, size), count in chunks.items())


def largest_share(first: int, end: int, params: EvaluateParams, num_processes: int) -> int:
    """Inputs of one chunk that the process with most to do scores."""
    windows = (sliding_windows(end, params.window_tokens, params.stride_tokens, first=first) if params.score_first.windows == "sliding"
               else one_pass_windows(end, params.window_tokens, params.segment_tokens, first=first))
    work = [batch.work for batch in split_batches(windows, params.batch_tokens, num_processes)]
    return max(sum(work[rank::num_processes]) for rank in range(num_processes))


def num_training_steps(num_targets: int, params: EvaluateParams) -> int:
    """Optimizer steps of score_first: on the rows of every chunk but the last."""
    settings = params.score_first
    num_trained = -(-num_targets // settings.chunk_tokens) - 1
    return num_trained * settings.epochs * -(-(settings.chunk_tokens // params.window_tokens) // settings.batch_sequences)


def project(outcome: Outcome, model: GPT, measured: EvaluateParams, entry: EvaluateParams) -> Projection:
    """The time of the entry's text on its processes, from an outcome of one process.

    Args:
        outcome: what score_first gave with the settings `measured`, whose steps have the rows that one process has of the entry's steps.
        model: what was trained.
        measured: see above.
        entry: the settings of the entry.
    """
    num_targets = len(outcome.nats)
    scoring = outcome.seconds["scoring_seconds"] / scoring_work(num_targets, measured, 1)
    training = outcome.seconds["adaptation_seconds"] / num_training_steps(num_targets, measured)
    num_steps = num_training_steps(ENTRY_TOKENS, entry)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    members = match_groups(entry.score_first.trainable, parts_of(model))
    gradient_bytes = 4 * sum(sizes[name] for name in {name for names in members.values() for name in names})
    ring = 2 * (ENTRY_PROCESSES - 1) / ENTRY_PROCESSES * gradient_bytes / ALL_REDUCE_BYTES_PER_SECOND
    return Projection(scoring * scoring_work(ENTRY_TOKENS, entry, ENTRY_PROCESSES), training * num_steps, ring * num_steps)


def run_protocol(model: GPT, params: EvaluateParams, process: Process, num_chunks: int, chunk_tokens: int) -> None:
    """Score and adapt a slice twice, the first time to compile, for both kinds of windows; print speed, memory and projection."""
    if num_chunks < 2:
        raise ValueError(f"--chunks: expected at least 2, for the last one is not trained on, found {num_chunks}")
    stream = make_stream(num_chunks * chunk_tokens, model.params.vocab_size, process.device)
    documents = Documents(np.array([0]), np.array([len(stream) - 1]))
    settings = params.score_first
    print(f"{'compiled' if params.compile else 'not compiled'}; {num_chunks} chunks of {chunk_tokens:,} tokens, {settings.epochs} epochs "
          f"on {', '.join(settings.trainable)}; projected to {ENTRY_TOKENS:,} tokens on {ENTRY_PROCESSES} processes")
    print(f"{'':24}{'scored':>12}{'trained':>12}{'peak':>10}   projected seconds")
    print(f"{'windows':24}{'tokens/s':>12}{'tokens/s':>12}{'MiB':>10}{'scoring':>12}{'training':>10}{'all-reduce':>12}{'compile':>9}{'all':>8}")
    for kind in ("sliding", "one_pass"):
        torch.compiler.reset()
        if process.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(process.device)
        entry = params.model_copy(update={"score_first": settings.model_copy(update={"windows": kind})})
        own_rows = -(-settings.batch_sequences // ENTRY_PROCESSES)  # of a process in a step
        measured = params.model_copy(update={"score_first": settings.model_copy(update={
            "windows": kind, "chunk_tokens": chunk_tokens, "batch_sequences": own_rows})})
        forward = Forward(model, params.precision, compiled=params.compile)
        first, outcome = (run_once("score_first", forward, stream, documents, params=measured, process=process) for _ in range(2))
        num_scored, num_trained = len(outcome.nats), settings.epochs * (num_chunks - 1) * chunk_tokens
        projection, compilation = project(outcome, model, measured, entry), max(0.0, first.seconds["seconds"] - outcome.seconds["seconds"])
        print(f"{kind:24}{num_scored / outcome.seconds['scoring_seconds']:12,.0f}"
              f"{num_trained / outcome.seconds['adaptation_seconds']:12,.0f}"
              f"{peak_memory_mib(process.device):10,.0f}{projection.scoring:12,.1f}{projection.training:10,.1f}"
              f"{projection.all_reduce:12,.1f}{compilation:9,.1f}{sum(projection) + compilation:8,.0f}", flush=True)
    print(f"#585: {ENTRY_SECONDS} seconds; goal: {GOAL_SECONDS}. Tokens/s are of this device, training in steps of {own_rows} rows, one "
          f"process's share.\nAssumed: windows and rows of a chunk are split over the processes and all wait for the one with most to do; "
          f"all-reduce at {ALL_REDUCE_BYTES_PER_SECOND / 1e9:.0f} GB/s after each backward pass.")


def main() -> None:
    """Compare scorers, or run the protocol."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default=str(PARAMS_FILE), help="name of a preset, or a complete parameter file (default: %(default)s)")
    parser.add_argument("--batches", type=int, help="full batches of windows to score; more give steadier figures")
    parser.add_argument("--batch-tokens", type=int, help="inputs in a forward pass; evaluate.batch_tokens where not given")
    parser.add_argument("--eager", action="store_true", help="leave out the compiled scorer")
    parser.add_argument("--processor-time", action="store_true", help="count processor time, for a CPU that does other work as well")
    parser.add_argument("--protocol", action="store_true", help="score-first test-time training, projected")
    parser.add_argument("--chunks", type=int, default=3, help="chunks of the protocol's slice")
    parser.add_argument("--chunk-tokens", type=int, help="tokens of a chunk of the slice; score_first.chunk_tokens where not given")
    options = parser.parse_args()
    settings = load_settings(options.preset)
    params = settings.evaluate
    if options.batch_tokens:
        params = params.model_copy(update={"batch_tokens": options.batch_tokens})
    with start_process() as process:
        model, stopwatch = make_model(settings.model.architecture, process.device), Stopwatch(process, options.processor_time)
        print(f"{stopwatch.describe()}; {options.preset}: {model.num_parameters:,} parameters, {params.precision}, "
              f"{params.batch_tokens:,} inputs in a forward pass")
        if options.protocol:
            run_protocol(model, params, process, options.chunks, options.chunk_tokens or params.score_first.chunk_tokens)
            return
        for part in STRIDES:
            compare(model, params.model_copy(update={"stride_tokens": params.window_tokens // part}), stopwatch,
                    options.batches or NUM_BATCHES[process.device.type], compiled=not options.eager)


if __name__ == "__main__":
    main()
