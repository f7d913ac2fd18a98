"""Devices that do not repeat their results, simulated: what is legal stays so or is not checked, leaks are still found."""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.audit.determinism import deterministic, judge, largest_difference, largest_spread
from lib.distributed import SINGLE_CPU, Process, start_process
from lib.evaluation.config import StrategyName
from lib.evaluation.score import Forward
from lib.model.embedding import SmearGate
from lib.model.gpt import GPT
from tests.audit import test_audit as leaks
from tests.audit.test_audit import LEGAL, audit, smear_ahead, violated
from tests.evaluation.tiny import make_model

NOISE = 1e-6
ADAPTIVE: list[StrategyName] = [name for name in LEGAL if name in ("score_first", "lora", "phased")]


def multiply(x: Tensor) -> Tensor:
    """Relative noise that no seed repeats."""
    return x * (1 + NOISE * torch.from_numpy(np.random.default_rng().standard_normal(tuple(x.shape))).to(x.dtype))


@pytest.fixture
def _noisy_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Forward.__call__

    def forward(*args: Any, **options: Any) -> Tensor:
        nats = original(*args, **options)
        if nats.requires_grad:
            nats.register_hook(multiply)
        return nats
    monkeypatch.setattr(Forward, "__call__", forward)


@pytest.fixture
def _noisy_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, distribution = Forward.__call__, Forward.log_probabilities
    monkeypatch.setattr(Forward, "__call__", lambda *args, **options: multiply(loss(*args, **options)))
    monkeypatch.setattr(Forward, "log_probabilities", lambda *args: multiply(distribution(*args)))


def results(report: dict[str, Any], name: StrategyName) -> list[Any]:
    """What came of C1, C2 and, where it is claimed, the isolation of documents."""
    causality, distribution = (report["strategies"][name][condition] for condition in ("causality", "distribution"))
    isolated = causality["documents_isolated"]
    for check in (causality, distribution, isolated or {}):
        if check.get("passed", True) is None:
            assert check["why"] == "the same text gets other scores each time on this device"
            assert 0 < check["largest_difference_of_repetitions"] < 1e-3
    return [causality["passed"], distribution["passed"], *([isolated["passed"]] if isolated else [])]


@pytest.mark.slow
@pytest.mark.usefixtures("_noisy_gradients")
@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_is_never_violated_where_gradients_are_noisy(name: StrategyName) -> None:
    report = audit(name, thorough=True)
    assert violated(report, name) == []
    assert set(results(report, name)) == ({None} if name in ADAPTIVE else {True})


@pytest.mark.usefixtures("_noisy_forward")
@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_is_not_checked_where_scores_are_noisy(name: StrategyName) -> None:
    report = audit(name)
    assert violated(report, name) == []
    assert set(results(report, name)) == {None}


@pytest.fixture(params=["_noisy_gradients", "_noisy_forward"])
def _noisy(request: pytest.FixtureRequest) -> Iterator[None]:
    request.getfixturevalue(request.param)
    yield


@pytest.mark.usefixtures("_noisy")
@pytest.mark.parametrize("leak", [
    leaks.test_training_on_the_text_before_scoring_it_is_illegal_and_expected_of_a_transductive_strategy,
    leaks.test_rows_of_a_batch_that_leak_into_each_other_are_caught,
    leaks.test_a_strategy_that_trains_on_a_chunk_before_scoring_it_is_caught, leaks.test_training_that_no_record_shows_is_caught,
    leaks.test_a_mixture_that_knows_the_target_is_caught, leaks.test_a_distribution_that_knows_the_target_is_caught,
    leaks.test_probabilities_that_do_not_add_up_to_one_are_caught, leaks.test_adapters_that_are_not_reset_between_documents_are_caught])
def test_leaks_are_caught_on_a_noisy_device(leak: Any, request: pytest.FixtureRequest) -> None:
    leak(**({"monkeypatch": request.getfixturevalue("monkeypatch")} if leak.__code__.co_argcount else {}))


@pytest.mark.usefixtures("_noisy")
@pytest.mark.parametrize("name", LEGAL)
def test_a_smear_gate_that_reads_ahead_is_caught_on_a_noisy_device(name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmearGate, "forward", smear_ahead)
    assert violated(audit(name), name)


def test_a_difference_is_judged_by_the_noise() -> None:
    assert judge(0.0, 0, lambda: pytest.fail("not needed"))
    assert judge(1e-30, 0, lambda: 0.0) is False
    assert judge(9.0, 0, lambda: 1.0) is None
    assert judge(11.0, 0, lambda: 1.0) is False
    assert judge(11.0, 2, lambda: 1.0) is None
    assert judge(np.nan, 0, lambda: 1.0) is False


def test_differences_and_spreads_know_what_is_not_finite() -> None:
    a, b = np.array([1, np.nan, -np.inf]), np.array([1, np.nan, -np.inf])
    assert largest_difference(a, b) == largest_spread([a, b]) == 0
    b[0] = 1.5
    assert largest_difference(a, b) == largest_spread([a, b, b]) == 0.5
    assert largest_difference(a, np.array([1.0, 2.0, -np.inf])) == np.inf
    assert largest_difference(a, a[:2]) == np.inf
    assert largest_spread([a, np.array([1.0, 2.0, -np.inf])]) == 0  # what is not a number hides nothing


CUDA = Process(rank=0, world_size=1, device=torch.device("cuda"))  # its model stays on the CPU here


def test_a_gpu_is_deterministic_for_all_of_an_evaluation() -> None:
    model = make_model()
    with deterministic(model, "bf16", CUDA) as why:
        assert why is None
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    for process, enabled in ((SINGLE_CPU, True), (CUDA, False)):
        with deterministic(model, "fp32", process, enabled=enabled) as why:
            assert why is None
            assert not torch.are_deterministic_algorithms_enabled()


def test_an_operation_without_a_deterministic_kernel_is_named_and_not_an_error(monkeypatch: pytest.MonkeyPatch,
                                                                               capsys: pytest.CaptureFixture[str]) -> None:
    original = GPT.forward

    def put(model: GPT, *args: Any, **options: Any) -> Tensor:
        torch.zeros(4).put_(torch.tensor([1]), torch.ones(1))  # has none on any device
        nats: Tensor = original(model, *args, **options)
        return nats
    monkeypatch.setattr(GPT, "forward", put)
    with deterministic(make_model(), "fp32", CUDA) as why:
        assert why == "put_ does not have a deterministic implementation"
        assert not torch.are_deterministic_algorithms_enabled()
    assert f"without deterministic algorithms: {why}" in capsys.readouterr().err


def test_other_errors_of_a_rehearsal_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("out of memory")
    monkeypatch.setattr(GPT, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"), deterministic(make_model(), "fp32", CUDA):
        pass
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("_noisy_gradients")
def test_the_reason_is_in_the_audit() -> None:
    report = audit("lora", nondeterministic="put_ has none")
    why = "the same text gets other scores each time on this device (put_ has none)"
    causality = report["strategies"]["lora"]["causality"]
    assert causality["why"] == causality["documents_isolated"]["why"] == report["strategies"]["lora"]["distribution"]["why"] == why


def test_what_cublas_needs_is_set_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with start_process():
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
