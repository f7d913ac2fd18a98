import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import BpbCurve, Evaluation, Outcome, Text, evaluate, run_strategy
from lib.evaluation.limit import TimeLimit, TimeLimitError
from lib.evaluation.strategies import STRATEGIES
from lib.model.gpt import GPT
from tests.evaluation.test_lora import NUM_TARGETS, STARTS
from tests.evaluation.tiny import BOS, make_job, make_model, make_params, make_tokens
from tests.processes import run_processes

TARGET_BYTES = np.arange(NUM_TARGETS) % 4


def make_text() -> Text:
    return Text.of(make_tokens(NUM_TARGETS, starts=STARTS), TARGET_BYTES, BOS)


def run(params: EvaluateParams, model: GPT | None = None, **options: Any) -> Evaluation:
    return evaluate(model or make_model(), make_text(), params, process=SINGLE_CPU, limit=TimeLimit(params.limit_seconds, SINGLE_CPU),
                    **options)


def test_every_strategy_s_result_is_that_of_the_strategy_alone() -> None:
    params, text = make_params(), make_text()
    evaluation = run(params)
    assert list(evaluation.outcomes) == list(params.strategies)
    for name, outcome in evaluation.outcomes.items():
        alone = run_strategy(name, make_job(make_model(), text.tokens, params))
        assert np.array_equal(outcome.nats, alone.nats), name
        assert np.array_equal(outcome.context, alone.context), name
        assert outcome.events == alone.events, name
        nats = [float(value) for value in alone.nats]
        assert evaluation.score(name).loss == pytest.approx(math.fsum(nats) / NUM_TARGETS, rel=1e-6)
        assert evaluation.score(name).bpb == pytest.approx(math.fsum(nats) / math.log(2) / sum(n % 4 for n in range(NUM_TARGETS)), rel=1e-6)


def test_curves_and_tables_belong_to_all_targets_of_each_strategy() -> None:
    evaluation = run(make_params(strategies=["sliding", "lora"], strategy="lora"))
    for tables in (evaluation.curves(), evaluation.context_tables(), evaluation.document_tables()):
        assert list(tables) == ["sliding", "lora"]
    for name in evaluation.outcomes:
        assert evaluation.curves()[name][-1] == pytest.approx((NUM_TARGETS, evaluation.score(name).bpb))
        rows = evaluation.context_tables()[name]
        assert sum(count for _, count, _ in rows) == NUM_TARGETS
        assert sum(count * loss for _, count, loss in rows) / NUM_TARGETS == pytest.approx(evaluation.score(name).loss)
        documents = evaluation.document_tables()[name]
        assert sum(count for _, count, _, _ in documents) == len(STARTS)
        assert sum(size * bpb for _, _, size, bpb in documents) / TARGET_BYTES.sum() == pytest.approx(evaluation.score(name).bpb)


def count_inputs(model: GPT) -> list[int]:
    """Gets the number of inputs of every forward pass."""
    inputs: list[int] = []
    model.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].numel()))
    return inputs


