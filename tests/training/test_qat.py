"""The switch of quantization-aware training: on the export grid, off without a trace, also in a compiled model."""

from functools import partial

import pytest
import torch

from lib.artifacts.quantized import QuantizedTensor, exponents_of
from lib.model import compilation
from lib.quantization.grid import make_scales, round_to_grid
from lib.training.flat import FlatParameters
from lib.training.qat import FakeQuantization
from tests.training.tiny import make_model, make_params

TOKENS = torch.arange(16).view(2, 8)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_changes_when_it_switches_on_and_not_before(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", backend)
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    compiled = partial(model, compiled=True)
    fake_quantization = FakeQuantization(FlatParameters(model), make_params().qat)
    before = compiled(TOKENS, TOKENS).detach()
    with fake_quantization.applied(False):
        assert torch.equal(compiled(TOKENS, TOKENS), before)
    with fake_quantization.applied(True):
        inside = compiled(TOKENS, TOKENS).detach()
        torch.testing.assert_close(inside, model(TOKENS, TOKENS))
    assert (inside - before).abs().max() > 1e-3
    assert torch.equal(compiled(TOKENS, TOKENS), before)


def test_weights_are_exactly_those_of_the_export_and_come_back_bit_for_bit() -> None:
    model, params = make_model(tied_head=False), make_params().qat
    originals = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with FakeQuantization(FlatParameters(model), params).applied(True):
        for name, bits in (("blocks.0.attention.query.weight", 5), ("blocks.1.mlp.up.weight", 5), ("token_embedding.weight", 8)):
            weight = originals[name]
            scales = make_scales(weight.abs().quantile(params.clip_quantile, dim=1), bits, params.floor)
            codes = round_to_grid(weight, scales[:, None], bits).to(torch.int16)
            expected = QuantizedTensor(codes, exponents_of(scales), torch.zeros(weight.shape[1], dtype=torch.int16), bits).weight()
            assert torch.equal(model.get_parameter(name), expected)
            assert not torch.equal(expected, weight)
        assert torch.equal(model.get_parameter("blocks.0.mlp_scale"), originals["blocks.0.mlp_scale"])
    assert all(torch.equal(parameter, originals[name]) for name, parameter in model.named_parameters())


def test_the_floor_and_the_full_range_are_those_of_the_parameters() -> None:
    """A row with a clip below the floor is trained on the floor's scale, and the code that the export lacks is used."""
    params, model, name = make_params().qat, make_model(), "blocks.0.attention.query.weight"
    weight = model.get_parameter(name)
    with torch.no_grad():
        weight[0, 0] = -0.5 * 16 / 15
    for full_range, lowest in ((False, -15), (True, -16)):
        changed = params.model_copy(update={"clip_quantile": 1e-3, "floor": 0.5, "full_range": full_range})
        with FakeQuantization(FlatParameters(model), changed).applied(True):
            codes = model.get_parameter(name).detach() / make_scales(torch.zeros(1), 5, 0.5)
            torch.testing.assert_close(codes, codes.round())
            assert round(float(codes.min())) == lowest


def test_gradients_are_straight_through() -> None:
    model, params = make_model(), make_params().qat
    with FakeQuantization(FlatParameters(model), params).applied(True):
        model(TOKENS, TOKENS).mean().backward()
        quantized = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    other = make_model()
    other.load_state_dict(quantized)
    other(TOKENS, TOKENS).mean().backward()
    for (name, parameter), twin in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and twin.grad is not None
        assert torch.equal(parameter.grad, twin.grad), name


def test_an_error_inside_restores_the_weights() -> None:
    model = make_model()
    before = model.token_embedding.weight.detach().clone()
    with pytest.raises(RuntimeError, match="inside"), FakeQuantization(FlatParameters(model), make_params().qat).applied(True):
        raise RuntimeError("inside")
    assert torch.equal(model.token_embedding.weight, before)


@pytest.mark.parametrize(("below_lr", "on"), [(0.0, []), (0.4, [0.39, 0.001]), (2.0, [1.0, 0.4, 0.39, 0.001])])
def test_the_threshold(below_lr: float, on: list[float]) -> None:
    fake_quantization = FakeQuantization(FlatParameters(make_model()), make_params(qat={"below_lr": below_lr}).qat)
    assert [multiplier for multiplier in (1.0, 0.4, 0.39, 0.001) if fake_quantization.is_on(multiplier)] == on
