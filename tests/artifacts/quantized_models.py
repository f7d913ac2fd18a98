"""Quantized models for tests, and what it means that two are the same."""

from dataclasses import replace

import torch

from lib.artifacts.checkpoint import Training
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range

TRAINING = Training(sequence_tokens=8)


def make_quantized_tensor(num_rows: int, num_columns: int, bits: int | None, seed: int = 0) -> QuantizedTensor:
    """Normal codes; without bits, rows and columns of different size and steps of eighths of an octave, as free grids have them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(num_rows, num_columns, generator=generator)
    if bits is None:
        codes *= 20 * torch.randn(num_rows, 1, generator=generator).exp() * torch.randn(num_columns, generator=generator).exp()
        rows, columns = (torch.randint(-9, 9, (size,), generator=generator) * 128 for size in codes.shape)
    else:
        codes *= clip_range(bits) / 3
        rows, columns = torch.randint(-200, 0, (num_rows,), generator=generator) * 16, torch.zeros(num_columns)
    limit = clip_range(bits)
    return QuantizedTensor(codes.round().clamp(-limit, limit).short(), (rows - 1000).short(), columns.short(), bits)


def make_quantized_model() -> QuantizedModel:
    """A grid with bits and row scales of its own, free steps with a correction of rank 2, vectors of both types."""
    return QuantizedModel(
        {"num_layers": 2}, TRAINING,
        {"b.weight": replace(make_quantized_tensor(3, 7, 5), row_scales=torch.tensor([0.3, 0.5, 1.7]).half()),
         "a.weight": replace(make_quantized_tensor(9, 6, None),
                             correction=(make_quantized_tensor(9, 2, 8, 1), make_quantized_tensor(2, 6, 8, 2)))},
        {"scale": torch.tensor(0.5).half(), "mix": torch.ones(2, 3).half(), "gain": torch.tensor([0.1, 1e-30])})


def assert_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    """Equal bit for bit, NaN and signed zeros included."""
    assert (found.model, found.training) == (expected.model, expected.training)
    assert found.matrices.keys() == expected.matrices.keys() and found.vectors.keys() == expected.vectors.keys()
    for name, matrix in expected.matrices.items():
        assert_same_matrix(found.matrices[name], matrix)
    for name, vector in expected.vectors.items():
        assert_same_bits(found.vectors[name], vector)


def assert_same_matrix(found: QuantizedTensor, expected: QuantizedTensor) -> None:
    assert (found.bits, found.rank) == (expected.bits, expected.rank)
    for tensor, other in ((found.codes, expected.codes), (found.row_exponents, expected.row_exponents),
                          (found.column_exponents, expected.column_exponents)):
        assert_same_bits(tensor, other)
    assert (found.row_scales is None, found.correction is None) == (expected.row_scales is None, expected.correction is None)
    if found.row_scales is not None and expected.row_scales is not None:
        assert_same_bits(found.row_scales, expected.row_scales)
    for factor, wanted in zip(found.correction or (), expected.correction or (), strict=True):
        assert_same_matrix(factor, wanted)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.numpy().tobytes() == expected.numpy().tobytes()