def state_of(model: GPT) -> tuple[dict[str, torch.Tensor], list[tuple[bool, bool]]]:
    return copy.deepcopy(model.state_dict()), [(parameter.requires_grad, parameter.grad is None) for parameter in model.parameters()]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_ends_as_it_was(training: bool) -> None:
    model = make_model().train(training)
    weights, gradients = state_of(model)
    run(make_params(), model)
    after, gradients_after = state_of(model)
    assert all(torch.equal(weight, weights[name]) for name, weight in after.items())
    assert gradients_after == gradients
    assert all(module.training is training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("changes", [
    {"score_first": {"trainable": ["scales", "head"]}}, {"phased": {"trainable": ["head"]}},
    {"two_phase": {"selective": {"trainable": ["head"]}}}, {"two_phase": {"recalibration": {"trainable": ["last_4_blocks"]}}}])
def test_an_empty_group_is_an_error_that_names_it_before_anything_is_scored(changes: dict[str, Any]) -> None:
    model = make_model()
    inputs = count_inputs(model)
    with pytest.raises(ValueError, match=r"trainable group (head|last_4_blocks): matches no parameter"):
        run(make_params(**changes), model, keep=pytest.fail)
    assert not inputs


@pytest.mark.parametrize("name", ["lora", "phased"])
def test_a_layer_that_the_model_has_not_is_an_error_that_names_it_before_anything_is_scored(name: str) -> None:
    params, model = make_params(strategies=["plain", name], strategy="plain"), make_model()
    inputs = count_inputs(model)
    with pytest.raises(ValueError, match=r"evaluate.lora.layers: gate: the model has no such layer"):
        run(params.model_copy(update={"lora": params.lora.model_copy(update={"layers": ("query", "gate")})}), model)
    assert not inputs


def test_what_will_be_trained_is_said_with_exact_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    run(make_params())
    said = capsys.readouterr().err
    numbers = {name: parameter.numel() for name, parameter in make_model().named_parameters()}
    last, scales, block_scales, mix = (sum(count for name, count in numbers.items() if wanted(name)) for wanted in (
        lambda name: name.startswith("blocks.2."), lambda name: "scale" in name,
        lambda name: "attention_scale" in name or "mlp_scale" in name, lambda name: "residual_mix" in name))
    assert f"score_first trains 17 tensors, {last + scales - 32:,} parameters (last_1_blocks {last:,}, scales {scales:,})" in said
    assert f"two_phase trains 9 tensors, {block_scales + mix:,} parameters (block_scales {block_scales:,}, residual_mix {mix:,})" in said
    assert said.count(" trains an adapter of 432 parameters per document (query, value, head)") == 3


def make_evaluation(bpb: Mapping[StrategyName, float], chosen: StrategyName, figures: dict[str, float]) -> Evaluation:
    """Every target has the same loss."""
    nats = {name: np.full(NUM_TARGETS, value * math.log(2) * TARGET_BYTES.sum() / NUM_TARGETS, np.float32) for name, value in bpb.items()}
    seconds = {"seconds": 4.0, "scoring_seconds": 1.5}
    return Evaluation(make_params(strategies=list(bpb), strategy=chosen), make_text(), {
        name: Outcome(nats[name], np.zeros(NUM_TARGETS, np.int32), [], figures if name == "score_first" else {}, seconds, None)
        for name in bpb})


def test_figures_are_those_of_the_chosen_strategy_and_of_each_by_its_name() -> None:
    evaluation = make_evaluation({"plain": 3.0, "score_first": 2.0, "two_phase": 1.0}, "score_first", {"epochs": 1.123456789})
    nats_per_bit = math.log(2) * TARGET_BYTES.sum() / NUM_TARGETS
    metrics = evaluation.metrics()
    assert metrics.pop("strategy") == "score_first"
    assert metrics == pytest.approx({
        "val_loss": 2 * nats_per_bit, "val_bpb": 2.0, "plain_loss": 3 * nats_per_bit, "plain_bpb": 3.0,
        "score_first_loss": 2 * nats_per_bit, "score_first_bpb": 2.0,
        "score_first_epochs": 1.12345679, "two_phase_transductive_loss": nats_per_bit, "two_phase_transductive_bpb": 1.0,
        "num_tokens": NUM_TARGETS, "num_bytes": int(TARGET_BYTES.sum()), "num_documents": len(STARTS)}, rel=1e-6)
    assert all(round(value, 8) == value for value in metrics.values() if isinstance(value, float))
    assert make_evaluation({"plain": 3.0, "score_first": 2.0}, "plain", {}).metrics()["val_bpb"] == pytest.approx(3.0)


def test_times_are_those_of_each_strategy_and_its_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("lib.evaluation.limit.time.monotonic", lambda: now)
    limit = TimeLimit(60, SINGLE_CPU)
    now = 103.0
    limit.plan(10)
    now = 107.5
    timing = make_evaluation({"plain": 3.0, "lora": 2.0}, "plain", {}).timing(limit, SINGLE_CPU)
    assert timing.pop("peak_memory_mib") > 10
    assert timing.pop("compile_seconds") == 0
    assert timing == {"seconds": 7.5, "open_seconds": 3.0, **{f"{name}_{key}": value for name in ("plain", "lora") for key, value in (
        ("seconds", 4.0), ("scoring_seconds", 1.5), ("tokens_per_second", NUM_TARGETS / 4))}}


class Clock:
    """Time passes only while a model computes: a second for each input, and two more for the gradients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: GPT) -> None:
        self.now = 0.0
        monkeypatch.setattr("lib.evaluation.limit.time.monotonic", lambda: self.now)
        model.register_forward_pre_hook(self.tick)

    def tick(self, _: object, arguments: tuple[torch.Tensor, ...]) -> None:
        self.now += arguments[0].numel() * (3 if torch.is_grad_enabled() else 1)


@pytest.fixture(scope="module")
def timed() -> tuple[Evaluation, float]:
    """An evaluation with all the time that it needs, and that time."""
    model = make_model()
    with pytest.MonkeyPatch.context() as patches:
        clock = Clock(patches, model)
        return run(make_params(limit_seconds=1e6), model), clock.now


def test_the_phases_of_every_strategy_add_up_to_its_time(timed: tuple[Evaluation, float]) -> None:
    evaluation, total = timed
    seconds = {name: outcome.seconds for name, outcome in evaluation.outcomes.items()}
    assert sum(each["seconds"] for each in seconds.values()) == total
    for name in ("score_first", "phased", "two_phase"):
        assert seconds[name]["seconds"] == seconds[name]["scoring_seconds"] + seconds[name]["adaptation_seconds"]
        assert min(seconds[name].values()) > 0
    assert seconds["two_phase"]["adaptation_seconds"] == 3 * 88 * (2 + 2)
    assert seconds["score_first"]["adaptation_seconds"] == 3 * 80 * 2
    assert all(seconds[name].keys() == {"seconds"} for name in ("plain", "sliding", "one_pass", "lora"))


@pytest.mark.parametrize(("name", "fraction"), [("plain", 0.5), ("score_first", 0.3), ("score_first", 0.9), ("lora", 0.5), ("phased", 0.6),
                                                ("two_phase", 0.2)])
def test_when_the_time_is_over_the_curves_are_kept_as_far_as_they_go(name: StrategyName, fraction: float, timed: tuple[Evaluation, float],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = timed
    before = list(STRATEGIES)[: list(STRATEGIES).index(name)]
    limit = sum(expected.outcomes[other].seconds["seconds"] for other in before) + fraction * expected.outcomes[name].seconds["seconds"]
    kept: list[Mapping[str, BpbCurve]] = []
    model = make_model()
    weights, _ = state_of(model)
    Clock(monkeypatch, model)
    with pytest.raises(TimeLimitError, match=rf"evaluate.limit_seconds: expected at most {limit:g} s, found \d+.\d s with .*of the work"):
        run(make_params(limit_seconds=limit), model, keep=kept.append)
    assert [list(curves) for curves in kept] == [[*before, name]]
    assert {other: kept[0][other] for other in before} == {other: expected.curves()[other] for other in before}
    if name == "two_phase":
        assert kept[0][name] == []  # nothing was scored yet
    else:
        num_scored, bpb = kept[0][name][-1]
        assert 0.2 * fraction * NUM_TARGETS < num_scored < NUM_TARGETS
        if name in ("plain", "score_first"):  # in the order of the text
            assert bpb == pytest.approx(expected.outcomes[name].nats[:num_scored].sum() / math.log(2) / TARGET_BYTES[:num_scored].sum())
    assert all(torch.equal(weight, weights[key]) for key, weight in model.state_dict().items())
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


class Accountant(TimeLimit):
    """Keeps what was announced, reported and left out."""

    def __init__(self, limit_seconds: float, process: Process) -> None:
        super().__init__(limit_seconds, process)
        self.announced = self.reported = self.left_out = 0

    def plan(self, total_work: int) -> Any:
        self.announced = total_work
        return super().plan(total_work)

    def advance(self, work: int) -> None:
        self.reported += work
        super().advance(work)

    def leave_out(self, work: int) -> None:
        self.left_out += work
        super().leave_out(work)


EPOCHS = 8


def run_late(monkeypatch: pytest.MonkeyPatch, name: str, limit_seconds: float,
             when_late: str = "fewer_epochs") -> tuple[Evaluation, Accountant]:
    params = make_params(strategies=["plain", name], strategy=name, limit_seconds=limit_seconds, when_late=when_late,
                         **{name: {"epochs": EPOCHS}})
    model = make_model()
    with monkeypatch.context() as patches:
        Clock(patches, model)
        limit = Accountant(limit_seconds, SINGLE_CPU)
        evaluation = evaluate(model, make_text(), params, process=SINGLE_CPU, limit=limit)
        assert limit.seconds <= limit_seconds
        return evaluation, limit


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fraction"), [("score_first", 0.9), ("score_first", 0.5), ("phased", 0.9), ("phased", 0.6)])
def test_late_evaluations_train_for_fewer_epochs_and_say_so(name: StrategyName, fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    full, clock = run_late(monkeypatch, name, 1e6)
    needed = sum(outcome.seconds["seconds"] for outcome in full.outcomes.values())
    assert full.outcomes[name].figures == {"epochs": EPOCHS}
    assert full.outcomes[name].events == run_late(monkeypatch, name, 1e6, "fail")[0].outcomes[name].events
    assert (clock.reported, clock.left_out) == (clock.announced, 0)
    with pytest.raises(TimeLimitError):
        run_late(monkeypatch, name, fraction * needed, "fail")
    evaluation, clock = run_late(monkeypatch, name, fraction * needed)
    trained = {kind: [event.num_steps for event in each.outcomes[name].events if event.kind == "trained" and event.state == -1]
               for kind, each in (("full", full), ("late", evaluation))}
    batches = [steps // EPOCHS for steps in trained["full"]]
    epochs = [steps / number for steps, number in zip(trained["late"], batches, strict=False)]
    assert len(trained["late"]) == len(trained["full"])  # each chunk, or phase, got something
    assert all(1 <= each <= EPOCHS and each == int(each) for each in epochs)
    assert evaluation.metrics()[f"{name}_epochs"] == pytest.approx(sum(epochs) / len(batches))
    assert (0.4 * fraction if fraction < 0.9 else 0.7) * EPOCHS < sum(epochs) / len(batches) < EPOCHS  # it uses the time that it has
    assert clock.left_out > 0
    assert clock.reported + clock.left_out == clock.announced


def test_without_time_for_any_epoch_nothing_is_trained_and_too_little_time_for_scoring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    full, _ = run_late(monkeypatch, "score_first", 1e6)
    scoring = full.outcomes["plain"].seconds["seconds"] + full.outcomes["score_first"].seconds["scoring_seconds"]
    evaluation, clock = run_late(monkeypatch, "score_first", 1.05 * scoring)
    assert evaluation.metrics()["score_first_epochs"] == 0
    assert [event.kind for event in evaluation.outcomes["score_first"].events] == ["scored"] * 6
    assert clock.reported + clock.left_out == clock.announced
    with pytest.raises(TimeLimitError):
        run_late(monkeypatch, "score_first", 0.9 * scoring)


def test_epochs_are_no_figure_where_they_cannot_change() -> None:
    assert "score_first_epochs" not in run(make_params()).metrics()


def afford_in_process(process: Process, folder: Path) -> None:
    now = 0.0
    with patch("lib.evaluation.limit.time.monotonic", lambda: now):
        limit = TimeLimit(100, process)
        now = 10.0 + 20 * process.rank  # the second process takes longer to open the artifact
        with limit.plan(1000):
            now = 40.0
            limit.advance(100)
            (folder / f"{process.rank}.txt").write_text(repr((limit.affordable(600), limit.projected_seconds)))


@pytest.mark.slow
def test_processes_that_opened_the_artifact_at_different_times_agree_on_what_they_can_afford(tmp_path: Path) -> None:
    run_processes(afford_in_process, 2, tmp_path)
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()
