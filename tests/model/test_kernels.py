"""Attention kernels against one softmax per query and SDPA's math backend, the adapters of the flash libraries, and the choice."""

import itertools
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib.data.rows import find_parts
from lib.model import compilation, flash
from lib.model.config import KernelName, ModelParams, ModelSection, parse_model
from lib.model.flash import find_boundaries
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.kernels import LIBRARIES, KernelError, choose_kernel
from lib.model.sdpa import SDPA, Kernel, Sight
from lib.params import ParamsError, Precision, parse_params
from tests.model.fake_flash import FAKES
from tests.model.test_gpt import FULL

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
NAMES: tuple[KernelName, ...] = ("flash2", "flash3", "flash4")
MODEL = parse_model({**FULL, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2}, "")  # head dimension 8
Gradients = tuple[Tensor, Tensor, Tensor]


def attend_by_hand(q: Tensor, k: Tensor, v: Tensor, sight: Sight) -> Tensor:
    """One query after the other: softmax over the tokens that it may see."""
    outputs = torch.empty_like(q)
    for row in range(q.shape[0]):
        for n in range(q.shape[1]):
            own = sight.first + n
            begin = 0 if sight.attention_tokens is None else max(0, own + 1 - sight.attention_tokens)
            if sight.starts is not None:
                begin = max(begin, *(place for place in range(own + 1) if sight.starts[row, place]))
            keys, values = (x[row, begin : own + 1].repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (k, v))  # (seen, H, E)
            shares = (torch.einsum("he,she->hs", q[row, n], keys) / math.sqrt(q.shape[-1])).softmax(-1)
            outputs[row, n] = torch.einsum("hs,she->he", shares, values)
    return outputs


def make_starts(batch: int, num_tokens: int, seed: int, share: float = 0.2) -> Tensor:
    starts = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(seed)) < share
    starts[:, 0] = True
    return starts


def make_parts(batch: int, num_tokens: int, seed: int, longest: int) -> Tensor:
    return find_parts(make_starts(batch, num_tokens, seed, 0.1).long(), 1, longest)


