"""Muon against one plain matrix at a time, and the grouping of parameters."""

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lib.distributed import SINGLE_CPU, Process
from lib.model.gpt import GPT
from lib.training.config import OptimizerParams
from lib.training.flat import FlatParameters
from lib.training.optim import Muon, Optimizers
from lib.training.orthogonal import NEWTON_SCHULZ, ORTHOGONALIZATIONS, POLAR_EXPRESS
from tests.processes import run_processes
from tests.training.tiny import make_model, make_params

GOLDEN = Path(__file__).parents[1] / "golden" / "pr1855_muon.safetensors"
COEFFICIENTS = {"newton_schulz": [NEWTON_SCHULZ] * 5, "polar_express": POLAR_EXPRESS}


def plain(gradient: Tensor, name: str = "newton_schulz") -> Tensor:
    """One matrix in float64, by the singular values: each iteration is a*s + b*s^3 + c*s^5."""
    u, s, v = torch.linalg.svd(gradient.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for a, b, c in COEFFICIENTS[name]:
        s = a * s + b * s**3 + c * s**5
    return u @ s.diag() @ v


def test_names_are_the_registry() -> None:
    assert set(get_args(OptimizerParams.model_fields["orthogonalization"].annotation)) == ORTHOGONALIZATIONS.keys() == COEFFICIENTS.keys()


@pytest.mark.parametrize("name", ORTHOGONALIZATIONS)
@pytest.mark.parametrize("shape", [(8, 8), (12, 5), (5, 12)])
def test_orthogonalization_acts_on_singular_values(shape: tuple[int, int], name: str) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for result, matrix in zip(ORTHOGONALIZATIONS[name](matrices, 5), matrices, strict=True):
        torch.testing.assert_close(result.double(), plain(matrix, name), atol=1e-4, rtol=1e-4)
        assert torch.linalg.svdvals(result).min() > 0.3


@pytest.mark.parametrize("name", ORTHOGONALIZATIONS)
def test_a_zero_gradient_stays_finite(name: str) -> None:
    assert torch.equal(ORTHOGONALIZATIONS[name](torch.zeros(1, 4, 4), 5), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("stack", ["weight", "wide"])
def test_rows_before_and_polar_express_are_those_of_pr1855(stack: str) -> None:
    """Four steps that the published class computed in fp64: momentum .95, learning rate .026, decay .095."""
    golden = load_file(GOLDEN)
    params = make_params(optimizer={"orthogonalization": "polar_express", "normalize_rows": "before",
                                    "weight_decay": {"matrix": 0.095, "embedding": 0.0, "vector": 0.0, "head": 0.0}}).optimizer
    weights = golden[f"{stack}/0"].clone()
    gradients = torch.empty_like(weights)
    muon = Muon(weights, gradients, params, SINGLE_CPU)
    for step in range(1, 5):
        gradients.copy_(golden[f"{stack}/gradient{step}"])
        muon.step(0.026, 0.95)
        torch.testing.assert_close(weights, golden[f"{stack}/{step}"], rtol=0, atol=1e-8)


SHAPES = [(6, 4), (4, 6), (5, 5)]
NO_DECAY = dict.fromkeys(("matrix", "embedding", "vector", "head"), 0.0)
DECAY = NO_DECAY | {"matrix": 0.1}
VARIANTS: list[dict[str, Any]] = [{}, {"normalize_rows": "before", "orthogonalization": "polar_express"}, {"normalize_rows": "after"},
                                  {"cautious_decay": True}]


def check_muon(process: Process, shape: tuple[int, int], num_matrices: int, changes: dict[str, Any]) -> None:
    """Some steps of every matrix against the published update in float64; state handed over in between, as a resumed run does."""
    params = make_params(optimizer={"weight_decay": DECAY, "row_beta": 0.8} | changes).optimizer
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(num_matrices, *shape, generator=generator)
    expected, buffers = weights.double(), torch.zeros(num_matrices, *shape, dtype=torch.float64)
    squares = torch.zeros(num_matrices, shape[0], dtype=torch.float64)
    gradients = torch.empty_like(weights)
    muon = Muon(weights, gradients, params, process)
    for step in range(4):
        gradients.copy_(torch.randn(gradients.shape, generator=generator))
        buffers = 0.9 * buffers + gradients.double()
        for n, matrix in enumerate(gradients.double() + 0.9 * buffers):  # Nesterov
            rows = matrix / matrix.square().sum(1).sqrt()[:, None] if params.normalize_rows == "before" else matrix
            update = plain(rows, params.orthogonalization)
            if params.normalize_rows == "after":  # NorMuon, with the size of the update that it would have had
                squares[n] = 0.8 * squares[n] + 0.2 * update.square().mean(1)
                scaled = update / squares[n].sqrt()[:, None]
                update = scaled * update.square().sum().sqrt() / scaled.square().sum().sqrt()
            decayed = torch.where(update * expected[n] > 0, 1.0, 0.0) if params.cautious_decay else 1.0
            expected[n] = (1 - 0.02 * 0.1 * decayed) * expected[n] - 0.02 * max(1, shape[0] / shape[1]) ** 0.5 * update
        muon.step(0.02, 0.9)
        if step == 1:
            state = {name: value.clone() for name, value in muon.state().items()}
            muon = Muon(weights, gradients, params, process)
            muon.load_state(state)
    torch.testing.assert_close(weights.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize("num_matrices", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_the_published_update_of_single_matrices(shape: tuple[int, int], num_matrices: int, changes: dict[str, Any]) -> None:
    check_muon(SINGLE_CPU, shape, num_matrices, changes)


def _check_muon_of_all_shapes(process: Process) -> None:
    for num_matrices, shape, changes in zip((1, 2, 5), SHAPES, VARIANTS[:3], strict=True):
        check_muon(process, shape, num_matrices, changes)


@pytest.mark.slow
def test_processes_share_out_the_matrices_also_when_there_are_more_processes_than_matrices() -> None:
    run_processes(_check_muon_of_all_shapes, 3)


def gradients_of_one(model: GPT) -> FlatParameters:
    parameters = FlatParameters(model)
    parameters.gradients.fill_(1)
    return parameters


@pytest.mark.parametrize("group", ["matrix_lr", "embedding_lr", "vector_lr", "head_lr"])
def test_each_learning_rate_moves_its_group_and_nothing_else(group: str) -> None:
    model = make_model(tied_head=False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    rates = dict.fromkeys(("matrix_lr", "embedding_lr", "vector_lr", "head_lr"), 1e-30) | {group: 0.1}
    optimizers = Optimizers(gradients_of_one(model), make_params(optimizer={**rates, "weight_decay": NO_DECAY}).optimizer, SINGLE_CPU)
    optimizers.step(1.0, 0.9)
    for name, parameter in model.named_parameters():
        if name in ("token_embedding.weight", "bigram.table.weight", "value_embedding.table.weight"):
            expected = "embedding_lr"
        elif name == "head.weight":
            expected = "head_lr"
        else:
            expected = "matrix_lr" if name.endswith(".weight") else "vector_lr"
        assert torch.allclose(parameter, before[name], rtol=0, atol=1e-20) == (expected != group), name


def test_everything_else_is_updated_as_by_adamw() -> None:
    model = make_model(tied_head=False)
    params = make_params(optimizer={"vector_lr": 0.1, "weight_decay": DECAY | {"vector": 0.3}}).optimizer
    twin = torch.nn.Parameter(model.get_parameter("blocks.1.residual_mix").detach().clone())
    reference = torch.optim.AdamW([twin], lr=0.1, betas=params.adam_betas, eps=params.adam_eps, weight_decay=0.3)
    parameters = FlatParameters(model)
    optimizers = Optimizers(parameters, params, SINGLE_CPU)
    for multiplier in (1.0, 0.5, 0.25):
        parameters.gradients.copy_(torch.randn(parameters.gradients.shape, generator=torch.Generator().manual_seed(1)))
        twin.grad = parameters.by_name(parameters.gradients)["blocks.1.residual_mix"]
        optimizers.step(multiplier, 0.9)
        reference.param_groups[0]["lr"] = 0.1 * multiplier
        reference.step()
    torch.testing.assert_close(model.get_parameter("blocks.1.residual_mix"), twin)


def test_the_multiplier_scales_every_learning_rate() -> None:
    model = make_model()
    parameters = gradients_of_one(model)
    optimizers = Optimizers(parameters, make_params(optimizer={"weight_decay": NO_DECAY}).optimizer, SINGLE_CPU)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizers.step(0.0, 0.9)
    assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))
    optimizers.step(0.5, 0.9)
    assert not any(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), before, strict=True))


def test_a_state_is_that_of_the_moment_it_was_taken() -> None:
    model = make_model()
    parameters = gradients_of_one(model)
    params = make_params().optimizer
    first = Optimizers(parameters, params, SINGLE_CPU)
    first.step(1.0, 0.9)
    weights, state = parameters.weights.clone(), copy.deepcopy(first.state_dict())
    ends = []
    for optimizers in (first, Optimizers(parameters, params, SINGLE_CPU)):
        parameters.weights.copy_(weights)
        optimizers.load_state_dict(copy.deepcopy(state))
        parameters.gradients.fill_(0.5)
        optimizers.step(0.7, 0.95)
        ends.append(parameters.weights.clone())
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], weights)
