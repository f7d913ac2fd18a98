import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.bpb import make_score
from lib.evaluation.ledger import SHARED, Event
from lib.evaluation.score import Forward, Scorer, gather_rows, load_stream, mode
from lib.evaluation.sheet import ScoreSheet
from lib.evaluation.windows import Windows, batch_size, one_pass_windows, plain_windows, sliding_windows, split_batches
from lib.model import compilation
from lib.model.gpt import GPT
from tests.evaluation.tiny import MODEL, make_model, make_stream, make_tokens
from tests.model.test_gpt import reference_logits, weights_of
from tests.processes import run_processes

CPU = torch.device("cpu")


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def score_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], window: int, stride: int, attention_tokens: int | None = None
                  ) -> tuple[npt.NDArray[np.float64], list[int]]:
    """One window after the other, all logits in fp64 by the plain model; every target scored by the first window that reaches it."""
    nats, context = np.full(len(tokens) - 1, np.nan), [0] * (len(tokens) - 1)
    weights, options = weights_of(model), MODEL | {"tied_head": model.params.tied_head}
    for start in range(0, len(nats), stride):
        end = min(start + window, len(nats))
        if np.isnan(nats[end - 1]):
            logarithms = log_softmax(reference_logits(options, weights, tokens[start:end].tolist(), attention_tokens))
        for target in range(start, end):
            if np.isnan(nats[target]):
                nats[target], context[target] = -logarithms[target - start, tokens[target + 1]], target - start
    return nats, context


def make_scorer(num_targets: int, model: nn.Module | None = None, *, batch_tokens: int = 32, process: Process = SINGLE_CPU,
                advance: Callable[[int], None] = lambda _: None, wants_last: bool = False) -> tuple[Scorer, ScoreSheet]:
    sheet = ScoreSheet(num_targets, CPU, wanted=num_targets - 1 if wants_last else None)
    return Scorer(Forward(model or make_model(), "fp32"), make_stream(num_targets), sheet, batch_tokens=batch_tokens, process=process,
                  advance=advance), sheet


def scored(windows: Windows, num_targets: int, model: nn.Module | None = None) -> ScoreSheet:
    scorer, sheet = make_scorer(num_targets, model)
    scorer.score(windows)
    return sheet


@pytest.mark.parametrize(("num_targets", "window", "stride"),
                         [(50, 8, 2), (51, 8, 3), (49, 8, 8), (5, 8, 4), (8, 8, 1), (1, 8, 8), (40, 1, 1), (40, 12, 5)])
@pytest.mark.parametrize("batch_tokens", [1, 35])
def test_scores_are_those_of_brute_force(num_targets: int, window: int, stride: int, batch_tokens: int) -> None:
    model = make_model()
    scorer, sheet = make_scorer(num_targets, model, batch_tokens=batch_tokens)
    scorer.score(sliding_windows(num_targets, window, stride))
    nats, context = sheet.collect(SINGLE_CPU)
    expected, expected_context = score_by_hand(model, make_tokens(num_targets), window, stride)
    assert nats.dtype == np.float32
    assert nats == pytest.approx(expected, abs=1e-5, rel=1e-6)
    assert context.tolist() == expected_context


@pytest.mark.parametrize(("num_targets", "attention", "segment"), [(50, 8, 16), (51, 8, 3), (49, 1, 7), (5, 8, 4), (30, 12, 1)])
def test_scores_of_one_pass_are_those_of_brute_force(num_targets: int, attention: int, segment: int) -> None:
    model = make_model()
    nats, context = scored(one_pass_windows(num_targets, attention, segment), num_targets, model).collect(SINGLE_CPU)
    expected, expected_context = score_by_hand(model, make_tokens(num_targets), attention + segment, segment, attention)
    assert nats == pytest.approx(expected, abs=1e-5, rel=1e-6)
    assert context.tolist() == expected_context


@pytest.mark.parametrize(("windows", "by_hand"), [
    (plain_windows(600, 8), (8, 8, None)), (sliding_windows(600, 8, 3), (8, 3, None)), (one_pass_windows(600, 8, 20), (28, 20, 8))],
    ids=["plain", "sliding", "one_pass"])
