"""Whole runs: reproducible, resumable after any interruption, the same with several processes."""

import itertools
import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lib.artifacts.resume
import lib.training.loop
from lib.data.loader import Loader
from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.bpb import Score, make_score
from lib.evaluation.heldout import window_losses
from lib.model import compilation
from lib.model.gpt import GPT
from lib.params import ParamsError
from lib.training.checkpoint import make_loader
from lib.training.config import TrainParams
from lib.training.loop import Run, Stage, TrainingError, TrainResult, train
from tests.data.test_loader import list_parts
from tests.processes import run_processes
from tests.training.tiny import make_model, make_params, make_split


@pytest.fixture(autouse=True)
def _no_state_is_saved_because_the_machine_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.artifacts.resume, "INTERVAL_SECONDS", float("inf"))
    monkeypatch.setattr(lib.training.loop, "SYNC_SECONDS", 1e9)
    monkeypatch.setattr(lib.training.loop, "SYNC_STEPS", 4)  # after steps 1, 5, 9, ...


def score(model: GPT, stage: Stage, process: Process = SINGLE_CPU) -> Score:
    """Of some text, in which every token stands for a byte."""
    tokens = np.random.default_rng(1).integers(2, 32, 45).astype(np.uint16)
    nats = window_losses(model, tokens, window_tokens=stage.part_tokens or 8, batch_windows=2, precision="fp32", process=process,
                         looped=stage.is_looped)
    return make_score(nats, np.ones(44, np.int64))


def run_training(folder: Path, params: TrainParams | None = None, process: Process = SINGLE_CPU, resume: str = "resume.pt",
                 **model: Any) -> TrainResult:
    params = params or make_params()
    split = make_split(folder / f"train{process.rank}")
    initialised = make_model(**model)
    loader = make_loader(params, split, initialised.params.bos_id, seed=5)
    result = train(initialised, params, loader, process, folder / resume, status=dict,
                   measure=(lambda stage: score(initialised, stage, process)) if params.heldout_curve else None)
    if process.is_main:
        (folder / resume).unlink()
    return result


def save_at_every_synchronization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.artifacts.resume, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(lib.artifacts.resume, "SHARE", float("inf"))


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert (one.num_tokens, one.losses, one.plan) == (other.num_tokens, other.losses, other.plan)
    assert one.heldout_curve == other.heldout_curve
    assert one.candidates.keys() == other.candidates.keys() == {"raw", "ema", "swa"}
    for kind, weights in one.candidates.items():
        assert all(torch.equal(weight, other.candidates[kind][name]) for name, weight in weights.items()), kind


def test_a_run_learns_and_repeats_bit_for_bit(tmp_path: Path) -> None:
    first = run_training(tmp_path)
    assert_same(first, run_training(tmp_path))
    assert len(first.losses) == 30 and first.plan == [(0, 30)]
    assert first.num_tokens == 30 * 4 * 8
    assert [tokens for tokens, _ in first.loss_curve] == [320, 640, 960]
    assert first.loss_curve[-1][1] < first.loss_curve[0][1] - 0.3
    assert first.loss_curve[1][1] == sum(first.losses[10:20]) / 10


@pytest.mark.parametrize("at_step", [1, 7, 21, 25])  # between and on synchronizations; with and without QAT
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
    save_at_every_synchronization(monkeypatch)
    step, steps_done = Run.step, []

    def die(run: Run) -> None:
        if run.num_steps == 23:
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
    assert steps_done[0] == 21


CURVE: dict[str, Any] = {"heldout_curve": {"every_steps": 5, "tokens": 45}}
LOOP: dict[str, Any] = {"unet_skips": False, "loop": {"first": 1, "last": 2, "passes": 2}}
PACKED: dict[str, Any] = {"row_tokens": 20, "sequence_schedule": [[0.25, 3], [0.5, 6]]}


@pytest.mark.parametrize(("changes", "model", "stages"), [
    ({}, {}, [(True, None)] * 6), (PACKED | {"loop_start": 0.5}, LOOP, [(False, 3), *[(False, 6)] * 2, *[(True, 8)] * 3])])
