"""Quantized models for tests, and what it means that two are the same."""

import torch

from lib.artifacts.checkpoint import Training
from lib.artifacts.quantized import LEFT, RIGHT, SCALE, QuantizedModel, QuantizedTensor, clip_range

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
        {"b.weight": make_quantized_tensor(3, 7, 5), "a.weight": make_quantized_tensor(9, 6, None),
         "a.weight" + LEFT: make_quantized_tensor(9, 2, 8, 1), "a.weight" + RIGHT: make_quantized_tensor(2, 6, 8, 2)},
        {"scale": torch.tensor(0.5).half(), "mix": torch.ones(2, 3).half(), "gain": torch.tensor([0.1, 1e-30]),
         "b.weight" + SCALE: torch.tensor([0.3, 0.5, 1.7]).half()})


def assert_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    """Equal bit for bit, NaN and signed zeros included."""
    assert (found.model, found.training) == (expected.model, expected.training)
    assert found.matrices.keys() == expected.matrices.keys() and found.vectors.keys() == expected.vectors.keys()
    for name, matrix in expected.matrices.items():
        assert found.matrices[name].bits == matrix.bits
        assert_same_bits(found.matrices[name].codes, matrix.codes)
        assert_same_bits(found.matrices[name].row_exponents, matrix.row_exponents)
        assert_same_bits(found.matrices[name].column_exponents, matrix.column_exponents)
    for name, vector in expected.vectors.items():
        assert_same_bits(found.vectors[name], vector)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.numpy().tobytes() == expected.numpy().tobytes()
