from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.score import Scorer, mode, score_plain
from lib.evaluation.windows import Windows, plain_windows, sliding_windows
from lib.model.gpt import GPT
from tests.evaluation.tiny import make_model, make_stream, make_tokens
from tests.processes import run_processes


def score_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], window: int, stride: int) -> npt.NDArray[np.float64]:
    """One window after the other, full logits; every target scored by the first window that reaches it."""
    nats = np.full(len(tokens) - 1, np.nan)
    stream = torch.from_numpy(tokens.astype(np.int64))
    for start in range(0, len(nats), stride):
        end = min(start + window, len(nats))
        with torch.no_grad():
            probabilities = F.log_softmax(model.logits(stream[None, start:end]).double(), dim=-1)[0]
        for target in range(start, end):
            if np.isnan(nats[target]):
                nats[target] = -probabilities[target - start, stream[target + 1]]
    return nats


@pytest.mark.parametrize(("num_targets", "window", "stride"),
                         [(50, 8, 2), (51, 8, 3), (49, 8, 8), (5, 8, 4), (8, 8, 1), (1, 8, 8), (40, 1, 1)])
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_are_those_of_brute_force(num_targets: int, window: int, stride: int, batch: int) -> None:
    model, tokens = make_model(), make_tokens(num_targets)
    scorer = Scorer(model, make_stream(num_targets), batch_windows=batch, precision="fp32", process=SINGLE_CPU)
    scorer.score(sliding_windows(num_targets, window, stride))
    assert scorer.collect() == pytest.approx(score_by_hand(model, tokens, window, stride), abs=1e-5, rel=1e-6)


def test_plain_scores_are_those_of_brute_force() -> None:
    model, tokens = make_model(tied_head=False), make_tokens(45)
    nats = score_plain(model, tokens, window_tokens=8, batch_windows=3, precision="fp32", process=SINGLE_CPU)
    assert nats.dtype == np.float32
    assert nats == pytest.approx(score_by_hand(model, tokens, 8, 8), abs=1e-5, rel=1e-6)


def test_bf16_changes_the_scores_a_little() -> None:
    model, tokens = make_model(), make_tokens(45)
    exact, rounded = (score_plain(model, tokens, window_tokens=8, batch_windows=3, precision=precision, process=SINGLE_CPU)
                      for precision in ("fp32", "bf16"))
    assert not np.array_equal(exact, rounded)
    assert rounded.mean() == pytest.approx(exact.mean(), rel=0.05)


def test_work_is_reported_batch_by_batch_and_adds_up() -> None:
    reported: list[int] = []
    scorer = Scorer(make_model(), make_stream(40), batch_windows=4, precision="fp32", process=SINGLE_CPU, advance=reported.append)
    windows = sliding_windows(40, 8, 2)
    scorer.score(windows)
    assert sum(reported) == windows.length.sum()
    assert len(reported) > 3


@pytest.mark.parametrize(("windows", "message"), [
    (sliding_windows(20, 8, 2).select(slice(0, 4)), "6 were not, the first is target 14, scored 0 times"),
    (Windows(np.array([0, 8, 12]), np.array([8, 8, 8]), np.array([8, 8, 8])), "4 were not, the first is target 12, scored 2 times"),
])
def test_a_target_not_scored_exactly_once_is_an_error(windows: Windows, message: str) -> None:
    scorer = Scorer(make_model(), make_stream(20), batch_windows=4, precision="fp32", process=SINGLE_CPU)
    scorer.score(windows)
    with pytest.raises(RuntimeError, match=message):
        scorer.collect()


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_set_and_comes_back(training: bool) -> None:
    model = make_model().train(training)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    score_plain(model, make_tokens(10), window_tokens=8, batch_windows=1, precision="fp32", process=SINGLE_CPU)
    assert seen == [(False, False)] * 2
    assert model.training is training
    with pytest.raises(KeyError), mode(model, training=not training):
        raise KeyError
    assert model.training is training


def score_in_process(process: Process, folder: Path) -> None:
    scorer = Scorer(make_model(), make_stream(61), batch_windows=4, precision="fp32", process=process)
    scorer.score(sliding_windows(61, 8, 2))
    np.save(folder / f"sliding{process.rank}.npy", scorer.collect())
    np.save(folder / f"short{process.rank}.npy", score_plain(  # one batch: the second process has none
        make_model(), make_tokens(5), window_tokens=8, batch_windows=4, precision="fp32", process=process))


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    run_processes(score_in_process, 2, tmp_path)
    scorer = Scorer(make_model(), make_stream(61), batch_windows=4, precision="fp32", process=SINGLE_CPU)
    scorer.score(sliding_windows(61, 8, 2))
    expected = scorer.collect()
    short = Scorer(make_model(), make_stream(5), batch_windows=4, precision="fp32", process=SINGLE_CPU)
    short.score(plain_windows(5, 8))
    expected_short = short.collect()
    for rank in (0, 1):
        assert np.load(tmp_path / f"sliding{rank}.npy") == pytest.approx(expected, abs=1e-6)
        assert np.load(tmp_path / f"short{rank}.npy") == pytest.approx(expected_short, abs=1e-6)