def test_the_held_out_curve_is_that_of_the_weights_as_they_are_trained_and_changes_none(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], model: dict[str, Any],
        stages: list[tuple[bool, int | None]]) -> None:
    without, step = run_training(tmp_path, make_params(**changes), **model), Run.step
    weights: dict[int, dict[str, torch.Tensor]] = {}

    def keep(run: Run) -> None:
        step(run)
        weights[run.num_tokens] = {name: weight.clone() for name, weight in run.model.state_dict().items()}

    monkeypatch.setattr(Run, "step", keep)
    curve = run_training(tmp_path, make_params(**changes, **CURVE), **model)
    expected = []
    for num_steps, stage in zip(range(5, 31, 5), stages, strict=True):
        scored, num_tokens = make_model(**model), num_steps * without.num_tokens // 30
        scored.load_state_dict(weights[num_tokens])
        found = score(scored, Stage(*stage))
        expected.append((num_tokens, round(found.loss, 6), round(found.bpb, 6)))
    assert curve.heldout_curve == expected and not without.heldout_curve
    assert_same(replace(curve, heldout_curve=[]), without)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("at_step", [1, 5, 13, 30])
def test_an_interrupted_run_has_every_point_of_the_held_out_curve_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int,
                                                                       number: int) -> None:
    save_at_every_synchronization(monkeypatch)
    params = make_params(**CURVE)
    expected, step = run_training(tmp_path, params), Run.step

    def interrupt(run: Run) -> None:
        step(run)
        if run.num_steps == at_step:
            if number == signal.SIGKILL:
                raise KeyboardInterrupt  # nothing is saved on the way out
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt if number == signal.SIGKILL else SystemExit) if (
            number == signal.SIGKILL or at_step < 30) else nullcontext():
        patch.setattr(Run, "step", interrupt)
        run_training(tmp_path, params)
    assert_same(run_training(tmp_path, params), expected)


def test_a_budget_in_seconds_does_not_count_the_time_of_the_held_out_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for seconds in (0.0, 1000.0):
        clock, late = itertools.count(), [0.0]

        def measure(*_: object, seconds: float = seconds, late: list[float] = late) -> npt.NDArray[np.float32]:
            late[0] += seconds
            return np.ones(44, np.float32)

        with monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", lambda clock=clock, late=late: 0.25 * next(clock) + late[0])
            patch.setitem(globals(), "window_losses", lambda *_, **__: measure())
            results.append(run_training(tmp_path, make_params(budget_steps=None, budget_seconds=30.0, **CURVE)))
    assert len(results[0].heldout_curve) > 2 and results[0].seconds == results[1].seconds <= 30.0
    assert_same(*results)


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
    save_at_every_synchronization(monkeypatch)
    backward = Run.backward

    def poisoned(run: Run, stage: Stage) -> torch.Tensor:
        loss = backward(run, stage)
        if run.num_steps == 15:
            assert run.model.token_embedding.weight.grad is not None
            run.model.token_embedding.weight.grad[0, 0] = float("inf")
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(Run, "backward", poisoned)
        with pytest.raises(TrainingError, match=r"step 16: expected a finite loss .* a norm of inf; lower the learning rates"):
            run_training(tmp_path)
    state = torch.load(tmp_path / "resume.pt", weights_only=True)
    assert state["num_steps"] == 13
    assert state["weights"].isfinite().all()


@pytest.mark.slow
def test_a_run_by_seconds_is_repeated_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock) ** 1.2 * 0.25)  # steps become slower
        by_seconds = run_training(tmp_path, make_params(budget_steps=None, budget_seconds=100.0, reserve_seconds=10.0))
    assert 10 < len(by_seconds.losses) < 400
    assert 0 < by_seconds.seconds <= 90.0
    assert len(by_seconds.plan) > 3
    assert_same(run_training(tmp_path, make_params(budget_steps=[list(pair) for pair in by_seconds.plan])), by_seconds)


