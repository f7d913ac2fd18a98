"""Corrections against the singular value decomposition, and the greedy choice against all choices."""

import itertools

import pytest
import torch
from torch import Tensor

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range
from lib.quantization.config import LowRankParams
from lib.quantization.gptq import row_errors
from lib.quantization.grid import CLIPPED_RESOLUTION
from lib.quantization.low_rank import DAMPING, MAX_RANK, Error, correct
from tests.artifacts.quantized_models import TRAINING
from tests.quantization.power_law import make_hessian, make_weight


def make_error(num_rows: int, num_columns: int, seed: int = 0, *, plain: bool = False) -> Error:
    """With a few strong directions; `plain` in the identity's metric."""
    error = make_weight(num_rows, num_columns, seed)
    for n in range(3):
        error += 0.1 / (n + 1) * torch.outer(make_weight(1, num_rows, seed + n + 1)[0], make_weight(1, num_columns, seed + n + 9)[0]) / 0.05
    if plain:
        return Error(error, torch.eye(num_columns), torch.ones(num_rows))
    gradients = torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)).exp() * 1e-3
    return Error(error, make_hessian(num_columns, seed), gradients)


def correction(found: dict[str, tuple[QuantizedTensor, QuantizedTensor]], name: str) -> Tensor:
    left, right = found[name]
    return left.weight() @ right.weight()


def predicted_loss(error: Error, correction: Tensor) -> float:
    return float((error.gradients * row_errors(error.error - correction, error.hessian)).sum()) / 2


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_without_a_metric_it_is_the_truncated_svd(shape: tuple[int, int]) -> None:
    error = make_error(*shape, plain=True)
    found = correct({"a": error}, LowRankParams(max_bytes=3 * sum(shape), bits=8))
    left, singular, right = torch.linalg.svd(error.error, full_matrices=False)
    assert found.keys() == {"a"} and found["a"][0].codes.shape == (shape[0], 3)
    expected = (left[:, :3] * singular[:3]) @ right[:3]
    assert float((correction(found, "a") - expected).norm() / expected.norm()) < 0.02
    lost = float((error.error - correction(found, "a")).square().sum())
    assert lost == pytest.approx(float(singular[3:].square().sum()), rel=0.01)


def test_in_a_metric_it_beats_the_truncated_svd() -> None:
    """And is the best of its rank: what is left of the loss are the other singular values of sqrt(G) E L."""
    error = make_error(40, 30)
    found = correct({"a": error}, LowRankParams(max_bytes=4 * 70, bits=8))
    left, singular, right = torch.linalg.svd(error.error, full_matrices=False)
    plain = (left[:, :4] * singular[:4]) @ right[:4]
    lower = torch.linalg.cholesky(error.hessian.double() + 1e-12 * torch.eye(30))
    best = float(torch.linalg.svdvals(error.gradients.double().sqrt()[:, None] * (error.error.double() @ lower))[4:].square().sum()) / 2
    nothing = torch.zeros_like(error.error)
    assert best < predicted_loss(error, correction(found, "a")) < 1.05 * best
    assert predicted_loss(error, correction(found, "a")) < 0.9 * predicted_loss(error, plain) < predicted_loss(error, nothing)


def test_factors_have_their_bits_and_stored_scales() -> None:
    found = correct({"a": make_error(16, 24)}, LowRankParams(max_bytes=100, bits=4))
    left, right = found["a"]
    assert left.codes.shape == (16, 5) and right.codes.shape == (5, 24)  # (16 + 24) / 2 bytes for each direction
    for factor in (left, right):
        assert factor.bits == 4 and int(factor.codes.abs().max()) == clip_range(4)
        assert not (factor.row_exponents % CLIPPED_RESOLUTION).any() and not (factor.column_exponents % CLIPPED_RESOLUTION).any()
    assert not left.row_exponents.any() and not right.column_exponents.any()  # one scale for each direction


