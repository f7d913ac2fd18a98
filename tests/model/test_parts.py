"""What parts say of a model, beside what the model itself does in one pass."""

import re
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lib.model.config import MATRIX_ROLES
from lib.model.gpt import GPT
from lib.model.parts import Part, parts_of
from tests.evaluation.tiny import FRONTIER, make_model

OPTIONS: list[dict[str, Any]] = [
    {}, {"tied_head": False}, {"bigram_rows": 0}, {"value_embedding_dim": 0, "value_embedding_layers": []},
    {"unet_skips": False, "residual_mix": False, "smear_gate": False}, FRONTIER]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_parameter_has_a_part_and_the_roles_are_those_of_the_configuration(options: dict[str, Any]) -> None:
    model = make_model(**options)
    parts = parts_of(model)
    assert list(parts) == [name for name, _ in model.named_parameters()] == [part.name for part in parts.values()]
    assert set(model.params.roles) == {part.role for part in parts.values() if part.is_matrix} <= set(MATRIX_ROLES)
    for name, part in parts.items():
        module = model.get_submodule(part.modules[0])
        assert part.kind == ("table" if isinstance(module, nn.Embedding) else "linear" if isinstance(module, nn.Linear) else "vector")
        assert part.layer == (int(found[1]) if (found := re.match(r"blocks\.(\d+)\.", name)) else None)
        assert (part.source == "") == (part.kind == "vector")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules_are_those_that_use_a_matrix_and_sources_what_they_read(options: dict[str, Any]) -> None:
    model = make_model(**options)
    parts, calls, seen = parts_of(model), Counter[str](), dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            calls[name] += 1
            seen[name] = arguments[0]
        return hook

    matrices = [part for part in parts.values() if part.is_matrix]
    for name in [name for part in matrices for name in part.modules]:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    model.logits(torch.arange(6)[None])
    order = model.params.layer_order()
    assert calls == {name: 1 if part.layer is None else order.count(part.layer) for part in matrices for name in part.modules}
    linears = [part for part in matrices if part.kind == "linear"]
    for part in linears:
        for other in linears:
            same = seen[part.modules[0]] is seen[other.modules[0]] or torch.equal(seen[part.modules[0]], seen[other.modules[0]])
            assert same == (part.source == other.source) or part.modules[0].endswith("mlp.up"), (part, other)


def test_outputs_are_scaled_by_the_vector_that_the_part_names() -> None:
    model = make_model()
    scaled = {name: part.row_scale for name, part in parts_of(model).items() if part.row_scale}
    assert len(scaled) == 2 * model.params.num_layers
    tokens = torch.arange(6)[None]
    for name, vector in scaled.items():
        before = model.logits(tokens)
        factors = 1 + torch.rand(len(model.get_parameter(vector)))
        with torch.no_grad():
            model.get_parameter(vector).mul_(factors)
            changed = model.logits(tokens)
            model.get_parameter(name).div_(factors[:, None])
            torch.testing.assert_close(model.logits(tokens), before)
            assert not torch.allclose(changed, before)
            model.get_parameter(vector).div_(factors)
            model.get_parameter(name).mul_(factors[:, None])


def test_a_part_that_a_model_does_not_declare_is_named() -> None:
    class Larger(GPT):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.gate = nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"gate\.weight: expected a part that the model declares, found none; add it to Larger\.PARTS"):
        parts_of(Larger(make_model().params))


class Shared(nn.Module):
    """Tied embedding, two layers with one matrix, a transposed one, a bias and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.h = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4, bias=False)])
        self.h[1].weight = self.h[0].weight
        self.c_proj = Conv1D(6, 4)
        self.ln = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.wte.weight


class Conv1D(nn.Module):
    def __init__(self, num_outputs: int, num_inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(num_inputs, num_outputs)), nn.Parameter(torch.empty(num_outputs))


def test_parts_of_any_model_follow_from_the_types_of_its_modules() -> None:
    assert parts_of(Shared()) == {part.name: part for part in (
        Part("wte.weight", "table", "wte", "wte", None, ("wte", "lm_head")),
        Part("h.0.weight", "linear", "0", "h.0", 0, ("h.0", "h.1")),
        Part("h.0.bias", "vector", "vector", "", 0, ("h.0",)),
        Part("c_proj.weight", "linear", "c_proj", "c_proj", None, ("c_proj",), transposed=True),
        Part("c_proj.bias", "vector", "vector", "", None, ("c_proj",), transposed=True),
        Part("ln.weight", "vector", "vector", "", None, ("ln",)),
        Part("ln.bias", "vector", "vector", "", None, ("ln",)))}