def test_bits_per_byte_are_those_of_brute_force_to_seven_digits(windows: Windows, by_hand: tuple[int, int, int | None]) -> None:
    model, num_bytes = make_model(), np.arange(600) % 7 + 1
    nats, _ = scored(windows, 600, model).collect(SINGLE_CPU)
    expected, _ = score_by_hand(model, make_tokens(600), *by_hand)
    assert abs(make_score(nats, num_bytes).bpb - expected.sum() / math.log(2) / num_bytes.sum()) < 1e-7


def test_a_text_is_scored_chunk_by_chunk_as_at_once() -> None:
    expected = scored(sliding_windows(61, 8, 2), 61).collect(SINGLE_CPU)
    scorer, sheet = make_scorer(61)
    for first in range(0, 61, 16):
        scorer.score(sliding_windows(min(first + 16, 61), 8, 2, first=first))
    nats, context = sheet.collect(SINGLE_CPU)
    assert nats == pytest.approx(expected[0], abs=1e-6)
    assert context.tolist() == expected[1].tolist()
    assert sheet.ledger.events == [Event(n, "scored", SHARED, 16 * n, min(16 * n + 16, 61) - 1) for n in range(4)]


def test_the_stream_takes_four_bytes_a_token_and_its_rows_are_the_tokens() -> None:
    tokens = np.array([1, 65535, 7, 40000, 3], np.uint16)
    stream = load_stream(tokens, CPU)
    assert stream.dtype == torch.int32 and stream.tolist() == tokens.tolist()
    rows = gather_rows(stream, torch.tensor([2, 0, 1]), 3)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[7, 40000, 3], [1, 65535, 7], [65535, 7, 40000]]


@pytest.mark.parametrize("windows", [sliding_windows(40, 8, 2), one_pass_windows(40, 8, 7)], ids=["sliding", "one_pass"])
def test_work_is_reported_batch_by_batch_and_adds_up(windows: Windows) -> None:
    reported: list[int] = []
    scorer, _ = make_scorer(40, advance=reported.append)
    scorer.score(windows)
    assert reported == [batch.work for batch in split_batches(windows, 32)]
    assert sum(reported) == windows.work


def count_rows(model: GPT) -> list[int]:
    """Gets the number of windows of each forward pass."""
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    return rows


