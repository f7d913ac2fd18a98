"""Sliding evaluation against the straightforward scorer of the reference scripts, in one run on the same model and windows.

The straightforward scorer computes the logits of all positions of a window and keeps those that it scores: one window at a
time, and in batches as large as ours. Prints seconds, their ratio, and the bits per byte, which must agree.
``python -m bench.evaluate`` takes the default run's shapes with random weights.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from lib.distributed import Process, start_process
from lib.evaluation.bpb import make_score
from lib.evaluation.config import EvaluateParams
from lib.evaluation.score import Scorer, autocast, load_stream
from lib.evaluation.windows import sliding_windows, split_batches
from lib.model.config import ModelParams
from lib.model.gpt import GPT
from lib.params import load_params

NUM_WINDOWS = {"cpu": 64, "cuda": 4096}
REPEATS = 3  # the fastest counts: other work on the machine only adds time
TOLERANCE_BPB = 1e-6

Scores = npt.NDArray[np.float32]


def score_straightforwardly(model: GPT, tokens: Tensor, params: EvaluateParams, batch_windows: int) -> Scores:
    """Full logits of every window, and one transfer from the device for each batch."""
    num_targets = len(tokens) - 1
    nats = np.empty(num_targets, np.float32)
    for batch in split_batches(sliding_windows(num_targets, params.window_tokens, params.stride_tokens), batch_windows):
        length, num_scored = int(batch.length[0]), int(batch.num_scored[0])
        rows = torch.stack([tokens[start : start + length + 1] for start in batch.start.tolist()])
        with torch.no_grad(), autocast(tokens.device, params.precision):
            logits = model.logits(rows[:, :-1])
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none").view(len(rows), length)
        for first, row in zip(batch.first_scored.tolist(), losses[:, length - num_scored:].cpu().numpy(), strict=True):
            nats[first : first + num_scored] = row
    return nats


def score_ours(model: GPT, stream: Tensor, params: EvaluateParams, process: Process) -> Scores:
    """The scorer that evaluate uses."""
    scorer = Scorer(model, stream, batch_windows=params.batch_windows, precision=params.precision, process=process)
    scorer.score(sliding_windows(len(stream) - 1, params.window_tokens, params.stride_tokens))
    return scorer.collect()


def measure(function: Callable[[], Scores]) -> tuple[float, Scores]:
    """Seconds of the fastest of several calls, and the scores."""
    seconds = math.inf
    for _ in range(REPEATS):
        start = time.perf_counter()
        nats = function()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, nats


def main() -> None:
    """Measure with the shapes in params.yaml and print one line for each way to score."""
    params, model_params = load_params("evaluate", EvaluateParams), load_params("model", ModelParams)
    with start_process() as process:
        model = GPT(model_params).to(process.device)
        model.initialize(0)
        num_windows = NUM_WINDOWS[process.device.type]
        num_targets = params.window_tokens + params.stride_tokens * (num_windows - 1)
        tokens = np.random.default_rng(0).integers(0, model_params.vocab_size, num_targets + 1).astype(np.uint16)
        stream = load_stream(tokens, process.device)
        measured = {
            "one window at a time, full logits": measure(lambda: score_straightforwardly(model, stream.long(), params, 1)),
            f"{params.batch_windows} windows at a time, full logits": measure(
                lambda: score_straightforwardly(model, stream.long(), params, params.batch_windows)),
            "lib.evaluation.score": measure(lambda: score_ours(model, stream, params, process)),
        }
    target_bytes = np.ones(num_targets, np.int64)
    ours, expected = (measured[name] for name in ("lib.evaluation.score", "one window at a time, full logits"))
    print(f"{num_windows} windows of {params.window_tokens} tokens, stride {params.stride_tokens}, {params.precision}, {process.device}")
    for name, (seconds, nats) in measured.items():
        print(f"{name:40} {seconds:8.2f} s {num_targets / seconds:10,.0f} scored tokens/s {seconds / ours[0]:6.2f} x ours   "
              f"bpb {make_score(nats, target_bytes).bpb:.8f}")
    difference = abs(make_score(ours[1], target_bytes).bpb - make_score(expected[1], target_bytes).bpb)
    assert difference <= TOLERANCE_BPB, f"bpb differs by {difference}"


if __name__ == "__main__":
    main()
