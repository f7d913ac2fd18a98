import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lib.evaluation.adapter import Adapter, scheduled_lr
from lib.evaluation.config import AdaptationParams
from lib.evaluation.job import Job
from lib.evaluation.ledger import Event
from lib.model.gpt import GPT
from tests.evaluation.tiny import make_job, make_model, make_params, make_tokens

NUM_TARGETS = 45
WINDOW = 8
STARTS = np.array([8, 16, 24, 32])


def is_last_block_or_scale(name: str) -> bool:
    """What `tiny.ADAPTATION` trains."""
    return name.startswith("blocks.2.") or "scale" in name


class TrainerByHand:
    """Rows in order, gradients clipped by their common norm, AdamW and SGD written out.

    AdamW (arXiv:1711.05101, algorithm 2) decays the weights apart from the gradient; SGD adds the decay to the gradient.
    """

    def __init__(self, model: GPT, settings: AdaptationParams, is_trained: Callable[[str], bool]) -> None:
        self.model, self.settings, self.num_steps = model, settings, 0
        self.trained = [parameter for name, parameter in model.named_parameters() if is_trained(name)]
        self.first_moments, self.second_moments = ([torch.zeros_like(parameter) for parameter in self.trained] for _ in range(2))

    def train(self, stream: Tensor, starts: Sequence[int], window: int, lr: float, epochs: int) -> None:
        for _ in range(epochs):
            for first in range(0, len(starts), self.settings.batch_sequences):
                of_step = starts[first : first + self.settings.batch_sequences]
                self.step(torch.stack([stream[start : start + window + 1] for start in of_step]), lr)

    def step(self, rows: Tensor, lr: float) -> None:
        gradients = torch.autograd.grad(self.model(rows[:, :-1], rows[:, 1:]).mean(), self.trained)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        clip = 1.0 if self.settings.grad_clip is None else min(1.0, self.settings.grad_clip / (norm + 1e-6))
        self.num_steps += 1
        with torch.no_grad():
            for parameter, gradient, first, second in zip(self.trained, gradients, self.first_moments, self.second_moments, strict=True):
                (self._adamw if self.settings.optimizer == "adamw" else self._sgd)(parameter, gradient * clip, first, second, lr)

    def _adamw(self, parameter: Tensor, gradient: Tensor, first: Tensor, second: Tensor, lr: float) -> None:
        beta1, beta2 = self.settings.momentum, 0.999
        first.copy_(beta1 * first + (1 - beta1) * gradient)
        second.copy_(beta2 * second + (1 - beta2) * gradient.square())
        parameter.mul_(1 - lr * self.settings.weight_decay)
        parameter.sub_(lr * first / (1 - beta1**self.num_steps) / ((second / (1 - beta2**self.num_steps)).sqrt() + 1e-8))

    def _sgd(self, parameter: Tensor, gradient: Tensor, velocity: Tensor, _: Tensor, lr: float) -> None:
        velocity.copy_(self.settings.momentum * velocity + gradient + self.settings.weight_decay * parameter)
        parameter.sub_(lr * velocity)


def make_adapter(settings: dict[str, Any], model: GPT | None = None) -> tuple[Adapter, Job]:
    params = make_params(score_first=settings)
    job = make_job(model or make_model(), make_tokens(NUM_TARGETS), params)
    return Adapter(job, params.score_first), job


@pytest.mark.parametrize("settings", [
    {}, {"batch_sequences": 1, "grad_clip": 0.1, "momentum": 0.5}, {"batch_sequences": 3, "weight_decay": 1.0}, {"grad_clip": 1e6},
    {"optimizer": "sgd"}, {"optimizer": "sgd", "grad_clip": None, "lr": 1e-3},
    {"optimizer": "sgd", "batch_sequences": 3, "weight_decay": 1.0, "momentum": 0.5},
    {"optimizer": "sgd", "momentum": 0.0, "grad_clip": 1e6, "lr": 1e-3}])