@pytest.mark.parametrize(("windows", "message"), [
    (sliding_windows(20, 8, 2).select(slice(0, 4)), "6 were not, the first is target 14, scored 0 times"),
    (Windows(np.array([0, 8, 12]), np.array([8, 8, 8]), np.array([8, 8, 8])), "4 were not, the first is target 12, scored 2 times"),
])
def test_a_target_not_scored_exactly_once_is_an_error(windows: Windows, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        scored(windows, 20).collect(SINGLE_CPU)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_set_and_comes_back(training: bool) -> None:
    model = make_model().train(training)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    make_scorer(10, model, batch_tokens=8)[0].score(plain_windows(10, 8))
    assert seen == [(False, False)] * 2
    assert model.training is training
    with pytest.raises(KeyError), mode(model, training=not training):
        assert model.training is not training
        raise KeyError
    assert model.training is training


@pytest.mark.parametrize("windows", [sliding_windows(61, 8, 2), plain_windows(61, 8), one_pass_windows(61, 8, 16)],
                         ids=["sliding", "plain", "one_pass"])
def test_the_last_target_s_distribution_is_what_it_was_scored_with(windows: Windows) -> None:
    model, tokens = make_model(), make_tokens(61)
    scorer, sheet = make_scorer(61, model, wants_last=True)
    scorer.score(windows)
    last, nats = sheet.collect_distribution(SINGLE_CPU), sheet.collect(SINGLE_CPU)[0]
    start = int(windows.start[-1])
    expected = log_softmax(reference_logits(MODEL, weights_of(model), tokens[start:-1].tolist(), windows.attention_tokens))[-1]
    assert last == pytest.approx(expected, abs=1e-5)
    assert nats[-1] == pytest.approx(-last[tokens[-1]], abs=1e-6)
    unasked = scored(windows, 61, model)
    with pytest.raises(RuntimeError, match="expected the distribution of the wanted target once, found it 0 times"):
        unasked.collect_distribution(SINGLE_CPU)


@pytest.mark.parametrize("windows", [sliding_windows(101, 8, 2), plain_windows(101, 8), one_pass_windows(101, 8, 2)],
                         ids=["sliding", "plain", "one_pass"])
def test_full_batches_and_only_they_are_compiled(windows: Windows, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a real compiler, and then run as it is: a part that cannot be traced would be an error."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    model, calls = make_model(), list[tuple[int, int]]()
    model.register_forward_pre_hook(
        lambda _, inputs, options: calls.append(inputs[0].shape) if options["compiled"] else None, with_kwargs=True)
    sheet = ScoreSheet(101, CPU)
    Scorer(Forward(model, "fp32", compiled=True), make_stream(101), sheet, batch_tokens=32, process=SINGLE_CPU).score(windows)
    full = [(len(batch.start), int(batch.length[0])) for batch in split_batches(windows, 32)
            if len(batch.start) == batch_size(int(batch.length[0]), 32)]
    assert calls == full and 3 <= len(full) < len(split_batches(windows, 32))
    assert len(set(full)) == 1  # one shape, compiled once
    expected = scored(windows, 101, model).collect(SINGLE_CPU)[0]
    np.testing.assert_allclose(sheet.collect(SINGLE_CPU)[0], expected, atol=1e-6)


def score_in_process(process: Process, folder: Path) -> None:
    plain, sliding = plain_windows(61, 8), sliding_windows(61, 8, 2)
    reported: list[int] = []
    scorer, plain_sheet = make_scorer(61, process=process, batch_tokens=20)
    scorer.score(plain)
    model = make_model()
    rows = count_rows(model)
    scorer, sheet = make_scorer(61, model, process=process, advance=reported.append, wants_last=True)
    scorer.score(sliding)
    unfinished, done = sheet.collect_unfinished(process)
    short, short_sheet = make_scorer(5, process=process, wants_last=True)  # one batch: the other processes have none
    short.score(plain_windows(5, 8))
    torch.save({
        "plain": plain_sheet.collect(process), "sliding": sheet.collect(process), "last": sheet.collect_distribution(process), "rows": rows,
        "work": sum(reported), "unfinished": (unfinished, done), "short": short_sheet.collect(process)[0],
        "short_last": short_sheet.collect_distribution(process)},
        folder / f"{process.rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [2, 4])
def test_several_processes_give_the_scores_of_one(num_processes: int, tmp_path: Path) -> None:
    run_processes(score_in_process, num_processes, tmp_path)
    (tmp_path / "alone").mkdir()
    score_in_process(SINGLE_CPU, tmp_path / "alone")
    alone, *others = (torch.load(path, weights_only=False) for path in [tmp_path / "alone/0.pt", *sorted(tmp_path.glob("*.pt"))])
    assert len(others) == num_processes
    for other in others:
        for name in ("plain", "sliding"):
            assert other[name][0] == pytest.approx(alone[name][0], abs=1e-6)
            assert other[name][1].tolist() == alone[name][1].tolist()
            bits = [make_score(each[name][0], np.ones(61, np.int64)).bpb for each in (other, alone)]
            assert abs(bits[0] - bits[1]) < 1e-6
        for name in ("last", "short", "short_last"):
            assert other[name] == pytest.approx(alone[name], abs=1e-6)
        np.testing.assert_array_equal(other["unfinished"][0], other["sliding"][0])
        assert other["unfinished"][1].all()
        assert other["work"] == alone["work"]
    assert sum(sum(other["rows"]) for other in others) == sum(alone["rows"])  # nothing is computed twice
    shares = [len(other["rows"]) for other in others]
    assert max(shares) - min(shares) <= 1
