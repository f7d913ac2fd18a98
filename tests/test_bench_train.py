"""The bench of training: the plain loop trains as the project does, and the table says what was measured."""

import json
import re
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bench.train
from bench.evaluate import Stopwatch
from bench.train import Loop, Measured, PlainLoop, check_losses, find_peak, flops_per_token, main, make_loops, measure, newton_schulz
from lib.distributed import SINGLE_CPU, Process
from lib.model.config import parse_model
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.sdpa import SDPA
from lib.presets import read_preset
from lib.training import orthogonal
from lib.training.loop import Run
from tests.evaluation.tiny import MODEL
from tests.training.tiny import TRAIN, make_model, make_params

ROOT = Path(__file__).parents[1]
GPU = Process(0, 1, torch.device("cuda", 0))


@pytest.mark.parametrize(("changes", "tolerance"), [
    ({}, 1e-5),
    ({"micro_batch_sequences": 3}, 1e-5),
    ({"row_tokens": 20, "sequence_schedule": [[0.5, 3]]}, 1e-5),
    ({"averaging": {"ema_every_steps": 3}}, 1e-5),
    ({"budget_steps": None, "budget_seconds": 9.0, "optimizer": {"momentum_warmup": 0.0, "warmdown": 1.0}}, 1e-5),
    ({"precision": "bf16"}, 1e-3),
], ids=["default", "micro-batches", "packed", "rare averages", "seconds", "bf16"])
def test_both_loops_train_the_same(changes: dict[str, Any], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of every step, weights and averages, from the same start, where no gradient is near zero, on the same batches."""
    def initialize_with_noise(model: GPT, seed: int) -> None:
        initialize(model, seed)
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)

    monkeypatch.setattr(bench.train, "initialize", initialize_with_noise)
    model_params = parse_model(MODEL, "model.")
    run, plain = (make() for make in make_loops(model_params, make_params(**changes), SDPA, SINGLE_CPU).values())
    assert isinstance(run, Run)
    assert isinstance(plain, PlainLoop)
    for loop in (run, plain):
        for _ in range(10):
            loop.step()
        loop.sync()
    assert len(run.losses) == len(plain.losses) == 10
    torch.testing.assert_close(run.losses, plain.losses, rtol=tolerance, atol=0)
    weights, ema = dict(run.model.named_parameters()), run.parameters.by_name(run.averages.candidates()["ema"])
    for name, weight in plain.model.named_parameters():
        difference = (weights[name] - weight).norm() / weight.norm()
        assert difference <= 30 * tolerance, f"{name} {difference}"
        assert (ema[name] - plain.ema[name]).norm() / weight.norm() <= 30 * tolerance
        assert not torch.equal(plain.ema[name], weight), "an average is not the weight"


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_one_matrix_at_a_time_is_orthogonalized_as_many_are(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(torch.stack([newton_schulz(matrix, 5) for matrix in matrices]), orthogonal.newton_schulz(matrices, 5))


@pytest.mark.parametrize("changes", [
    {}, {"tied_head": False}, {"bigram_rows": 0}, {"value_embedding_dim": 0, "value_embedding_layers": []}], ids=str)
def test_model_flops_are_those_of_a_forward_and_a_backward_pass(changes: dict[str, Any]) -> None:
    model = make_model(**changes)
    tokens = torch.arange(24).view(2, 12) % MODEL["vocab_size"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    assert flops_per_token(model, 2 * 12) * 24 == counter.get_total_flops(), "with attention to all tokens, not to half of them"
    assert flops_per_token(model, 2 * 12) - flops_per_token(model, 12) == 12 * 3 * 16 * 12 / 2


class FakeLoop:
    """Takes a given time for a step, on a clock that only it moves."""

    def __init__(self, log: list[str], name: str, clock: list[float], seconds: Callable[[int], float]) -> None:
        self.log, self.name, self.clock, self.seconds = log, name, clock, seconds
        self.losses: list[float] = []

    def step(self) -> None:
        self.log.append(self.name)
        self.losses.append(2.0)
        self.clock[0] += self.seconds(len(self.losses))

    def sync(self) -> None:
        self.log.append("sync")


def test_blocks_alternate_and_the_first_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(bench.train, "NUM_BLOCKS", 3)
    monkeypatch.setattr(Stopwatch, "now", lambda _: clock[0])
    loops: dict[str, Callable[[], Loop]] = {
        "a": lambda: FakeLoop(log, "a", clock, lambda step: [100.0, 1.0, 50.0, 2.0][(step - 1) // 2]),
        "b": lambda: FakeLoop(log, "b", clock, lambda _: 7.0)}
    measured = measure(loops, SINGLE_CPU, 6)
    assert log == ["a", "a", "sync", "b", "b", "sync"] * 4
    assert (measured["a"].seconds, measured["b"].seconds) == (2.0, 7.0)
    assert measured["a"].losses == [2.0] * 8
    assert measured["a"].peak_mib is not None
    assert measured["a"].peak_mib > 10
    assert measured["b"].peak_mib is None


def test_memory_on_a_gpu_is_that_of_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops that keep 100 and 10 MiB, and hold 5 more in a step."""
    held, peak = 0, 0

    def allocate(mib: int) -> None:
        nonlocal held, peak
        held += mib * 2**20
        peak = max(peak, held)

    def reset(_: torch.device) -> None:
        nonlocal peak
        peak = held

    class Holder(FakeLoop):
        def step(self) -> None:
            super().step()
            allocate(5)
            allocate(-5)

    def make(name: str, mib: int) -> Loop:
        allocate(mib)
        return Holder([], name, [0.0], lambda _: 0.0)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    measured = measure({"a": lambda: make("a", 100), "b": lambda: make("b", 10)}, GPU, 3)
    assert [each.peak_mib for each in measured.values()] == [105, 15]


@pytest.mark.parametrize(("name", "expected"), [
    ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA GH200 480GB", 989.4), ("NVIDIA B200", 2250.0)])
def test_known_gpus_have_their_peak(name: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    peak, source = find_peak(GPU, "bf16")
    assert peak == expected
    assert "bf16" in source


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_peak_of_other_devices_is_measured(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.train, "MATRIX_SIZE", {"cpu": 100})
    ticks = iter(range(1000))
    monkeypatch.setattr(Stopwatch, "now", lambda _: float(next(ticks)))
    peak, source = find_peak(SINGLE_CPU, precision)
    assert peak == pytest.approx(2e6 / 1e12)
    assert f"measured, the fastest of 20 {precision} products" in source


def test_other_work_is_an_error() -> None:
    with pytest.raises(AssertionError, match="mean losses differ"):
        check_losses({"a": Measured(1.0, [2.0, 2.005], None), "b": Measured(1.0, [2.0, 2.0], None)}, "fp32")
    check_losses({"a": Measured(1.0, [2.0, 2.001], None), "b": Measured(1.0, [2.0, 2.0], None)}, "fp32")


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "tiny.yaml"
    vocab_size = {"vocab_size": 300}
    sections = read_preset("default", ROOT / "presets") | {"model": MODEL | vocab_size | {"attention": "sdpa"}, "train": TRAIN}
    sections["tokenize"] |= vocab_size
    preset.write_text(json.dumps(sections))
    options = {"--preset": str(preset), "--sequences": "6", "--steps": "4", "--device-peak-tflops": "0.002"}
    monkeypatch.setattr(sys, "argv", ["train", *chain.from_iterable(options.items())])
    main()
    output = capsys.readouterr().out
    assert f"torch {torch.__version__}, cpu" in output
    assert "attention by sdpa: named by model.attention" in output
    assert "6 sequences of 8 tokens in a step, at most 4 at once" in output
    assert "the device's peak is 0.002 TFLOP/s, given" in output
    rows = {line[:20].strip(): [part.strip("%").replace(",", "") for part in line[20:].split()]
            for line in output.splitlines() if line.startswith(("lib.training.loop", "plain eager loop"))}
    ours, plain = rows["lib.training.loop"], rows["plain eager loop"]
    assert float(ours[3]) > 10
    assert plain[3] == "-"
    for rate, milliseconds, utilisation, _, loss in (ours, plain):
        assert float(rate) == pytest.approx(48 / float(milliseconds) * 1000, rel=0.01)
        assert float(utilisation) / 100 == pytest.approx(flops_per_token(make_model(vocab_size=300), 8) * float(rate) / 2e9, abs=1e-3)
        assert float(loss) == pytest.approx(float(ours[4]), rel=1e-3)
    ratio = re.search(r"^([\d.]+) x as fast", output, re.MULTILINE)
    assert ratio is not None
    assert float(ratio[1]) == pytest.approx(float(plain[1]) / float(ours[1]), rel=0.02)


