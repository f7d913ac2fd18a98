"""Muon against one plain matrix at a time, and the grouping of parameters."""

import pytest
import torch

from lib.training.config import OptimizerParams
from lib.training.optim import Muon, Optimizers, orthogonalize
from tests.training.tiny import make_model, make_params


def plain_newton_schulz(gradient: torch.Tensor, num_steps: int) -> torch.Tensor:
    """One matrix in float64, by the singular values: each iteration is a*s + b*s^3 + c*s^5 (K. Jordan's Muon)."""
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(num_steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonalize_acts_on_singular_values(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for result, matrix in zip(orthogonalize(matrices, 5), matrices, strict=True):
        torch.testing.assert_close(result.double(), plain_newton_schulz(matrix, 5), atol=1e-4, rtol=1e-4)
        assert torch.linalg.svdvals(result).min() > 0.3


def test_a_zero_gradient_stays_finite() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 4), 5), torch.zeros(1, 4, 4))


def test_muon_equals_the_published_update_of_single_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4, 6), (6, 4)]
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    expected = [parameter.detach().double() for parameter in parameters]
    buffers = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    muon = Muon(parameters, lr=0.02, momentum=0.9, weight_decay=0.1, num_steps=5)
    for _ in range(4):
        for n, parameter in enumerate(parameters):
            gradient = torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.clone()
            buffers[n] = 0.9 * buffers[n] + gradient.double()
            update = plain_newton_schulz(gradient.double() + 0.9 * buffers[n], 5)  # Nesterov
            expected[n] = (1 - 0.02 * 0.1) * expected[n] - 0.02 * max(1, parameter.shape[0] / parameter.shape[1]) ** 0.5 * update
        muon.step()
    for parameter, value in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.detach().double(), value, atol=1e-4, rtol=1e-4)


def test_every_parameter_is_in_one_group_with_its_learning_rate() -> None:
    model = make_model(tied_head=False)
    params: OptimizerParams = make_params(optimizer={"matrix_lr": 1.0, "embedding_lr": 2.0, "vector_lr": 3.0, "head_lr": 4.0}).optimizer
    optimizers = Optimizers(model, params)
    rates = {id(parameter): group["lr"] for groups in (optimizers.muon, optimizers.adam) for group in groups.param_groups
             for parameter in group["params"]}
    found = {name: rates.pop(id(parameter)) for name, parameter in model.named_parameters()}
    assert not rates
    for name, rate in found.items():
        if name in ("token_embedding.weight", "bigram.table.weight", "value_embedding.table.weight"):
            assert rate == 2.0, name
        elif name == "head.weight":
            assert rate == 4.0, name
        elif name.endswith(".weight"):
            assert rate == 1.0, name
        else:
            assert rate == 3.0, name


def test_the_multiplier_scales_every_learning_rate() -> None:
    model = make_model()
    optimizers = Optimizers(model, make_params(optimizer={"weight_decay": 0.0}).optimizer)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step(0.0, 0.9)
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))
    optimizers.step(0.5, 0.9)
    assert not any(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))
