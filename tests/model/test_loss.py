"""The fused loss against its closed form in float64, finite differences and torch's own cross-entropy."""

import math
import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lib.model.loss
from lib.model.loss import softcapped_cross_entropy

HAS_COMPILER = shutil.which("g++") is not None


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small inputs take several chunks, the last one shorter."""
    monkeypatch.setattr(lib.model.loss, "CPU_CHUNK", 100)


def make_inputs(num_tokens: int, vocab_size: int, dtype: torch.dtype = torch.float32, std: float = 5.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(num_tokens, vocab_size, generator=generator, dtype=torch.float64) * std
    return z.to(dtype).requires_grad_(), torch.randint(vocab_size, (num_tokens,), generator=generator)


def closed_form(z: Tensor, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses (N,) and their gradients (N, V) in float64, without autograd."""
    tanh = (z.detach().double() / cap).tanh()
    weights = (cap * tanh - cap).exp()
    probabilities = weights / weights.sum(1, keepdim=True)
    one_hot = F.one_hot(targets, z.shape[1]).bool()
    return -probabilities[one_hot].log(), (probabilities - one_hot.double()) * (1 - tanh**2)


@pytest.mark.filterwarnings("error::UserWarning")  # of buffers that are resized
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6)], ids=str)
@pytest.mark.parametrize("cap", [30.0, 3.0])
@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 2), (20, 7), (11, 33), (3, 129), (100, 1)])
def test_losses_and_weighted_gradients_are_those_of_the_closed_form(
        num_tokens: int, vocab_size: int, *, cap: float, dtype: torch.dtype, tolerance: float) -> None:
    z, targets = make_inputs(num_tokens, vocab_size, dtype)
    expected, gradients = closed_form(z, targets, cap)
    losses = softcapped_cross_entropy(z, targets, cap)
    assert losses.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(losses.double(), expected, atol=cap * tolerance, rtol=tolerance)
    weights = torch.linspace(-2, 3, num_tokens, dtype=losses.dtype)
    losses.backward(weights)
    assert z.grad is not None
    assert z.grad.dtype == dtype
    atol, rtol = (1e-6, 2 * 2**-8) if dtype == torch.bfloat16 else (10 * tolerance, 0)  # the result and what is kept for it are rounded
    torch.testing.assert_close(z.grad.double(), gradients * weights[:, None].double(), atol=atol, rtol=rtol)


def test_gradients_are_those_of_finite_differences() -> None:
    z, targets = make_inputs(9, 13, torch.float64, std=2.0)
    assert torch.autograd.gradcheck(lambda z: softcapped_cross_entropy(z, targets, 3.0), (z,))


@pytest.mark.parametrize("chunk", [1, 2**18])
def test_full_size_agrees_with_torch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib.model.loss, "CPU_CHUNK", chunk)
    z, targets = make_inputs(300, 1024)
    losses = softcapped_cross_entropy(z, targets, 30.0)
    found, = torch.autograd.grad(losses.mean(), z)
    expected = F.cross_entropy(30.0 * torch.tanh(z / 30.0), targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=5e-6, rtol=1e-6)
    torch.testing.assert_close(found, torch.autograd.grad(expected.mean(), z)[0], atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [1e-3, 30.0, 1000.0])
@pytest.mark.parametrize("size", [1e4, 1e30, float("inf")])
def test_extreme_logits(size: float, cap: float, dtype: torch.dtype) -> None:
    """All logits are at either end: the losses are known, and nothing has a gradient, not even NaN."""
    z = (size * torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]])).to(dtype).requires_grad_()
    losses = softcapped_cross_entropy(z, torch.tensor([1, 1, 2]), cap)
    small = math.exp(-2 * cap)  # beside exp(0)
    expected = torch.tensor([2 * cap + math.log(1 + 2 * small), math.log(2 + small), math.log(3)], dtype=torch.float64)
    torch.testing.assert_close(losses.double(), expected, atol=1e-6, rtol=1e-6)
    losses.sum().backward()
    assert z.grad is not None
    assert not z.grad.any()


def test_a_nan_is_not_hidden() -> None:
    z, targets = make_inputs(30, 10)
    with torch.no_grad():
        z[17, 3] = torch.nan
    losses = softcapped_cross_entropy(z, targets, 30.0)
    assert losses.isnan().nonzero().tolist() == [[17]]


@pytest.mark.parametrize("layout", [lambda z: z.mT.contiguous().mT, lambda z: z.repeat(1, 2)[:, :10], lambda z: z.repeat(2, 1)[::2]],
                         ids=["transposed", "columns", "rows"])
