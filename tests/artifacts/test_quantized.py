import math
from pathlib import Path

import pytest
import torch

from lib.artifacts.checkpoint import Checkpoint, save_checkpoint
from lib.artifacts.files import ArtifactError
from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range, dequantize, load_quantized, save_quantized
from tests.artifacts.quantized_models import assert_same, make_quantized_tensor


def make_model() -> QuantizedModel:
    return QuantizedModel({"num_layers": 2}, {"qat": None, "sequence_tokens": 8},
                          {"b.weight": make_quantized_tensor(3, 7, 5), "a.weight": make_quantized_tensor(2, 4, 8)},
                          {"scale": torch.tensor(0.5).half(), "mix": torch.ones(2, 3).half()})


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    quantized = make_model()
    save_quantized(tmp_path / "one", quantized)
    assert_same(load_quantized(tmp_path / "one"), quantized)
    save_quantized(tmp_path / "two", QuantizedModel(quantized.model, quantized.training, dict(reversed(quantized.matrices.items())),
                                                    dict(reversed(quantized.vectors.items()))))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_weights_are_codes_times_scales_in_fp32() -> None:
    codes, scales = torch.tensor([[-15, 0, 7], [1, 2, 3]], dtype=torch.int8), torch.tensor([0.5, 2.0]).half()
    expected = torch.tensor([[-7.5, 0.0, 3.5], [2.0, 4.0, 6.0]])
    assert torch.equal(dequantize(codes, scales), expected)
    weights = QuantizedModel({}, {}, {"a": QuantizedTensor(codes, scales, 5)}, {"b": torch.tensor([1.5]).half()}).weights()
    assert weights.keys() == {"a", "b"} and torch.equal(weights["a"], expected)
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_entropy() -> None:
    def entropy(codes: list[list[int]]) -> float:
        return QuantizedTensor(torch.tensor(codes, dtype=torch.int8), torch.ones(len(codes)).half(), 8).entropy_bits()
    assert entropy([[5, 5], [5, 5]]) == 0
    assert entropy([[-127, 127], [0, 1]]) == 2
    assert entropy([[0, 0], [0, 1]]) == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert QuantizedTensor(torch.zeros(0, 4, dtype=torch.int8), torch.zeros(0).half(), 5).entropy_bits() == 0


@pytest.mark.parametrize(("codes", "scales", "bits", "message"), [
    (torch.full((1, 2), -16, dtype=torch.int8), torch.ones(1).half(), 5, "expected -15 to 15 with 5 bits, found -16"),
    (torch.full((1, 2), 16, dtype=torch.int8), torch.ones(1).half(), 5, "found 16 to 16"),
    (torch.zeros(1, 2), torch.ones(1).half(), 5, "expected a matrix of int8"),
    (torch.zeros(2, 2, dtype=torch.int8), torch.ones(1).half(), 5, r"expected float16 of shape \(2,\)"),
    (torch.zeros(1, 2, dtype=torch.int8), torch.ones(1), 5, "expected float16"),
    (torch.zeros(1, 2, dtype=torch.int8), torch.full((1,), torch.inf).half(), 5, "finite"),
    (torch.zeros(1, 2, dtype=torch.int8), torch.ones(1).half(), 9, "bits: expected 2 to 8, found 9"),
])
def test_contradictions_are_errors(codes: torch.Tensor, scales: torch.Tensor, bits: int, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        QuantizedTensor(codes, scales, bits)


def test_clip_range() -> None:
    assert [clip_range(bits) for bits in range(2, 9)] == [1, 3, 7, 15, 31, 63, 127]


def test_other_files_are_errors(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "checkpoint", Checkpoint({"a": torch.ones(2)}, {}, {}))
    with pytest.raises(ArtifactError, match="checkpoint: not a quantized model"):
        load_quantized(tmp_path / "checkpoint")
    with pytest.raises(ArtifactError, match="no such file"):
        load_quantized(tmp_path / "nothing")
