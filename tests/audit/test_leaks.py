"""Planted leaks, one of each known kind: every one is caught by the replays of the real run, or by what it leaves in the model."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lib.artifacts.tokens import SplitWriter, load_split
from lib.audit.chronology import check_score_before_update
from lib.audit.replay import VAL, Scores, check_replays, score_again
from lib.audit.verdict import check_state
from lib.distributed import SINGLE_CPU
from lib.evaluation.config import StrategyName
from lib.evaluation.evaluation import Outcome, make_jobs, run_strategy
from lib.evaluation.job import Job
from lib.evaluation.limit import TimeLimit
from lib.evaluation.strategies import STRATEGIES
from lib.evaluation.windows import plain_windows
from tests.evaluation.tiny import MODEL, make_model, make_params, make_text, make_tokens
from tests.evaluation.tiny import STRATEGIES as NAMES

TOKENS = make_tokens(240, starts=(0, 5, 31, 60, 83, 107, 150, 170, 199))
LEGAL = [name for name in NAMES if not STRATEGIES[name].transductive]
PARAMS = make_params()
CHUNK = PARAMS.score_first.chunk_tokens  # 16
MEMORY: dict[str, Any] = {}  # what outlives a strategy
Run = Callable[[Job], None]


def replay(*names: StrategyName, thorough: bool = False, seed_of_cuts: int = 0) -> dict[StrategyName, list[bool]]:
    """Run some strategies for real, then again in the same process; whether replays, state and record of each pass."""
    MEMORY.clear()
    model, text = make_model(), make_text(TOKENS)
    limit = TimeLimit(3600.0, SINGLE_CPU)
    limit.plan(10**9)
    outcomes: dict[StrategyName, Outcome] = {
        name: run_strategy(name, job) for name, job in make_jobs(model, text, PARAMS, names, process=SINGLE_CPU, limit=limit)}

    def run(tokens: npt.NDArray[np.uint16], names: Any, until: int, work: float) -> Scores:
        writer = SplitWriter(VAL, MODEL["vocab_size"], 1000)
        writer.add(tokens, len(tokens), len(tokens))
        writer.close()
        MEMORY.clear()  # a fresh process
        return score_again(make_model(), make_text(tokens), PARAMS, names, until=until, work=work, process=SINGLE_CPU)
    checks = check_replays(outcomes, text, PARAMS, run, thorough=thorough, seed_of_cuts=seed_of_cuts)
    return {name: [checks[name]["passed"] is True, check_state([outcome])["passed"] is True,
                   check_score_before_update(outcome.events, len(TOKENS) - 1)["passed"] is True] for name, outcome in outcomes.items()}


def replayed(*names: StrategyName, thorough: bool = False, seed_of_cuts: int = 0) -> list[bool]:
    """The same of the last one."""
    return replay(*names, thorough=thorough, seed_of_cuts=seed_of_cuts)[names[-1]]


@pytest.fixture(autouse=True)
def _validation_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real text, where evaluate has it."""
    monkeypatch.chdir(tmp_path)
    writer = SplitWriter(VAL, MODEL["vocab_size"], 1000)
    writer.add(TOKENS, len(TOKENS), len(TOKENS))
    writer.close()


def chunks(job: Job, size: int = CHUNK) -> list[tuple[int, int]]:
    return [(first, min(first + size, job.num_targets)) for first in range(0, job.num_targets, size)]


def score(job: Job, first: int, end: int) -> None:
    """In windows side by side, as a strategy does that is honest."""
    windows = plain_windows(end - first, PARAMS.window_tokens)
    job.scorer().score(windows._replace(start=windows.start + first))


def train(job: Job, tokens: Tensor, steps: int = 1) -> None:
    """Optimizer steps that no record shows; gradients are removed."""
    optimizer = torch.optim.SGD(job.forward.model.parameters(), lr=0.05)
    rows = tokens.long()[None]
    for _ in range(steps):
        optimizer.zero_grad()
        job.forward(rows, slice(None)).mean().backward()
        optimizer.step()
    optimizer.zero_grad()


def improve(job: Job, first: int, end: int, by: float = 0.01) -> None:
    """Better losses than the model's."""
    job.sheet._nats[first:end] -= by


def _train_if(recognised: Callable[[Job], bool]) -> Run:
    def run(job: Job) -> None:
        if recognised(job):
            train(job, job.stream)
        score(job, 0, job.num_targets)
    return run