def test_the_layout_of_the_inputs_does_not_matter(layout: Callable[[Tensor], Tensor]) -> None:
    z, _ = make_inputs(30, 10)
    targets = torch.arange(60)[::2] % 10
    laid_out = layout(z)
    losses = softcapped_cross_entropy(laid_out, targets, 30.0)
    expected, gradients = closed_form(laid_out, targets, 30.0)
    torch.testing.assert_close(losses.double(), expected, atol=1e-5, rtol=0)
    found, = torch.autograd.grad(losses.sum(), laid_out)  # of the expanded scalar
    torch.testing.assert_close(found.double(), gradients, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_tokens(dtype: torch.dtype) -> None:
    z, targets = make_inputs(0, 10, dtype)
    losses = softcapped_cross_entropy(z, targets, 30.0)
    assert (losses.shape, losses.dtype) == ((0,), torch.float32)
    losses.sum().backward()
    assert z.grad is not None
    assert z.grad.shape == (0, 10)


@pytest.mark.parametrize("target", [-1, 10, -100])
def test_a_target_out_of_range_is_an_error(target: int) -> None:
    z, targets = make_inputs(30, 10)
    targets[21] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        softcapped_cross_entropy(z, targets, 30.0)


def saved_tensors(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return call(), saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_tensor_like_z_is_kept_and_not_written_to(dtype: torch.dtype) -> None:
    z, targets = make_inputs(30, 10, dtype)
    before = z.detach().clone()
    losses, saved = saved_tensors(lambda: softcapped_cross_entropy(z, targets, 30.0))
    assert [(tensor.shape, tensor.dtype) for tensor in saved] == [(z.shape, dtype)]
    first, = torch.autograd.grad(losses.sum(), z, retain_graph=True)
    assert torch.equal(torch.autograd.grad(losses.sum(), z)[0], first), "a second backward pass gives the same"
    assert torch.equal(z, before)


def test_nothing_is_computed_for_or_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    z, targets = make_inputs(30, 10)
    expected = softcapped_cross_entropy(z, targets, 30.0).detach()
    monkeypatch.setattr(lib.model.loss, "_SoftcappedCrossEntropy", None)
    with torch.no_grad():
        without = saved_tensors(lambda: softcapped_cross_entropy(z, targets, 30.0))
    with torch.inference_mode():
        inference = saved_tensors(lambda: softcapped_cross_entropy(z, targets, 30.0))
    for losses, saved in (without, inference, saved_tensors(lambda: softcapped_cross_entropy(z.detach(), targets, 30.0))):
        assert not saved
        assert not losses.requires_grad
        assert torch.equal(losses, expected)


def test_only_the_first_derivative_exists() -> None:
    z, targets = make_inputs(4, 10)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(softcapped_cross_entropy(z, targets, 30.0).sum(), z, create_graph=True)


def test_autocast_changes_nothing() -> None:
    z, targets = make_inputs(30, 10, torch.bfloat16)
    expected = softcapped_cross_entropy(z, targets, 30.0)
    with torch.autocast("cpu", torch.bfloat16):
        losses = softcapped_cross_entropy(z, targets, 30.0)
    assert torch.equal(losses, expected)
    assert torch.equal(*(torch.autograd.grad(each.sum(), z)[0] for each in (losses, expected)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager",
                                     pytest.param("inductor", marks=pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler"))])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_head_and_loss(backend: str, precision: str) -> None:
    """With the matrix product before it, as in the model: same losses and gradients, and inductor keeps no fp32 logits."""
    torch.compiler.reset()
    (x, _), (weight, _) = make_inputs(31, 8, std=1.0), make_inputs(65, 8, std=1.0)
    targets = torch.arange(31) * 2

    def compute(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return softcapped_cross_entropy(F.linear(x, weight), targets, 3.0)

    expected = compute(x, weight, targets)
    losses, saved = saved_tensors(lambda: torch.compile(compute, fullgraph=True, backend=backend)(x, weight, targets))
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=0)
    weights = torch.linspace(-2, 3, 31)
    found_gradients, gradients = (torch.autograd.grad(each, (x, weight), weights) for each in (losses, expected))
    for found, gradient in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(found, gradient, atol=1e-5 if precision == "fp32" else 0.1, rtol=0)
    if backend == "inductor":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        assert [tensor.dtype for tensor in saved if tensor.shape == (31, 65)] == [dtype]
        assert all(tensor.numel() <= 31 * 65 for tensor in saved)