def make_inputs(batch: int, sight: Sight, heads: tuple[int, int], width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    shapes = (batch, sight.last - sight.first, heads[0], width), *[(batch, sight.last, heads[1], width)] * 2
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(attend: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, Gradients]:
    """Outputs, and the gradients of their sum weighted at random."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = attend(*leaves)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64).to(y)
    dq, dk, dv = torch.autograd.grad((weight * y).sum(), leaves)
    return y.detach(), (dq, dk, dv)


@given(st.integers(1, 40), st.sampled_from([(1, 1), (2, 1), (4, 2)]), st.integers(1, 2), st.data())
def test_sdpa_and_its_gradients_are_those_of_one_softmax_per_query(
        num_tokens: int, heads: tuple[int, int], batch: int, data: st.DataObject) -> None:
    starts = make_starts(batch, num_tokens, num_tokens) if data.draw(st.booleans()) else None
    window = data.draw(st.none() | st.integers(1, num_tokens - 1)) if num_tokens > 1 else None
    sight = Sight(data.draw(st.integers(0, num_tokens - 1)), num_tokens, window, starts)
    if window is not None and data.draw(st.booleans()):
        sight = sight._replace(attention_tokens=None, starts=make_parts(batch, num_tokens, num_tokens, window), longest=window)
    inputs = make_inputs(batch, sight, heads, 4, torch.float64)
    found, expected = (run(attend, inputs) for attend in (SDPA.within(sight, CPU), partial(attend_by_hand, sight=sight)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


SIGHTS = {
    "all": Sight(0, 24, None, None), "last positions": Sight(9, 24, None, None), "the last position": Sight(23, 24, None, None),
    "window": Sight(0, 24, 5, None), "window, positions": Sight(9, 24, 5, None), "window of one": Sight(0, 24, 1, None),
    "documents": Sight(0, 24, None, make_starts(2, 24, 0)), "documents, positions": Sight(9, 24, None, make_starts(2, 24, 1)),
    "documents, the last position": Sight(23, 24, None, make_starts(2, 24, 2)), "documents of one token": Sight(
        0, 24, None, torch.ones(2, 24, dtype=torch.bool)), "documents, window": Sight(0, 24, 5, make_starts(2, 24, 3, 0.1)),
    "documents, window, positions": Sight(9, 24, 5, make_starts(2, 24, 4, 0.1)), "parts": Sight(0, 24, None, make_parts(2, 24, 3, 5), 5),
    "parts, positions": Sight(9, 24, None, make_parts(2, 24, 4, 5), 5),
    "parts of one token": Sight(0, 24, None, make_parts(2, 24, 4, 1), 1)}
every_sight = pytest.mark.parametrize("sight", SIGHTS.values(), ids=SIGHTS)
HEADS = {"equal": (4, 4), "grouped": (4, 2), "one key head": (4, 1)}
every_heads = pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)


def by_math(sight: Sight, inputs: list[Tensor]) -> tuple[Tensor, Gradients]:
    with sdpa_kernel(SDPBackend.MATH):
        return run(SDPA.within(sight, inputs[0].device), [x.float() for x in inputs])


@every_sight
@every_heads
@pytest.mark.parametrize("backend", [SDPBackend.FLASH_ATTENTION, None], ids=["flash", "default"])
def test_backends_of_sdpa_agree_with_its_math_backend(sight: Sight, heads: tuple[int, int], backend: SDPBackend | None) -> None:
    inputs = make_inputs(2, sight, heads, 8, torch.float32)
    with sdpa_kernel(backend or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        found = run(SDPA.within(sight, CPU), inputs)
    torch.testing.assert_close(found, by_math(sight, inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ("sdpa", *NAMES))
def test_kernels_of_this_machine_agree_with_the_math_backend(name: KernelName) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    try:
        kernel = choose_kernel(name, MODEL, "bf16", CUDA)
    except KernelError as error:
        pytest.skip(str(error))
    for (label, sight), heads in itertools.product(SIGHTS.items(), HEADS.values()):
        on_device = sight._replace(starts=None if sight.starts is None else sight.starts.to(CUDA))
        inputs = [x.to(CUDA) for x in make_inputs(2, sight, heads, 64, torch.bfloat16)]
        found, expected = run(kernel.within(on_device, CUDA), inputs), by_math(on_device, inputs)
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, check_dtype=False,
                                   msg=partial("{}, {}: {}".format, label, heads))


def install(patch: pytest.MonkeyPatch, *installed: str, capability: tuple[int, int] = (9, 0)) -> None:
    """A machine with a GPU of that capability and stand-ins for some libraries, whatever this one has."""
    for name in NAMES:
        patch.setitem(sys.modules, LIBRARIES[name].module, FAKES[name]() if name in installed else None)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def make_fake(patch: pytest.MonkeyPatch, name: KernelName) -> Kernel:
    install(patch, name)
    kernel = choose_kernel(name, MODEL, "bf16", CUDA)
    assert kernel.name == name
    return kernel


@every_sight
@every_heads
@pytest.mark.parametrize("name", NAMES)
def test_adapters_call_the_published_functions_rightly(
        name: KernelName, sight: Sight, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_inputs(2, sight, heads, 8, torch.bfloat16)
    y, gradients = run(make_fake(monkeypatch, name).within(sight, CPU), inputs)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close((y, gradients), by_math(sight, inputs), rtol=2e-2, atol=2e-2, check_dtype=False)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_take_what_autocast_gives(name: KernelName, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys in fp32, values in bf16; keys and values that end before their tensors do."""
    sight = SIGHTS["documents, positions"]
    q, k, v = make_inputs(2, sight, (4, 2), 8, torch.bfloat16)
    k, v = (torch.cat((x, x), dim=1) for x in (k, v))
    attend = make_fake(monkeypatch, name).within(sight, CPU)
    found = run(lambda q, k, v: attend(q, k[:, :24], v[:, :24]), [q.float(), k.float(), v])
    expected = by_math(sight, [q, k[:, :24], v[:, :24]])
    torch.testing.assert_close(found[0], expected[0], rtol=2e-2, atol=2e-2, check_dtype=False)
    with pytest.raises(RuntimeError, match="fp16 or bf16"):  # as the libraries say it
        attend(q.float(), k[:, :24].float(), v[:, :24].float())


def test_operators_of_flash4_are_registered_as_torch_demands(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash4")
    for sight in (SIGHTS["all"], SIGHTS["window, positions"], SIGHTS["documents, positions"], SIGHTS["parts"]):
        q, k, v = (x.requires_grad_() for x in make_inputs(2, sight, (4, 2), 8, torch.bfloat16))
        limits = [(sight.attention_tokens or 0) - 1, sight.longest or sight.last]
        documents = None if sight.starts is None else find_boundaries(sight.starts, sight.first, limits[1])
        torch.library.opcheck(flash._flash4, (q, k, v, limits, documents))
        with torch.no_grad():
            y, lse = flash._flash4(q, k, v, limits, documents)
            torch.library.opcheck(flash._flash4_backward, (y, [q, k, v, y, lse], limits, documents))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "document_mask", "positions", "window"), [
    ("sdpa", True, slice(None), None), ("sdpa", True, slice(9, 15), 5), ("flash2", False, slice(None), None),
    ("flash3", True, slice(9, 15), 5), ("flash4", False, slice(9, 15), 5), ("flash4", True, slice(None), None)])