def _of_next_chunk(job: Job) -> None:
    for first, end in chunks(job):
        train(job, job.stream[end:end + CHUNK + 1] if end + 2 < job.num_targets else job.stream[first:end])
        score(job, first, end)


def _statistics_of_the_chunk(job: Job) -> None:
    for first, end in chunks(job):
        score(job, first, end)
        counts = torch.bincount(job.stream[first + 1:end + 1].long(), minlength=MODEL["vocab_size"])
        job.sheet._nats[first:end] -= 0.1 * counts[job.stream[first + 1:end + 1].long()].log()


def _ahead_at_borders_of_windows(job: Job) -> None:
    score(job, 0, job.num_targets)
    for end in range(8, job.num_targets - 1, 8):
        improve(job, end - 1, end, 0.01 * float(job.stream[end + 1]))


def _ahead_at_borders_of_chunks(job: Job) -> None:
    score(job, 0, job.num_targets)
    for _, end in chunks(job)[:-1]:
        improve(job, end - 1, end, 0.01 * float(job.stream[end + 1]))


def _ahead_at_borders_of_documents(job: Job) -> None:
    score(job, 0, job.num_targets)
    for start in job.documents.start[1:].tolist():
        improve(job, start - 1, start, 0.01 * float(job.stream[start + 1]))


def _far_along(job: Job) -> None:
    score(job, 0, job.num_targets)
    improve(job, 150, 230, 0.01 * float(job.stream[231:].sum()))


def _better_of_two(job: Job) -> None:
    score(job, 0, job.num_targets)
    for start, length in zip(*(each.tolist() for each in job.documents), strict=True):
        other = job.sheet._nats[start:start + length] + 0.5 * torch.cos(job.stream[start:start + length].float())
        if other.sum() < job.sheet._nats[start:start + length].sum():
            job.sheet._nats[start:start + length] = other