def test_the_loop_begins_at_its_fraction_of_the_budget(tmp_path: Path) -> None:
    plain, late, never, always = (run_training(tmp_path, make_params(loop_start=start), **LOOP | changes) for start, changes in (
        (0.0, {"loop": None}), (0.5, {}), (1.0, {}), (0.0, {})))
    assert_same(never, plain)
    assert late.losses[:15] == plain.losses[:15] and late.losses[15] != plain.losses[15]
    assert always.losses[0] == plain.losses[0] and always.losses[1] != plain.losses[1]  # all blocks are the identity at first


@pytest.mark.parametrize(("at_step", "data_order"), [(7, "shuffled"), (21, "sequential")])
def test_a_run_with_stages_continues_to_the_same_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_step: int,
                                                        data_order: str) -> None:
    params = make_params(loop_start=0.5, data_order=data_order, **PACKED)
    expected, step = run_training(tmp_path, params, **LOOP), Run.step

    def interrupt(run: Run) -> None:
        step(run)
        if run.num_steps == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupt)
        with pytest.raises(SystemExit):
            run_training(tmp_path, params, **LOOP)
    assert_same(run_training(tmp_path, params, **LOOP), expected)


def watch_stages(monkeypatch: pytest.MonkeyPatch) -> list[Stage]:
    backward, seen = Run.backward, list[Stage]()

    def watch(run: Run, stage: Stage) -> torch.Tensor:
        seen.append(stage)
        return backward(run, stage)

    monkeypatch.setattr(Run, "backward", watch)
    return seen


@pytest.mark.parametrize(("changes", "first", "expected"), [
    ({"loop_start": 0.0}, 0, [(True, None)]), ({"loop_start": 0.5}, 0, [(True, None), (False, None)]),
    ({"loop_start": 1.0}, 0, [(False, None)]), ({"loop_start": 0.5}, 15, [(True, None)]),
    (PACKED | {"loop_start": 0.4}, 0, [(True, 8), (True, 6), (False, 6), (False, 3)]),
    (PACKED | {"loop_start": 0.4}, 14, [(True, 8), (True, 6)]),
    (PACKED | {"loop_start": 0.5}, 0, [(True, 8), (False, 6), (False, 3)])])
def test_what_later_stages_need_is_warmed_up_before_what_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any],
                                                                  first: int, expected: list[tuple[bool, int | None]]) -> None:
    params, seen = make_params(**changes), watch_stages(monkeypatch)
    loader = Loader(make_split(tmp_path / "train"), params.tokens_per_row, params.batch_sequences, seed=5)
    run = Run(make_model(**LOOP), params, loader, SINGLE_CPU)
    run.num_steps = first
    run.warm_up()
    assert seen == [stage for stage in expected for _ in range(3)]


def test_parts_grow_at_their_fractions_of_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watch_stages(monkeypatch)
    result = run_training(tmp_path, make_params(**PACKED))
    assert [stage.part_tokens for stage in seen] == [3] * 8 + [6] * 7 + [8] * 15  # from steps 7.5 and 15 on
    assert result.num_tokens == 30 * 4 * 20


def test_the_order_of_the_text_is_the_same_for_every_seed(tmp_path: Path) -> None:
    split, params = make_split(tmp_path / "train"), make_params(data_order="sequential", row_tokens=20)
    first, second = (make_loader(params, split, 1, seed).batch(1) for seed in (0, 1))
    place = int(np.flatnonzero(split.shards[0] == 1)[0]) + 4 * 21
    assert first.flatten().tolist() == second.flatten().tolist() == split.shards[0][place:place + 4 * 21].tolist()
    shuffled = [make_loader(make_params(row_tokens=20), split, 1, seed).batch(1).tolist() for seed in (0, 1)]
    assert shuffled[0] == Loader(split, 20, 4, seed=0).batch(1).tolist() != shuffled[1]


def make_noisy_model(**changes: Any) -> GPT:
    """Whose blocks are not the identity."""
    model, generator = make_model(**changes), torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@pytest.mark.parametrize("part_tokens", [1, 3, 8])