def test_weights_are_those_of_the_optimizer_written_out(settings: dict[str, Any]) -> None:
    adapter, job = make_adapter(settings)
    by_hand = TrainerByHand(make_model(), job.params.score_first, is_last_block_or_scale)
    for starts, lr, epochs in ((STARTS, 0.01, 2), (STARTS[:1], 0.005, 1)):  # the optimizer's state is kept between the calls
        adapter.train(starts, lr, epochs)
        by_hand.train(job.stream.long(), starts.tolist(), WINDOW, lr, epochs)
    original, hand = make_model().state_dict(), by_hand.model.state_dict()
    for name, weight in job.forward.model.state_dict().items():
        assert weight.numpy() == pytest.approx(hand[name].numpy(), abs=1e-4), name
        assert torch.equal(weight, original[name]) != is_last_block_or_scale(name), name


def test_a_step_of_more_rows_than_a_forward_pass_takes_is_still_one_step() -> None:
    """Rows of 8 tokens; 3 in a step, 2 in a forward pass."""
    weights, sizes = [], []
    for batch_tokens in (16, 32):
        params = make_params(batch_tokens=batch_tokens, score_first={"batch_sequences": 3})
        job = make_job(make_model(), make_tokens(NUM_TARGETS), params)
        job.forward.model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
        Adapter(job, params.score_first).train(STARTS, 0.01, 1)
        assert job.sheet.ledger.events == [Event(0, "trained", -1, 8, 39, 2, 0.01)]
        weights.append(job.forward.model.state_dict())
    assert sizes == [2, 1, 1, 3, 1]
    for name, weight in weights[0].items():
        assert weight.numpy() == pytest.approx(weights[1][name].numpy(), abs=1e-5), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_only_the_named_groups_change_and_nothing_is_left_behind(optimizer: str) -> None:
    adapter, job = make_adapter({"optimizer": optimizer, "trainable": ["residual_mix", "embedding"]})
    model = job.forward.model
    before, seen = copy.deepcopy(model.state_dict()), set()

    def watch(*_: object) -> None:
        seen.add((model.training, torch.is_grad_enabled(),
                  frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)))

    model.register_forward_pre_hook(watch)
    adapter.train(STARTS, 0.01, 1)
    trained = {"token_embedding.weight", *(f"blocks.{n}.residual_mix" for n in range(3))}
    assert seen == {(True, True, frozenset(trained))}  # the others cost no gradients
    assert {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])} == trained
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not model.training


def test_the_record_has_the_targets_the_steps_and_the_learning_rate() -> None:
    adapter, job = make_adapter({"batch_sequences": 3})
    adapter.train(STARTS, 0.25, 3)
    assert job.sheet.ledger.events == [Event(0, "trained", -1, 8, 39, 3 * 2, 0.25)]


@pytest.mark.parametrize(("num_rows", "epochs"), [(0, 2), (4, 0)])
def test_nothing_to_train_on_changes_nothing(num_rows: int, epochs: int) -> None:
    adapter, job = make_adapter({"weight_decay": 1.0})
    adapter.train(STARTS[:num_rows], 0.25, epochs)
    assert job.sheet.ledger.events == []
    original = make_model().state_dict()
    assert all(torch.equal(weight, original[name]) for name, weight in job.forward.model.state_dict().items())


def test_rows_are_trained_on_in_order_with_their_own_targets() -> None:
    adapter, job = make_adapter({"batch_sequences": 1, "lr_schedule": "constant"})
    rows: list[list[int]] = []
    job.forward.model.register_forward_pre_hook(lambda _, inputs: rows.append(torch.cat((inputs[0], inputs[1][:, -1:]), 1)[0].tolist()))
    adapter.train(STARTS, 0.01, 2)
    stream = job.stream.tolist()
    assert rows == [stream[start : start + WINDOW + 1] for start in STARTS.tolist()] * 2


def test_learning_rate_falls_from_its_value_to_nothing_as_a_cosine() -> None:
    root = math.sqrt(0.5)
    cosine, constant = (make_params(score_first={"lr": 2.0, "lr_schedule": schedule}).score_first for schedule in ("cosine", "constant"))
    assert [scheduled_lr(cosine, part, 4) for part in range(5)] == pytest.approx([2, 1 + root, 1, 1 - root, 0])
    assert [scheduled_lr(constant, part, 4) for part in range(5)] == [2.0] * 5


@pytest.mark.parametrize(("group", "message"), [
    ("head", "trainable group head: matches no parameter"), ("last_4_blocks", "trainable group last_4_blocks: matches no parameter")])
def test_a_group_that_matches_nothing_is_an_error(group: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_adapter({"trainable": ["scales", group]})
