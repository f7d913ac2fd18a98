from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lib.artifacts.tokens import Split
from lib.quantization.gptq import quadratic_error
from lib.quantization.hessian import collect_hessians, draw_sequences
from tests.evaluation.tiny import MODEL, make_model

CPU = torch.device("cpu")


def make_sequences(num_sequences: int = 6, num_tokens: int = 8) -> Tensor:
    return torch.randint(0, MODEL["vocab_size"], (num_sequences, num_tokens), generator=torch.Generator().manual_seed(0))


def mean_squared_outputs(linear_names: list[str], sequences: Tensor) -> dict[str, float]:
    """Mean over tokens of |W x|^2, from the outputs themselves."""
    model, totals = make_model(tied_head=False), dict.fromkeys(linear_names, 0.0)

    def adder(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            totals[name] += float(output.detach().double().square().sum()) / sequences.numel()
        return add

    for name in linear_names:
        model.get_submodule(name).register_forward_hook(adder(name))
    model.logits(sequences)
    return totals


def test_hessians_give_the_squared_outputs_of_every_linear_layer() -> None:
    model, sequences = make_model(tied_head=False), make_sequences()
    hessians = collect_hessians(model, sequences, 4, CPU, "test")
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(name for names in model.linear_inputs().values() for name in names) == sorted(f"{name}.weight" for name in linear_names)
    expected = mean_squared_outputs(linear_names, sequences)
    for source, names in model.linear_inputs().items():
        for name in names:
            found = quadratic_error(model.get_parameter(name).detach(), hessians[source])
            assert found == pytest.approx(expected[name.removesuffix(".weight")], rel=1e-5), name


def test_hessians_are_symmetric_fp32_and_positive() -> None:
    for hessian in collect_hessians(make_model(), make_sequences(), 6, CPU, "test").values():
        assert hessian.dtype == torch.float32
        torch.testing.assert_close(hessian, hessian.T, rtol=1e-6, atol=1e-7)
        assert float(torch.linalg.eigvalsh(hessian.double())[0]) > -1e-6 * float(hessian.diagonal().amax())


def test_batches_change_nothing_and_no_hook_stays() -> None:
    model, sequences = make_model(), make_sequences()
    whole = collect_hessians(model, sequences, 6, CPU, "test")
    for name, hessian in collect_hessians(model, sequences, 4, CPU, "test").items():  # the last batch is smaller
        torch.testing.assert_close(hessian, whole[name], rtol=1e-5, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_sets_are_disjoint_spread_over_the_shards_and_repeatable() -> None:
    shards = tuple(np.arange(start, start + 1000, dtype=np.uint16) for start in (0, 1000, 2000))
    split = Split(Path("train"), shards, 1, 6000, 6000, 65536)
    sets = draw_sequences(split, 30, 20, seed=3)
    assert [tuple(tokens.shape) for tokens in sets] == [(30, 20), (30, 20)]
    first, second = (set(tokens.flatten().tolist()) for tokens in sets)
    assert not first & second
    for tokens in (first, second):
        assert {token // 1000 for token in tokens} == {0, 1, 2}
    assert all(torch.equal(*pair) for pair in zip(sets, draw_sequences(split, 30, 20, seed=3), strict=True))
    assert not torch.equal(sets[0], draw_sequences(split, 30, 20, seed=4)[0])