def _free_tokens(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.sheet._nats[:-1][job.stream[1:] == job.stream[-1]] = 0


def _not_repeatable(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.sheet._nats += torch.from_numpy(np.random.default_rng().normal(0, 1e-3, len(job.sheet._nats))).float()


def _huge_chunks(job: Job) -> None:
    size = 200
    for first, end in chunks(job, size):
        if end - first == size:  # a probe is shorter
            train(job, job.stream[first:end + 1])
        score(job, first, end)


def _shard_on_disk(job: Job) -> None:
    train(job, torch.from_numpy(load_split(VAL, MODEL["vocab_size"]).tokens().astype(np.int64)))
    score(job, 0, job.num_targets)


def _two_passes(job: Job) -> None:
    score(job, 0, job.num_targets)
    nats = job.sheet._nats.clone()
    train(job, job.stream, steps=2)
    job.sheet._counts.zero_()
    score(job, 0, job.num_targets)
    job.sheet._nats = torch.minimum(nats, job.sheet._nats)


def _sorted_by_loss(job: Job) -> None:
    """Normalises by the mean loss of all the text."""
    score(job, 0, job.num_targets)
    job.sheet._nats[:-1] *= 0.9 * job.sheet._nats[:-1].mean()


REAL_HASH = hashlib.sha256(TOKENS.astype(np.int32).tobytes()).hexdigest()
LEAKS: dict[str, Run] = {
    "recognised by a flag": _train_if(lambda job: not job.limit.__class__.__name__.startswith("_")),
    "recognised by its length": _train_if(lambda job: job.num_targets == 240),
    "recognised by the text": _train_if(lambda job: int(job.stream[-1]) == int(TOKENS[-1])),
    "recognised by a hash": _train_if(lambda job: hashlib.sha256(job.stream.numpy().tobytes()).hexdigest() == REAL_HASH),
    "trained on the next chunk": _of_next_chunk,
    "statistics of the chunk": _statistics_of_the_chunk,
    "borders of windows": _ahead_at_borders_of_windows,
    "borders of chunks": _ahead_at_borders_of_chunks,
    "borders of documents": _ahead_at_borders_of_documents,
    "far along": _far_along,
    "better of two": _better_of_two,
    "free tokens": _free_tokens,
    "not repeatable": _not_repeatable,
    "huge chunks": _huge_chunks,
    "shard on disk": _shard_on_disk,
    "two passes": _two_passes,
    "mean of the text": _sorted_by_loss,
}
QUICK = ["recognised by a flag", "recognised by its length", "recognised by the text", "recognised by a hash", "trained on the next chunk",
         "free tokens", "not repeatable", "huge chunks", "shard on disk", "two passes", "mean of the text"]


def plant(monkeypatch: pytest.MonkeyPatch, run: Run, name: StrategyName = "score_first") -> None:
    monkeypatch.setitem(STRATEGIES, name, STRATEGIES[name]._replace(run=run))


@pytest.mark.slow
@pytest.mark.parametrize(("leak", "thorough"), [*((leak, False) for leak in QUICK), *((leak, True) for leak in LEAKS)])
def test_a_planted_leak_is_caught(leak: str, thorough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, LEAKS[leak])
    passed, *_ = replayed("score_first", thorough=thorough)
    assert not passed


def _remember(job: Job) -> None:
    MEMORY["text"] = job.stream.clone()
    STRATEGIES["one_pass"].run(job)


def _recall(job: Job) -> None:
    if "text" in MEMORY:
        train(job, MEMORY["text"])
    score(job, 0, job.num_targets)


def test_a_text_that_an_earlier_strategy_left_in_a_global_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, _remember, "plain")
    plant(monkeypatch, _recall)
    assert not replayed("plain", "score_first")[0]


def _leave_buffer(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.forward.model.register_buffer("seen", job.stream.float())


def _leave_hook(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.forward.model.register_forward_pre_hook(lambda module, inputs: None)


def _leave_attribute(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.forward.model.blocks[0].seen = job.stream  # type: ignore[index, union-attr]


def _leave_gradient(job: Job) -> None:
    score(job, 0, job.num_targets)
    job.forward(job.stream[:17].long()[None], slice(None)).mean().backward()


def _train_unrecorded(job: Job) -> None:
    for first, end in chunks(job):
        score(job, first, end)
        train(job, job.stream[first:end + 1])


@pytest.mark.parametrize("leave", [_leave_buffer, _leave_hook, _leave_attribute, _leave_gradient, _train_unrecorded])
def test_what_a_strategy_leaves_in_the_model_or_hides_from_the_record_is_caught(leave: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, leave)
    assert not replayed("score_first")[1]


@pytest.mark.slow
@pytest.mark.parametrize("thorough", [False, True])
def test_honest_strategies_are_not_accused(thorough: bool) -> None:
    assert replay(*LEGAL, thorough=thorough) == {name: [True, True, True] for name in LEGAL}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"window_tokens": 64, "stride_tokens": 8, "score_first": {"chunk_tokens": 64}},
                                     {"lora": {"window_tokens": 64, "chunk_tokens": 16}}, {"lora": {"warm_start": 3}}])
def test_long_windows_and_warm_starts_are_not_accused(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows far beyond the trained length."""
    monkeypatch.setattr("tests.audit.test_leaks.PARAMS", make_params(**changes))
    for name in ("sliding", "score_first", "lora"):
        assert replayed(name, thorough=True) == [True, True, True], name


def test_other_seeds_cut_elsewhere_and_the_same_seed_at_the_same_places(monkeypatch: pytest.MonkeyPatch) -> None:
    cuts: list[list[bytes]] = []
    for seed in (0, 0, 1):
        cuts.append([])
        original = score_again

        def spy(model: Any, text: Any, *args: Any, original: Any = original, **options: Any) -> Scores:
            cuts[-1].append(text.tokens.tobytes())
            return original(model, text, *args, **options)
        with monkeypatch.context() as patch:
            patch.setattr("tests.audit.test_leaks.score_again", spy)
            replayed("sliding", seed_of_cuts=seed)
    assert cuts[0] == cuts[1] != cuts[2]


def test_training_that_no_replay_reaches_is_not_checked() -> None:
    model, text = make_model(), make_text(TOKENS)
    limit = TimeLimit(3600.0, SINGLE_CPU)
    limit.plan(10**9)
    outcomes = {name: run_strategy(name, job)
                for name, job in make_jobs(model, text, PARAMS, ["score_first"], process=SINGLE_CPU, limit=limit)}

    def run(tokens: npt.NDArray[np.uint16], names: Any, until: int, work: float) -> Scores:
        scores = score_again(model, make_text(tokens), PARAMS, names, until=min(until, 8), work=work, process=SINGLE_CPU)
        return {name: (nats, scored & (np.arange(len(nats)) < 8)) for name, (nats, scored) in scores.items()}
    check = check_replays(outcomes, text, PARAMS, run, thorough=False)["score_first"]
    assert check["passed"] is None
    assert "no replay reached" in str(check["why"])
