"""Parameters in one tensor: the model does not notice, gradients arrive, what is alike lies together."""

import pytest
import torch

from lib.model.parts import parts_of
from lib.training.flat import FlatParameters, group_of
from tests.training.tiny import make_model

TOKENS = torch.arange(16).view(2, 8)


def test_the_model_computes_the_same_and_sees_what_is_done_to_the_flat_weights() -> None:
    model, twin = make_model(), make_model()
    parameters = FlatParameters(model)
    assert parameters.weights.numel() == model.num_parameters
    assert torch.equal(model(TOKENS, TOKENS), twin(TOKENS, TOKENS))
    assert all(torch.equal(weight, twin.get_parameter(name)) for name, weight in parameters.by_name(parameters.weights).items())
    assert list(parameters.by_name(parameters.weights)) == [name for name, _ in twin.named_parameters()]
    parameters.weights.mul_(0.5)
    assert all(torch.equal(parameter, 0.5 * twin.get_parameter(name)) for name, parameter in model.named_parameters())


def test_gradients_are_collected_and_accumulate_until_then() -> None:
    model, twin = make_model(), make_model()
    parameters = FlatParameters(model)
    for num_passes in (1, 2):
        for net in (model, twin):
            for _ in range(num_passes):
                net(TOKENS, TOKENS).mean().backward()
        parameters.collect()
        assert all(parameter.grad is None for parameter in model.parameters())
        for name, gradient in parameters.by_name(parameters.gradients).items():
            torch.testing.assert_close(gradient, twin.get_parameter(name).grad, msg=name)
        twin.zero_grad()


def test_a_parameter_without_a_gradient_gets_zero() -> None:
    model = make_model()
    parameters = FlatParameters(model)
    parameters.gradients.fill_(7)
    model.token_embedding.weight.grad = torch.ones_like(model.token_embedding.weight)
    parameters.collect()
    for name, gradient in parameters.by_name(parameters.gradients).items():
        assert torch.equal(gradient, torch.full_like(gradient, float(name == "token_embedding.weight"))), name


@pytest.mark.parametrize("tied_head", [True, False])
def test_groups_and_shapes_lie_side_by_side(tied_head: bool) -> None:
    model = make_model(tied_head=tied_head)
    parameters = FlatParameters(model)
    groups = parameters.slices(lambda part, parameter: group_of(part))
    assert sum(part.stop - part.start for part in groups.values()) == model.num_parameters
    expected: dict[str, int] = dict.fromkeys(groups, 0)
    groups_by_name = {name: group_of(part) for name, part in parts_of(model).items()}
    for name, parameter in model.named_parameters():
        expected[groups_by_name[name]] += parameter.numel()
    assert {group: part.stop - part.start for group, part in groups.items()} == expected
    shapes = parameters.slices(lambda part, parameter: tuple(parameter.shape) if group_of(part) == "matrix" else None)
    for shape, part in shapes.items():
        stack = parameters.weights[part].view(-1, *shape)
        matrices = [parameter for name, parameter in model.named_parameters() if groups_by_name[name] == "matrix"]
        alike = [matrix for matrix in matrices if matrix.shape == shape]
        assert len(stack) == len(alike)
        assert all(any(torch.equal(matrix, parameter) for parameter in alike) for matrix in stack)


def test_parameters_that_are_not_side_by_side_are_refused() -> None:
    with pytest.raises(AssertionError, match="not side by side"):
        FlatParameters(make_model()).slices(lambda part, parameter: part.layer == 1)