def test_losses_of_packed_rows_are_those_of_their_parts(tmp_path: Path, part_tokens: int) -> None:
    params, model = make_params(row_tokens=20, micro_batch_sequences=3), make_noisy_model()
    loader = Loader(make_split(tmp_path / "train"), 20, 4, seed=5)
    loss, nats, batch = Run(model, params, loader, SINGLE_CPU).backward(Stage(False, part_tokens)), 0.0, loader.batch(0)
    assert (batch[:, 1:-1] == model.params.bos_id).any(), "documents begin within rows"
    for row in batch:
        starts = [place for place, begins in enumerate(list_parts(row[:-1].tolist(), part_tokens)) if begins]
        for start, end in itertools.pairwise([*starts, 20]):
            nats += float(model(row[None, start:end], row[None, start + 1:end + 1]).detach().sum())
    assert float(loss) == pytest.approx(nats / 80, rel=1e-5)


def test_rows_that_are_not_packed_go_through_the_model_as_they_are(tmp_path: Path) -> None:
    """Bit for bit; packed rows of the same tokens have another loss where a document begins within them."""
    loader = Loader(make_split(tmp_path / "train"), 8, 4, seed=5)
    rows = loader.batch(0)
    runs = [Run(make_noisy_model(), make_params(row_tokens=row_tokens), loader, SINGLE_CPU) for row_tokens in (None, 8)]
    plain, packed = (run.backward(run.stage_at(0.0)) for run in runs)
    model = make_noisy_model()
    expected = model(rows[:, :-1], rows[:, 1:]).sum() / 32
    expected.backward()
    assert torch.equal(plain, expected.detach()) and abs(packed - plain) > 1e-3
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(runs[0].model.get_parameter(name).grad, parameter.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"row_tokens": 7}, r"row_tokens: expected null, or at least sequence_tokens 8, found 7"),
    ({"sequence_schedule": [[0.5, 4]]}, r"sequence_schedule: expected an empty list for rows that are not packed; set row_tokens"),
    *(({"row_tokens": 8, "sequence_schedule": schedule}, r"sequence_schedule: expected pairs .* below sequence_tokens 8, found \[\[")
      for schedule in ([[0.5, 8]], [[0.0, 4]], [[1.0, 4]], [[0.5, 4], [0.4, 6]], [[0.5, 4], [0.6, 4]]))])
def test_settings_of_packed_rows_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        make_params(**changes)


@pytest.mark.parametrize(("model", "changes"), [({}, {}), (LOOP, {}), (LOOP, PACKED)], ids=["plain", "loop", "packed"])
def test_warming_up_leaves_no_trace(tmp_path: Path, model: dict[str, Any], changes: dict[str, Any]) -> None:
    params = make_params(loop_start=0.5, **changes)
    loader = Loader(make_split(tmp_path / "train"), params.tokens_per_row, params.batch_sequences, seed=5)
    warm, cold = (Run(make_model(**model), params, loader, SINGLE_CPU) for _ in range(2))
    warm.warm_up()
    for run in (warm, cold):
        for _ in range(3):
            run.step()
        run.sync()
    assert warm.losses == cold.losses
    for one, other in zip(warm.averages.candidates().values(), cold.averages.candidates().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_an_eager_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while quantization-aware training swaps the weights, which are views of one tensor."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")  # needs no C++ compiler
    changes: dict[str, Any] = {"budget_steps": 8, "micro_batch_sequences": 3, "qat": {"below_lr": 0.6}}
    eager, compiled = (run_training(tmp_path, make_params(**changes, compile=is_compiled)) for is_compiled in (False, True))
    assert compiled.losses == pytest.approx(eager.losses, abs=1e-4)
    assert compiled.losses != eager.losses


