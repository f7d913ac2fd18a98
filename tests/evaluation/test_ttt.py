import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from lib.distributed import SINGLE_CPU, Process
from lib.evaluation import ttt
from lib.evaluation.config import EvaluateParams
from lib.evaluation.score import Scorer
from lib.evaluation.ttt import Adapter, chunk_lr, score_first
from lib.evaluation.windows import sliding_windows
from lib.model.gpt import GPT
from tests.evaluation.test_score import score_by_hand
from tests.evaluation.tiny import make_model, make_params, make_stream, make_tokens
from tests.processes import run_processes

NUM_TARGETS = 5 * 16 + 11  # five chunks and a part of one


def score_sliding(model: GPT, stream: Tensor, params: EvaluateParams) -> npt.NDArray[np.float32]:
    scorer = Scorer(model, stream, batch_windows=params.batch_windows, precision=params.precision, process=SINGLE_CPU)
    scorer.score(sliding_windows(len(stream) - 1, params.window_tokens, params.stride_tokens))
    return scorer.collect()


def adapt_by_hand(model: GPT, tokens: npt.NDArray[np.uint16], params: EvaluateParams) -> npt.NDArray[np.float64]:
    """pr585's procedure as its description reads: all scores of the present weights, keep those of the chunk, AdamW written out."""
    settings, window = params.score_first, params.window_tokens
    model = copy.deepcopy(model)
    stream = torch.from_numpy(tokens.astype(np.int64))
    num_targets, chunk_tokens = len(tokens) - 1, settings.chunk_tokens
    num_chunks = math.ceil(num_targets / chunk_tokens)
    last = f"blocks.{len(model.blocks) - 1}."
    trained = [p for name, p in model.named_parameters() if name.startswith(last) or "scale" in name]
    first_moments, second_moments, step = [torch.zeros_like(p) for p in trained], [torch.zeros_like(p) for p in trained], 0
    nats = np.empty(num_targets)
    for chunk in range(num_chunks):
        begin, end = chunk * chunk_tokens, min((chunk + 1) * chunk_tokens, num_targets)
        nats[begin:end] = score_by_hand(model, tokens, window, params.stride_tokens)[begin:end]
        if chunk == num_chunks - 1:
            break
        lr = settings.lr * (1 + math.cos(math.pi * chunk / (num_chunks - 1))) / 2
        rows = stream[begin : end + 1].unfold(0, window + 1, window)
        for _ in range(settings.epochs):
            for batch in torch.split(rows, settings.batch_sequences):
                gradients = torch.autograd.grad(model(batch[:, :-1], batch[:, 1:]).mean(), trained)
                norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
                step += 1
                with torch.no_grad():
                    for parameter, gradient, m, v in zip(trained, gradients, first_moments, second_moments, strict=True):
                        clipped = gradient * min(1.0, settings.grad_clip / (norm + 1e-6))
                        m.lerp_(clipped, 1 - settings.momentum)
                        v.lerp_(clipped.square(), 1 - 0.999)
                        parameter.mul_(1 - lr * settings.weight_decay)
                        parameter.sub_(lr * m / (1 - settings.momentum**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-8))
    return nats


@pytest.mark.parametrize("settings", [
    {}, {"batch_sequences": 1, "epochs": 1, "grad_clip": 0.1}, {"chunk_tokens": 24, "batch_sequences": 8}])
def test_scores_are_those_of_an_independent_implementation(settings: dict[str, Any]) -> None:
    params, model = make_params(settings), make_model()
    nats, _ = score_first(model, make_stream(NUM_TARGETS), params, SINGLE_CPU)
    assert nats == pytest.approx(adapt_by_hand(model, make_tokens(NUM_TARGETS), params), abs=2e-4)
    assert np.abs(nats - score_sliding(model, make_stream(NUM_TARGETS), params)).max() > 0.05  # it did adapt


def first_changed_score(settings: dict[str, Any], changed_token: int) -> int:
    """The first target whose score differs when a token and everything after it changes."""
    stream = make_stream(NUM_TARGETS)
    other = stream.clone()
    other[changed_token:] = 31 - other[changed_token:]
    scores = [score_first(make_model(), tokens, make_params(settings), SINGLE_CPU)[0] for tokens in (stream, other)]
    return int(np.flatnonzero(scores[0] != scores[1])[0])


@pytest.mark.parametrize("changed_token", [20, 33, 48, 49, 80])
def test_later_tokens_change_no_earlier_score_by_a_single_bit(changed_token: int) -> None:
    assert first_changed_score({}, changed_token) == changed_token - 1  # target t is token t + 1


def test_training_before_scoring_is_seen_by_that_test(monkeypatch: pytest.MonkeyPatch) -> None:
    class Leaky(Scorer):
        def score(self, windows: Any) -> None:
            first = int(windows.first_scored[0])
            if first + 16 <= NUM_TARGETS:
                Adapter(self._model, self._stream, make_params(), SINGLE_CPU, lambda _: None).train(np.array([first, first + 8]), 0.01)
            super().score(windows)

    monkeypatch.setattr(ttt, "Scorer", Leaky)
    assert first_changed_score({}, 48) < 47


