"""Whole runs: reproducible, resumable after any interruption, the same with several processes."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import lib.training.loop
from lib.data.loader import Loader
from lib.distributed import SINGLE_CPU, Process
from lib.training.config import TrainParams
from lib.training.loop import CURVE_STEPS, Run, TrainingError, TrainResult, train
from tests.processes import run_processes
from tests.training.tiny import make_model, make_params, make_split


@pytest.fixture(autouse=True)
def _no_state_is_saved_because_the_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.training.loop, "RESUME_INTERVAL_SECONDS", float("inf"))


def run_training(folder: Path, params: TrainParams | None = None, process: Process = SINGLE_CPU, resume: str = "resume.pt") -> TrainResult:
    params = params or make_params()
    split = make_split(folder / f"train{process.rank}")
    loader = Loader(split, params.sequence_tokens, params.batch_sequences, seed=5)
    return train(make_model(), params, loader, process, folder / resume)


def save_at_every_curve_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.training.loop, "RESUME_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lib.training.loop, "RESUME_SHARE", float("inf"))


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert (one.num_steps, one.num_tokens, one.loss_curve) == (other.num_steps, other.num_tokens, other.loss_curve)
    assert one.candidates.keys() == other.candidates.keys() == {"raw", "ema", "swa"}
    for kind, weights in one.candidates.items():
        assert all(torch.equal(weight, other.candidates[kind][name]) for name, weight in weights.items()), kind


def test_a_run_learns_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    first = run_training(tmp_path)
    assert_same(first, run_training(tmp_path))
    assert first.num_steps == 30
    assert first.num_tokens == 30 * 4 * 8
    assert [tokens for tokens, _ in first.loss_curve] == [320, 640, 960]
    assert first.loss_curve[-1][1] < first.loss_curve[0][1] - 0.3
    assert not (tmp_path / "resume.pt").exists()


@pytest.mark.parametrize("at_step", [1, 7, 20, 29])  # before, between and on points of the loss curve; with and without QAT
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int,
                                                         number: int) -> None:
    expected = run_training(tmp_path)
    step = Run.step

    def interrupt(run: Run) -> None:
        step(run)
        if run.num_steps == at_step:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupt)
        with pytest.raises(SystemExit) as stopped:
            run_training(tmp_path)
    assert stopped.value.code == 130
    assert_same(run_training(tmp_path), expected)


def test_a_killed_run_continues_from_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_training(tmp_path)
    save_at_every_curve_point(monkeypatch)
    step, steps_done = Run.step, []

    def die(run: Run) -> None:
        if run.num_steps == 2 * CURVE_STEPS + 3:
            raise KeyboardInterrupt  # stands for a kill: nothing is saved on the way out
        step(run)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", die)
        with pytest.raises(KeyboardInterrupt):
            run_training(tmp_path)

    def count(run: Run) -> None:
        steps_done.append(run.num_steps)
        step(run)

    monkeypatch.setattr(Run, "step", count)
    assert_same(run_training(tmp_path), expected)
    assert steps_done[0] == 2 * CURVE_STEPS


def test_signals_are_handled_as_before_after_a_run(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    run_training(tmp_path, make_params(budget_steps=1, averaging={"select": "raw"}))
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.current_thread() is threading.main_thread()


def test_micro_batches_give_the_same_gradients(tmp_path: Path) -> None:
    whole, parts = (run_training(tmp_path, make_params(micro_batch_sequences=size)) for size in (4, 3))
    for (_, one), (_, other) in zip(whole.loss_curve, parts.loss_curve, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_at_every_curve_point(monkeypatch)
    backward = Run.backward

    def poisoned(run: Run) -> torch.Tensor:
        loss = backward(run)
        if run.num_steps == 15:
            assert run.model.token_embedding.weight.grad is not None
            run.model.token_embedding.weight.grad[0, 0] = float("inf")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Run, "backward", poisoned)
        with pytest.raises(TrainingError, match="step 20: expected a finite loss, found nan; lower the learning rates"):
            run_training(tmp_path)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["num_steps"] == 10
    assert all(weight.isfinite().all() for weight in state["model"].values())


def test_a_budget_in_seconds_is_kept_and_schedules_follow_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10**9))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock) * 0.25)
    fractions: list[float] = []
    step = Run.step

    def record(run: Run) -> None:
        fractions.append(run.done / run.budget)
        step(run)

    monkeypatch.setattr(Run, "step", record)
    result = run_training(tmp_path, make_params(budget_steps=None, budget_seconds=5.0, averaging={"select": "raw"}))
    assert 0 < result.num_steps < 25
    assert result.seconds <= 5.0  # stops before the limit, not after it
    assert result.seconds + result.seconds / result.num_steps > 5.0  # and only when no further step fits
    assert fractions[0] == 0 and fractions == sorted(fractions) and fractions[-1] < 1


def _compare(process: Process, folder: Path, expected: dict[str, Any]) -> None:
    result = run_training(folder, process=process)
    for (tokens, loss), (_, other) in zip(expected["curve"], result.loss_curve, strict=True):
        assert loss == pytest.approx(other, abs=1e-4), tokens
    for name, weight in result.candidates["ema"].items():
        torch.testing.assert_close(weight, expected["ema"][name], atol=2e-3, rtol=0)


def test_two_processes_train_the_same_model(tmp_path: Path) -> None:
    single = run_training(tmp_path)
    (tmp_path / "two").mkdir()
    run_processes(_compare, 2, tmp_path / "two", {"curve": single.loss_curve, "ema": single.candidates["ema"]})