class Waiting(TorchDispatchMode):
    """Refuses what reads a value from the device, or asks it for a shape."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("document_mask", "row_tokens"), [(False, None), (True, None), (True, 20)])
def test_nothing_waits_for_the_device_within_a_step(tmp_path: Path, precision: str, document_mask: bool, row_tokens: int | None) -> None:
    params = make_params(precision=precision, micro_batch_sequences=3, qat={"below_lr": 2.0, "clip_quantile": 0.9}, row_tokens=row_tokens)
    loader = Loader(make_split(tmp_path / "train"), params.tokens_per_row, params.batch_sequences, seed=5)
    run = Run(make_model(document_mask=document_mask), params, loader, SINGLE_CPU)
    with Waiting():  # type: ignore[no-untyped-call]
        for _ in range(3):
            run.step()
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            float(run.parameters.weights[0])
    run.sync()
    assert len(run.losses) == 3


def test_a_full_disk_costs_a_state_but_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   capsys: pytest.CaptureFixture[str]) -> None:
    expected = run_training(tmp_path)
    save_at_every_synchronization(monkeypatch)
    full = tmp_path / ".resume.pt.tmp"
    full.symlink_to("/dev/full")  # the first state meets a full disk; the link is gone afterwards
    assert_same(run_training(tmp_path), expected)
    assert "the state after step 1 was not saved, an earlier one is kept: [Errno 28] cannot be written (No space left on device)" in (
        capsys.readouterr().err)
    assert not full.is_symlink()


def to_compare(result: TrainResult) -> dict[str, Any]:
    return {"losses": result.losses, "heldout_curve": result.heldout_curve, **result.candidates}


def _compare(process: Process, folder: Path, expected: dict[str, Any], changes: dict[str, Any]) -> None:
    result = run_training(folder, make_params(**changes), process)
    assert result.losses == pytest.approx(expected["losses"], abs=1e-4)
    assert len({tuple(losses) for losses in process.gather(result.losses)}) == 1, "all processes know the same losses"
    assert len({tuple(curve) for curve in process.gather(result.heldout_curve)}) == 1
    for point, alone in zip(result.heldout_curve, expected["heldout_curve"], strict=True):
        assert point == pytest.approx(alone, abs=1e-3)
    for kind, weights in result.candidates.items():
        for name, weight in weights.items():
            torch.testing.assert_close(weight, expected[kind][name], atol=2e-3, rtol=0)
            assert all(torch.equal(weight, other) for other in process.gather(weight)), "all processes have the same weights"


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "changes"), [  # uneven shares; the last of 4 processes has no sequence
    (2, {"batch_sequences": 5, **PACKED, **CURVE}), (4, {"batch_sequences": 3})])
def test_several_processes_train_the_same_model(tmp_path: Path, num_processes: int, changes: dict[str, Any]) -> None:
    single = run_training(tmp_path, make_params(**changes))
    (tmp_path / "several").mkdir()
    run_processes(_compare, num_processes, tmp_path / "several", to_compare(single), changes)


def _interrupt_and_continue(process: Process, folder: Path, expected: list[float]) -> None:
    step = Run.step

    def interrupt(run: Run) -> None:
        step(run)
        if run.num_steps == 7 and process.rank == 1:  # one process is told, all stop
            os.kill(os.getpid(), signal.SIGTERM)

    lib.training.loop.SYNC_SECONDS = 1e9
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "step", interrupt)
        with pytest.raises(SystemExit) as stopped:
            run_training(folder, process=process)
    assert stopped.value.code == 130
    if not process.is_main:
        (folder / "resume.pt").unlink(missing_ok=True)  # only the main process reads it; this one may have a disk of its own
    assert run_training(folder, process=process).losses == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_several_processes_stop_together_and_continue(tmp_path: Path) -> None:
    run_processes(_interrupt_and_continue, 2, tmp_path, run_training(tmp_path).losses)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run_training(tmp_path)
    step = Run.step

    def interrupt(run: Run) -> None:
        step(run)
        if run.num_steps == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "step", interrupt)
        with pytest.raises(SystemExit):
            run_training(tmp_path)
    run_processes(_compare, 2, tmp_path, to_compare(expected), {})


def _train_with_own_parameters(process: Process, folder: Path) -> None:
    with pytest.raises(TrainingError, match=r"expected the same params\.yaml, seed and training text in every process"):
        run_training(folder, process=process, resume=f"resume-{process.rank}.pt")


@pytest.mark.slow
def test_processes_with_different_parameters_do_not_start(tmp_path: Path) -> None:
    run_processes(_train_with_own_parameters, 2, tmp_path)