def test_without_learning_rate_it_is_sliding_bit_for_bit() -> None:
    # The same windows share a batch in both: the first is alone, 4 more are in chunk 0, 8 in every other chunk.
    params = make_params({"lr": 0.0}, batch_windows=4)
    stream = make_stream(NUM_TARGETS)
    nats, _ = score_first(make_model(), stream, params, SINGLE_CPU)
    assert np.array_equal(nats, score_sliding(make_model(), stream, params))


def test_the_first_chunk_is_scored_by_the_artifact_s_model() -> None:
    nats, _ = score_first(make_model(), make_stream(NUM_TARGETS), make_params(), SINGLE_CPU)
    assert np.array_equal(nats[:16], score_sliding(make_model(), make_stream(NUM_TARGETS), make_params())[:16])


def test_adaptation_lowers_the_loss_of_text_that_repeats_itself() -> None:
    stream = make_stream(16).tile(8)
    nats, _ = score_first(make_model(), stream, make_params({"epochs": 4}), SINGLE_CPU)
    assert nats[-16:].mean() < 0.7 * nats[:16].mean()


def test_the_log_shows_what_was_scored_before_what_was_trained() -> None:
    _, log = score_first(make_model(), make_stream(NUM_TARGETS), make_params({"lr_schedule": "constant", "batch_sequences": 1}), SINGLE_CPU)
    assert [tuple(row) for row in log] == [
        *((chunk, 16 * chunk, 16 * chunk + 15, 16 * chunk, 16 * chunk + 15, 4, 0.01) for chunk in range(5)),
        (5, 80, 90, None, None, 0, 0.0)]


@pytest.mark.parametrize("num_targets", [16, 9])
def test_a_single_chunk_is_scored_and_not_trained_on(num_targets: int) -> None:
    nats, log = score_first(make_model(), make_stream(num_targets), make_params(), SINGLE_CPU)
    assert len(nats) == num_targets
    assert [(row.first_trained, row.num_steps) for row in log] == [(None, 0)]


def test_a_last_chunk_of_full_length_is_not_trained_on() -> None:
    _, log = score_first(make_model(), make_stream(48), make_params(), SINGLE_CPU)
    assert [row.num_steps for row in log] == [2, 2, 0]


def test_the_artifact_s_model_is_left_as_it_was() -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    score_first(model, make_stream(NUM_TARGETS), make_params({"trainable": ["all"]}), SINGLE_CPU)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_the_named_groups_change(optimizer: str) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    params = make_params({"optimizer": optimizer, "trainable": ["residual_mix", "embedding"]})
    Adapter(model, make_stream(NUM_TARGETS), params, SINGLE_CPU, lambda _: None).train(np.array([0, 8, 16]), 0.01)
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == {  # the others cost nothing
        "token_embedding.weight", *(f"blocks.{n}.residual_mix" for n in range(3))}
    assert all(parameter.requires_grad for parameter in model.parameters())
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"token_embedding.weight", *(f"blocks.{n}.residual_mix" for n in range(3))}


def test_scoring_and_training_each_set_their_mode() -> None:
    seen = set()

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model()

        def forward(self, *inputs: Any) -> Tensor:
            seen.add((torch.is_grad_enabled(), self.training))
            nats: Tensor = self.inner(*inputs)
            return nats

    params = make_params({"trainable": ["all"]})
    score_first(Watched().eval(), make_stream(NUM_TARGETS), params, SINGLE_CPU)
    assert seen == {(False, False), (True, True)}


def test_work_that_is_reported_adds_up() -> None:
    work: list[int] = []
    score_first(make_model(), make_stream(NUM_TARGETS), make_params(), SINGLE_CPU, work.append)
    assert sum(work) == sliding_windows(NUM_TARGETS, 8, 2).length.sum() + 3 * 2 * 5 * 16


def test_learning_rate_falls_from_its_value_to_nothing_as_a_cosine() -> None:
    settings, root = make_params({"lr": 1.0}).score_first, math.sqrt(0.5)
    assert [chunk_lr(settings, chunk, 5) for chunk in range(5)] == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0])
    assert chunk_lr(make_params({"lr_schedule": "constant"}).score_first, 3, 5) == 0.01


TWO_PROCESSES: list[dict[str, Any]] = [
    {},
    {"batch_sequences": 1, "epochs": 1},  # the second process has no rows
    {"chunk_tokens": 24, "batch_sequences": 3, "optimizer": "sgd", "lr": 0.001, "grad_clip": 1000.0},  # 2 rows and 1; no rescaling
]


def adapt_in_process(process: Process, folder: Path) -> None:
    for number, settings in enumerate(TWO_PROCESSES):
        nats, _ = score_first(make_model(), make_stream(NUM_TARGETS), make_params(settings), process)
        np.save(folder / f"{number}-{process.rank}.npy", nats)


def test_two_processes_give_the_scores_of_one(tmp_path: Path) -> None:
    run_processes(adapt_in_process, 2, tmp_path)
    for number, settings in enumerate(TWO_PROCESSES):
        nats, _ = score_first(make_model(), make_stream(NUM_TARGETS), make_params(settings), SINGLE_CPU)
        for rank in (0, 1):
            assert np.load(tmp_path / f"{number}-{rank}.npy") == pytest.approx(nats, abs=1e-5)