def test_a_compiled_model_is_the_eager_one(name: KernelName, document_mask: bool, positions: slice, window: int | None,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients."""
    install(monkeypatch, name)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    params = MODEL.model_copy(update={"document_mask": document_mask, "num_layers": 1, "value_embedding_layers": (0,), "num_xsa_layers": 1})
    model = GPT(params, choose_kernel(name, params, "bf16", CUDA))
    initialize(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    compiled = partial(model, compiled=True)
    tokens, targets = torch.randint(0, 12, (2, 2, 16), generator=torch.Generator().manual_seed(2))
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        for forward in (model, compiled):
            losses = forward(tokens, targets[:, positions], positions, window)
            results.append((losses, torch.autograd.grad(losses.mean(), list(model.parameters()))))
    torch.compiler.reset()
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_documents_are_found_without_knowing_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = torch.tensor([[1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    queries, keys = find_boundaries(starts, 3, 5).tolist()
    assert keys == [0, 2, 5, 6, 7] + [12] * 8  # as many as tokens, and the end
    assert queries == [0, 0, 2, 3, 3] + [6] * 8
    assert find_boundaries(torch.ones(1, 5000, dtype=torch.bool)[:, :1024], 0, 1).shape == (2, 1025)
    assert find_boundaries(make_starts(40, 1000, 0, 0.01), 0, 1000).shape == (2, 40 + 40000 // 32 + 1)
    with pytest.raises(RuntimeError, match="expected at most 4 tokens in a document"):
        find_boundaries(starts, 3, 4)
    monkeypatch.setattr(flash, "MIN_DOCUMENTS", 4)
    with pytest.raises(RuntimeError, match=r"more than 4 documents in 12 tokens; set model.attention to sdpa"):
        find_boundaries(starts, 3, 5)


def test_sdpa_computes_blocks_of_parts_and_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa, shapes = F.scaled_dot_product_attention, list[tuple[int, ...]]()

    def watch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        shapes.append(tuple(options["attn_mask"].shape))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    SDPA.within(SIGHTS["parts"], CPU)(*make_inputs(2, SIGHTS["parts"], (4, 4), 8, torch.float32))
    assert shapes == [(2 * 5, 1, 5, 2 * 5)]  # five blocks of five of the 24 tokens


@pytest.mark.parametrize("name", NAMES[:2])
def test_flash_is_launched_for_parts_and_not_for_rows(name: KernelName, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, calls = make_fake(monkeypatch, name), list[dict[str, Any]]()
    module = sys.modules[LIBRARIES[name].module]
    varlen = module.flash_attn_varlen_func

    def watch(**options: Any) -> Tensor:
        calls.append(options)
        found: Tensor = varlen(**options)
        return found

    monkeypatch.setattr(module, "flash_attn_varlen_func", watch)
    model = GPT(MODEL, kernel)
    initialize(model, 0)
    tokens = torch.tensor([[5, 5, 1, 5, 5, 5, 5, 1, 1, 5, 5, 5], [1, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 1]])  # BOS = 1
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens, tokens, attention_tokens=3, starts=find_parts(tokens, 1, 3))
    assert len(calls) == MODEL.num_layers
    for call in calls:
        lengths = [2, 3, 2, 1, 3, 1, 3, 3, 3, 2, 1]
        ends = list(itertools.accumulate(lengths)) + [24] * (24 - len(lengths))
        assert call["cu_seqlens_q"].tolist() == call["cu_seqlens_k"].tolist() == [0, *ends]
        assert (call["max_seqlen_q"], call["max_seqlen_k"], call["window_size"]) == (3, 3, (-1, -1))


@pytest.mark.parametrize(("installed", "capability", "expected", "reason"), [
    (NAMES, (9, 0), "flash3", "flash3: the best that can be used here"),
    (("flash2", "flash4"), (9, 0), "flash4", "flash3: cannot be imported (import of flash_attn_interface halted; None in sys.modules): "),
    (NAMES, (10, 0), "flash4", "flash3: needs compute capability 9.x, found 10.0"),
    (("flash2",), (10, 3), "flash2", "flash4: cannot be imported (import of flash_attn.cute.interface halted; None in sys.modules): pip"),
    (NAMES, (12, 0), "flash2", "flash4: needs compute capability 9.x or 10.x or 11.x, found 12.0"),
    (NAMES, (8, 9), "flash2", "flash3: needs compute capability 9.x, found 8.9; flash4: needs"),
    ((), (9, 0), "sdpa", "flash2: cannot be imported (import of flash_attn.flash_attn_interface halted; None in sys.modules): pip"),
    (NAMES, (7, 5), "sdpa", "flash2: needs compute capability 8.x or 9.x or 10.x or 11.x or 12.x, found 7.5")])
def test_auto_takes_the_best_and_says_why(installed: tuple[str, ...], capability: tuple[int, int], expected: str, reason: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *installed, capability=capability)
    kernel = choose_kernel("auto", MODEL, "bf16", CUDA)
    assert kernel.name == expected
    assert kernel.reason.startswith(f"{expected}: the best that can be used here") and reason in kernel.reason
    assert "\n" not in kernel.reason


def change(**changes: Any) -> ModelParams:
    return MODEL.model_copy(update=changes)


@pytest.mark.parametrize(("name", "model", "precision", "capability", "found"), [
    ("flash2", MODEL, "bf16", None, "needs a CUDA device, found cpu"),
    ("flash3", MODEL, "fp32", (9, 0), "needs precision bf16, found fp32"),
    ("flash2", MODEL, "bf16", (7, 5), "needs compute capability 8.x or 9.x or 10.x or 11.x or 12.x, found 7.5"),
    ("flash3", MODEL, "bf16", (10, 0), "needs compute capability 9.x, found 10.0"),
    ("flash4", MODEL, "bf16", (8, 0), "needs compute capability 9.x or 10.x or 11.x, found 8.0"),
    ("flash2", change(model_dim=80), "bf16", (9, 0), "needs a multiple of 8 up to 256 for model_dim / num_heads, found 20"),
    ("flash3", change(model_dim=4 * 264), "bf16", (9, 0), "needs a multiple of 8 up to 256 for model_dim / num_heads, found 264"),
    ("flash4", change(model_dim=4 * 192), "bf16", (10, 0), "needs at most 128, or 256, for model_dim / num_heads")])
def test_a_named_kernel_that_cannot_be_used_is_refused(
        name: KernelName, model: ModelParams, precision: Precision, capability: tuple[int, int] | None, found: str) -> None:
    """A capability of None stands for no GPU."""
    device = CPU if capability is None else CUDA
    with pytest.MonkeyPatch.context() as patch:
        install(patch, *NAMES, capability=capability or (9, 0))
        with pytest.raises(KernelError) as error:
            choose_kernel(name, model, precision, device)
        assert str(error.value).startswith(f"model.attention: expected a kernel that can be used here, found {name}, which {found}")
        assert str(error.value).endswith("; change that, or set model.attention to auto or sdpa")
        if capability is None or precision == "fp32":
            assert choose_kernel("auto", model, precision, device).name == "sdpa"


@pytest.mark.parametrize(("name", "head_dim", "capability"), [
    ("flash2", 256, (8, 0)), ("flash3", 192, (9, 0)), ("flash4", 192, (9, 0)), ("flash4", 128, (10, 0)), ("flash4", 256, (10, 0))])
def test_head_dimensions_up_to_the_limits_are_taken(
        name: KernelName, head_dim: int, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name, capability=capability)
    kernel = choose_kernel(name, change(model_dim=4 * head_dim), "bf16", CUDA)
    assert (kernel.name, kernel.reason) == (name, f"{name}: named by model.attention")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_not_installed_or_broken_is_refused_with_the_way_to_install_it(name: KernelName, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(KernelError, match=r"cannot be imported \(import of .*\): (pip install|build hopper/ of github)"):
        choose_kernel(name, MODEL, "bf16", CUDA)

    class Broken(dict[str, Any]):
        def find_spec(self, *_: Any) -> None:
            raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.delitem(sys.modules, LIBRARIES[name].module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    with pytest.raises(KernelError, match="cannot be imported"):
        choose_kernel(name, MODEL, "bf16", CUDA)


@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_a_library_older_than_its_custom_operators_is_refused(name: KernelName, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    monkeypatch.setattr(sys.modules[LIBRARIES[name].module], "_flash_attn_forward", lambda q: q)
    with pytest.raises(KernelError, match=r"is too old for torch.compile, its forward pass is no custom operator: (pip|build)"):
        choose_kernel(name, MODEL, "bf16", CUDA)


@pytest.mark.parametrize(("precision", "device"), [("fp32", CPU), ("bf16", CUDA)])
def test_sdpa_can_always_be_named(precision: Precision, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, *NAMES)
    assert choose_kernel("sdpa", MODEL, precision, device) == Kernel("sdpa", "sdpa: named by model.attention", SDPA.within)


def test_auto_on_a_cpu_is_one_sentence() -> None:
    reason = choose_kernel("auto", MODEL, "fp32", CPU).reason
    assert reason == "sdpa: the best that can be used here; flash3, flash4, flash2: needs a CUDA device, found cpu"


def test_the_section_holds_the_kernel_and_the_architecture_does_not() -> None:
    section = parse_params({**FULL, "attention": "flash3"}, ModelSection, "model.")
    assert (section.attention, section.architecture) == ("flash3", parse_model(FULL, ""))
    assert type(section.architecture) is ModelParams and "attention" not in section.architecture.model_dump()
    with pytest.raises(ParamsError, match=r"model\.attention: .*sdpa.*found \"flash\""):
        parse_params({**FULL, "attention": "flash"}, ModelSection, "model.")
    with pytest.raises(ParamsError, match="attention: unknown key"):
        parse_model({**FULL, "attention": "sdpa"}, "")
