"""The comparison on held-out documents against sums written out from the logits, window by window."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lib.artifacts.tokens import Split
from lib.data.encoder import encode_documents
from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.heldout import HeldoutComparison, compare_heldout, score_heldout, window_losses
from lib.model.gpt import GPT
from tests.data.texts import ENGLISH, TINY_VOCAB_SIZE, tiny_tokenizer
from tests.evaluation.test_score import score_by_hand
from tests.evaluation.tiny import make_model, make_tokens
from tests.processes import run_processes

WINDOW = 6


def make_pair() -> tuple[GPT, GPT]:
    model, reference = make_model(vocab_size=TINY_VOCAB_SIZE), make_model(vocab_size=TINY_VOCAB_SIZE)
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.05)
    return model, reference


def make_split(num_windows: int = 10) -> Split:
    """Two shards, and a few tokens more than the windows need."""
    tokenizer = tiny_tokenizer()
    tokens = next(encode_documents(tokenizer, [ENGLISH * 5]))[:num_windows * WINDOW + 4]
    return Split(Path("heldout"), (tokens[:len(tokens) // 3], tokens[len(tokens) // 3:]), 1, 0, 0, TINY_VOCAB_SIZE)


def compare(model: GPT, reference: GPT, split: Split, *, max_tokens: int = 10**6, batch_windows: int = 4,
            process: Process = SINGLE_CPU) -> HeldoutComparison:
    return compare_heldout(model.logits, reference.logits, split, tiny_tokenizer(), window_tokens=WINDOW, max_tokens=max_tokens,
                           batch_windows=batch_windows, process=process)


def expected_figures(model: GPT, reference: GPT, split: Split, windows: list[int]) -> HeldoutComparison:
    """One window, one target at a time, in fp64."""
    tokens, tokenizer = np.concatenate(split.shards), tiny_tokenizer()
    kl, ours, theirs, num_bytes = 0.0, 0.0, 0.0, 0
    for window in windows:
        part = tokens[window * WINDOW:(window + 1) * WINDOW + 1]
        row = torch.from_numpy(part.astype(np.int64))[None]
        p, q = (each.logits(row[:, :-1]).detach()[0].double().softmax(-1) for each in (reference, model))
        kl += float((p * (p / q).log()).sum())
        for t in range(WINDOW):
            ours -= math.log(q[t, row[0, t + 1]])
            theirs -= math.log(p[t, row[0, t + 1]])
        num_bytes += int(tokenizer.target_bytes(part).sum())
    num_tokens = len(windows) * WINDOW
    bpb, bpb_float = (nats / math.log(2) / num_bytes for nats in (ours, theirs))
    return HeldoutComparison(kl / num_tokens, (ours - theirs) / num_tokens, bpb, bpb_float, num_tokens)


@pytest.mark.parametrize(("max_tokens", "windows"), [
    (10**6, list(range(10))), (60, list(range(10))), (30, [0, 2, 4, 6, 8]), (23, [0, 3, 6]), (1, [0])])
def test_equals_the_sums_over_evenly_spread_windows(max_tokens: int, windows: list[int]) -> None:
    """All of them if they may be, and at least one."""
    (model, reference), split = make_pair(), make_split()
    found, expected = compare(model, reference, split, max_tokens=max_tokens), expected_figures(model, reference, split, windows)
    assert found == pytest.approx(expected, rel=2e-5, abs=1e-7)
    assert found.num_tokens == len(windows) * WINDOW and found.kl > 1e-4


@pytest.mark.parametrize(("max_tokens", "windows"), [(30, [0, 2, 4, 6, 8]), (1, [0])])
def test_a_score_of_some_windows_is_that_of_the_comparison(max_tokens: int, windows: list[int]) -> None:
    (model, reference), split = make_pair(), make_split()
    expected = expected_figures(model, reference, split, windows)
    for batch_windows in (1, 3, 100):
        found = score_heldout(model, split.tokens(), tiny_tokenizer(), window_tokens=WINDOW, batch_windows=batch_windows, precision="fp32",
                              process=SINGLE_CPU, max_tokens=max_tokens)
        assert found.bpb == pytest.approx(expected.bpb, rel=1e-5) and found.num_tokens == expected.num_tokens


def test_a_score_of_more_than_there_is_is_that_of_the_whole_stream() -> None:
    (model, _), tokens = make_pair(), make_split().tokens()
    nats = window_losses(model, tokens, window_tokens=WINDOW, batch_windows=4, precision="fp32", process=SINGLE_CPU)
    for max_tokens in (None, len(tokens) - 1, 10**6):
        found = score_heldout(model, tokens, tiny_tokenizer(), window_tokens=WINDOW, batch_windows=4, precision="fp32", process=SINGLE_CPU,
                              max_tokens=max_tokens)
        assert found.num_tokens == len(tokens) - 1 and found.loss == pytest.approx(float(nats.mean()), rel=1e-6)


def test_identical_models_do_not_differ() -> None:
    _, reference = make_pair()
    found = compare(reference, reference, make_split())
    assert (found.kl, found.loss_increase) == (0, 0) and found.bpb == found.bpb_float > 0


def test_the_order_of_the_models_matters() -> None:
    """KL(float || quantized), not the other way round; the loss increase changes its sign."""
    (model, reference), split = make_pair(), make_split()
    found, exchanged = compare(model, reference, split), compare(reference, model, split)
    assert found.loss_increase == pytest.approx(-exchanged.loss_increase) and abs(found.kl / exchanged.kl - 1) > 1e-3
    assert (found.bpb, found.bpb_float) == (exchanged.bpb_float, exchanged.bpb)


def test_batches_change_nothing() -> None:
    (model, reference), split = make_pair(), make_split()
    for batch_windows in (1, 3, 100):
        assert compare(model, reference, split, batch_windows=batch_windows) == pytest.approx(compare(model, reference, split), rel=1e-5)


def test_metrics_are_rounded_for_the_file() -> None:
    metrics = HeldoutComparison(0.1234567891, -1e-9, 2.0, 1.0, 60).metrics()
    assert metrics == {"heldout_bpb": 2.0, "heldout_bpb_float": 1.0, "heldout_kl": 0.12345679, "heldout_loss_increase": 0.0,
                       "heldout_tokens": 60}


def test_too_few_tokens_are_an_error_that_names_the_remedy() -> None:
    split = Split(Path("heldout"), (np.zeros(WINDOW, np.uint16),), 1, 0, 0, TINY_VOCAB_SIZE)
    with pytest.raises(ValueError, match=rf"heldout: expected at least {WINDOW + 1} held-out tokens, found {WINDOW}; raise tokenize"):
        compare(*make_pair(), split)


def _compare_with_one_process(process: Process, expected: dict[int, HeldoutComparison]) -> None:
    for max_tokens, comparison in expected.items():
        found = compare(*make_pair(), make_split(), max_tokens=max_tokens, process=process)
        assert found == pytest.approx(comparison, rel=1e-5), (max_tokens, found)


@pytest.mark.slow
def test_two_processes_find_the_same() -> None:
    """Also with one window, which leaves one of them without any."""
    expected = {max_tokens: compare(*make_pair(), make_split(), max_tokens=max_tokens) for max_tokens in (42, 1)}
    run_processes(_compare_with_one_process, 2, expected)


def test_plain_scores_are_those_of_brute_force() -> None:
    model, tokens = make_model(tied_head=False), make_tokens(45)
    nats = window_losses(model, tokens, window_tokens=8, batch_windows=3, precision="fp32", process=SINGLE_CPU)
    assert nats == pytest.approx(score_by_hand(model, tokens, 8, 8)[0], abs=1e-5, rel=1e-6)


def test_a_model_may_be_scored_as_it_is_before_its_loop_begins() -> None:
    model, tokens = make_model(unet_skips=False, loop={"first": 1, "last": 2, "passes": 2}), make_tokens(8)
    inputs = torch.from_numpy(tokens.astype(np.int64))[None]
    found = {looped: window_losses(model, tokens, window_tokens=8, batch_windows=1, precision="fp32", process=SINGLE_CPU, looped=looped)
             for looped in (False, True)}
    for looped, nats in found.items():
        assert nats == pytest.approx(model(inputs[:, :-1], inputs[:, 1:], looped=looped)[0].detach().numpy(), abs=1e-6)
    assert abs(found[True] - found[False]).max() > 1e-3


def test_a_text_without_targets_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected at least one target"):
        window_losses(make_model(), make_tokens(0), window_tokens=8, batch_windows=3, precision="fp32", process=SINGLE_CPU)


def test_bf16_changes_the_scores_a_little() -> None:
    model, tokens = make_model(), make_tokens(45)
    exact, rounded = (window_losses(model, tokens, window_tokens=8, batch_windows=3, precision=precision, process=SINGLE_CPU)
                      for precision in ("fp32", "bf16"))
    assert not np.array_equal(exact, rounded)
    assert rounded.mean() == pytest.approx(exact.mean(), rel=0.05)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_set_and_comes_back(training: bool) -> None:
    model = make_model().train(training)
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append((module.training, torch.is_grad_enabled())))
    window_losses(model, make_tokens(10), window_tokens=8, batch_windows=1, precision="fp32", process=SINGLE_CPU)
    assert seen == [(False, False)] * 2
    assert model.training is training


def _losses_of_some_lengths(process: Process) -> list[np.ndarray[Any, Any]]:
    return [window_losses(make_model(), make_tokens(n), window_tokens=8, batch_windows=4, precision="fp32", process=process)
            for n in (1, 5, 8, 45, 64)]


def _check_losses(process: Process, expected: list[np.ndarray[Any, Any]]) -> None:
    for found, alone in zip(_losses_of_some_lengths(process), expected, strict=True):
        assert found == pytest.approx(alone, abs=1e-6)


@pytest.mark.slow
def test_two_processes_find_the_losses_of_one() -> None:
    run_processes(_check_losses, 2, _losses_of_some_lengths(SINGLE_CPU))