def test_the_bytes_are_spent_where_they_lower_the_loss_most() -> None:
    """Three matrices of different size and loss: as good as the best choice of ranks that takes no more bytes than the greedy one."""
    errors = {"a": make_error(12, 8, 0), "b": make_error(6, 20, 1), "c": make_error(16, 70, 2)}
    values = {}
    for name, error in errors.items():
        lower = torch.linalg.cholesky(error.hessian.double() + DAMPING * error.hessian.diagonal().mean() * torch.eye(len(error.hessian)))
        roots = error.gradients.double().sqrt()[:, None]
        values[name] = torch.linalg.svdvals(roots * (error.error.double() @ lower)).square() / 2
    sizes = {name: sum(error.error.shape) for name, error in errors.items()}
    for max_bytes in (0, 19, 20, 100, 180, 300, 500):
        found = correct(errors, LowRankParams(max_bytes=max_bytes, bits=8))
        ranks = {name: found[name][0].codes.shape[1] if name in found else 0 for name in errors}
        used = sum(ranks[name] * sizes[name] for name in errors)
        assert used <= max_bytes and max_bytes - used < max(sizes.values())
        gained = sum(float(values[name][:ranks[name]].sum()) for name in errors)
        # The greedy order takes directions by worth per byte; what it skipped at the end did not fit.
        last = min((float(values[name][rank - 1]) / sizes[name] for name, rank in ranks.items() if rank), default=torch.inf)
        best = max(sum(float(values[name][:rank].sum()) for name, rank in zip(errors, each, strict=True))
                   for each in itertools.product(range(9), range(7), range(17))
                   if sum(rank * sizes[name] for name, rank in zip(errors, each, strict=True)) <= used)
        skipped = [name for name, rank in ranks.items() if rank < len(values[name]) and float(values[name][rank]) / sizes[name] > last]
        assert all(sizes[name] > max_bytes - used for name in skipped)
        if not skipped:
            assert gained == pytest.approx(best)
        assert gained >= 0.9 * best
    assert not correct(errors, LowRankParams(max_bytes=19, bits=8))


def test_it_is_part_of_the_weights_and_lowers_the_loss_of_the_model() -> None:
    error = make_error(16, 24)
    codes, rows, columns = (torch.zeros(shape, dtype=torch.int16) for shape in ((16, 24), 16, 24))
    found = correct({"a": error}, LowRankParams(max_bytes=200, bits=8))
    weights = QuantizedModel({}, TRAINING, {"a": QuantizedTensor(codes, rows, columns, 5, correction=found["a"])}, {}).weights()
    assert weights.keys() == {"a"} and torch.equal(weights["a"], correction(found, "a"))
    assert predicted_loss(error, weights["a"]) < 0.5 * predicted_loss(error, torch.zeros(16, 24))


def test_more_directions_than_there_are_and_no_error_at_all() -> None:
    errors = {"a": make_error(40, 50), "b": Error(torch.zeros(4, 5), torch.eye(5), torch.ones(4))}
    found = correct(errors, LowRankParams(max_bytes=10**6, bits=8))
    assert found.keys() == {"a"} and found["a"][0].codes.shape == (40, MAX_RANK)


def test_hessians_that_are_singular() -> None:
    """Of an input that was always 0, and of fewer samples than columns with a large mean, summed in fp32."""
    x = (torch.randn(60, 300, generator=torch.Generator().manual_seed(0)) + 1).relu() ** 2
    errors = {"a": Error(make_weight(4, 5), torch.zeros(5, 5), torch.ones(4)), "b": Error(make_weight(8, 300), x.T @ x / 60, torch.ones(8))}
    found = correct(errors, LowRankParams(max_bytes=650, bits=8))
    assert found["b"][0].codes.shape == (8, 2)
    assert predicted_loss(errors["b"], correction(found, "b")) < 0.9 * predicted_loss(errors["b"], torch.zeros(8, 300))


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = correct({"a": make_error(16, 24)}, LowRankParams(max_bytes=200, bits=8))
    assert torch.equal(torch.rand(3), expected)
    two = correct({"a": make_error(16, 24)}, LowRankParams(max_bytes=200, bits=8))
    assert all(torch.equal(factor.codes, other.codes) for factor, other in zip(one["a"], two["a"], strict=True))
