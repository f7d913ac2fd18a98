import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import (
    LEFT,
    OCTAVE,
    RIGHT,
    SCALE,
    QuantizedModel,
    QuantizedTensor,
    assemble,
    clip_range,
    exponents_of,
    load_quantized,
    save_quantized,
    scales_of,
)
from tests.artifacts.quantized_models import TRAINING, assert_same, make_quantized_model, make_quantized_tensor


def int16(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.int16)


def make_tensor(codes: object, bits: int | None = 8) -> QuantizedTensor:
    matrix = int16(codes)
    return QuantizedTensor(matrix, torch.zeros(matrix.shape[0]).short(), torch.zeros(matrix.shape[1]).short(), bits)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    quantized = make_quantized_model()
    save_quantized(tmp_path / "one", quantized)
    assert_same(load_quantized(tmp_path / "one"), quantized)
    save_quantized(tmp_path / "two", QuantizedModel(quantized.model, quantized.training, dict(reversed(quantized.matrices.items())),
                                                    dict(reversed(quantized.vectors.items()))))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_scales_are_powers_of_two_to_the_last_bit() -> None:
    exponents = torch.arange(-2**15, 2**15, dtype=torch.int16)
    assert torch.equal(scales_of(int16([0, OCTAVE, -OCTAVE, 10 * OCTAVE])), torch.tensor([1, 2, 0.5, 1024]))
    expected = torch.exp2(exponents.double() / OCTAVE)
    assert ((scales_of(exponents).double() - expected).abs() / expected).max() <= 2**-24
    assert torch.equal(exponents_of(scales_of(exponents[1:])), exponents[1:])


def test_exponents_are_the_nearest_multiples() -> None:
    assert exponents_of(torch.tensor([1.0, 2**0.3, 2**-0.3]), 128).tolist() == [0, 256, -256]
    assert exponents_of(torch.tensor([[1e-30, 1e30]]), 16).tolist() == [[-32752, 32752]]


def test_weights_are_codes_times_scales_in_fp32() -> None:
    matrix = QuantizedTensor(int16([[-15, 0, 7], [1, 2, 3]]), int16([-OCTAVE, OCTAVE]), int16([0, 0, 2 * OCTAVE]), None)
    expected = torch.tensor([[-7.5, 0.0, 14.0], [2.0, 4.0, 24.0]])
    weights = QuantizedModel({}, TRAINING, {"a": matrix}, {"b": torch.tensor([1.5]).half()}).weights()
    assert weights.keys() == {"a", "b"} and torch.equal(weights["a"], expected)
    assert all(weight.dtype == torch.float32 for weight in weights.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_row_scales_multiply_the_rows_of_their_matrix(dtype: torch.dtype) -> None:
    codes, scales = [[-15, 0, 7], [1, 2, 3]], torch.tensor([0.1, 3e-5]).to(dtype)
    matrices = {"a": replace(make_tensor(codes), row_scales=scales), "b": make_tensor(codes)}
    weights = QuantizedModel({}, TRAINING, matrices, {}).weights()
    assert weights.keys() == {"a", "b"} and torch.equal(weights["b"], torch.tensor(codes).float())
    assert torch.equal(weights["a"], torch.tensor(codes).float() * scales.float()[:, None])


@pytest.mark.parametrize(("name", "shape"), [("c", (2,)), ("a", (1,)), ("a", (3,)), ("a", ()), ("a", (2, 1)), ("b", (2,))])
def test_row_scales_without_these_rows_are_errors(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match=f"{name}: the matrix does not fit together with its row scales"):
        assemble({"a": make_tensor([[1], [2]])}, {name + SCALE: torch.ones(shape), "b": torch.ones(2, 2)})


def test_corrections_are_added_to_their_matrix() -> None:
    matrices = {"a": make_tensor([[1, 2, 3], [4, 5, 6]]), "a" + LEFT: make_tensor([[1], [2]]), "a" + RIGHT: make_tensor([[1, 0, -1]])}
    assembled, vectors = assemble(matrices, {})
    weights = QuantizedModel({}, TRAINING, assembled, vectors).weights()
    assert weights.keys() == {"a"} and weights["a"].tolist() == [[2, 2, 2], [6, 5, 4]]
    for name in matrices:
        with pytest.raises(ArtifactError, match="a: the matrix does not fit together"):
            assemble({key: matrix for key, matrix in matrices.items() if key != name} | {"b": matrices["a"]}, {})
    for wrong in (make_tensor([[1], [2], [3]]), make_tensor([[1, 2], [3, 4]]), replace(matrices["a" + LEFT], row_scales=torch.ones(2))):
        with pytest.raises(ArtifactError, match=r"a: the matrix does not fit together .*expected plain factors whose product is"):
            assemble(matrices | {"a" + LEFT: wrong}, {})
    with pytest.raises(ArtifactError, match="a:left: the matrix does not fit together"):
        assemble(matrices, {"a" + LEFT + SCALE: torch.ones(2)})


def test_entropy() -> None:
    assert make_tensor([[5, 5], [5, 5]]).entropy_bits() == 0
    assert make_tensor([[-127, 127], [0, 1]]).entropy_bits() == 2
    assert make_tensor([[-2**15 + 1, 2**15 - 1]], None).entropy_bits() == 1
    assert make_tensor([[0, 0], [0, 1]]).entropy_bits() == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert QuantizedTensor(torch.zeros(0, 4).short(), torch.zeros(0).short(), torch.zeros(4).short(), 5).entropy_bits() == 0


@pytest.mark.parametrize(("change", "message"), [
    (lambda good: {"codes": torch.full_like(good.codes, -16)}, "codes: expected -15 to 15, found -16 to -16"),
    (lambda good: {"codes": torch.full_like(good.codes, 16)}, "found 16 to 16"),
    (lambda good: {"codes": torch.full_like(good.codes, -2**15), "bits": None}, "codes: expected -32767 to 32767"),
    (lambda good: {"codes": good.codes.int()}, "codes: expected a matrix of int16"),
    (lambda good: {"codes": good.codes.flatten()}, "codes: expected a matrix of int16"),
    (lambda good: {"row_exponents": good.column_exponents}, r"row exponents: expected int16 of shape \(3,\)"),
    (lambda good: {"column_exponents": good.row_exponents}, r"column exponents: expected int16 of shape \(4,\)"),
    (lambda good: {"row_exponents": good.row_exponents.half()}, "row exponents: expected int16"),
    (lambda good: {"bits": 9}, "bits: expected 2 to 8, found 9"),
    (lambda good: {"bits": 1}, "bits: expected 2 to 8, found 1"),
])
def test_contradictions_are_errors(change: Callable[[QuantizedTensor], dict[str, object]], message: str) -> None:
    good = make_quantized_tensor(3, 4, 5)
    with pytest.raises(ArtifactError, match=message):
        replace(good, **change(good))  # type: ignore[arg-type]


def test_clip_range() -> None:
    assert [clip_range(bits) for bits in (*range(2, 9), None)] == [1, 3, 7, 15, 31, 63, 127, 32767]


def test_other_files_are_errors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", Checkpoint({"a": torch.ones(2)}, {}, TRAINING))
    with pytest.raises(ArtifactError, match="checkpoint: not a quantized model"):
        load_quantized(tmp_path / "checkpoint")
    with pytest.raises(ArtifactError, match="no such file"):
        load_quantized(tmp_path / "nothing")
