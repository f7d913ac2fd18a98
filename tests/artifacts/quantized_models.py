"""Quantized models for tests, and what it means that two are the same."""

import torch

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range


def make_quantized_tensor(num_rows: int, num_columns: int, bits: int, seed: int = 0) -> QuantizedTensor:
    generator, limit = torch.Generator().manual_seed(seed), clip_range(bits)
    codes = (torch.randn(num_rows, num_columns, generator=generator) * limit / 3).round().clamp(-limit, limit)
    return QuantizedTensor(codes.to(torch.int8), torch.rand(num_rows, generator=generator).half(), bits)


def assert_same(found: QuantizedModel, expected: QuantizedModel) -> None:
    """Equal bit for bit, NaN and signed zeros included."""
    assert (found.model, found.training) == (expected.model, expected.training)
    assert found.matrices.keys() == expected.matrices.keys() and found.vectors.keys() == expected.vectors.keys()
    for name, matrix in expected.matrices.items():
        assert found.matrices[name].bits == matrix.bits
        assert_same_bits(found.matrices[name].codes, matrix.codes)
        assert_same_bits(found.matrices[name].scales, matrix.scales)
    for name, vector in expected.vectors.items():
        assert_same_bits(found.vectors[name], vector)


def assert_same_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert found.numpy().tobytes() == expected.numpy().tobytes()
