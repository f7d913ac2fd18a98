import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint
from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedModel
from lib.distributed import SINGLE_CPU
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.quantization.assessment import TensorRow, list_tensors, summarize
from lib.quantization.clipping import row_scales
from lib.quantization.grid import round_to_grid
from lib.quantization.policy import quantize_model
from tests.quantization.test_config import FREE_BITS
from tests.quantization.test_policy import make_quantize, measure

FREE: dict[str, Any] = {"bits": FREE_BITS, "target_bytes": 4000}


def make_table(checkpoint: Checkpoint, hessians: Hessians, **changes: Any) -> tuple[QuantizedModel, dict[str, TensorRow]]:
    params, parts = make_quantize(**changes), parts_of(outline(checkpoint.model))
    quantized, dampings = quantize_model(checkpoint, parts, hessians, params, process=SINGLE_CPU, measure=measure)
    coded_bytes = {name: number + 7 for number, name in enumerate(sorted(quantized.matrices))}
    rows = list_tensors(checkpoint.weights, parts, hessians, quantized, params, dampings=dampings, coded_bytes=coded_bytes,
                        device=SINGLE_CPU.device)
    assert [(row.name, row.role) for row in rows] == sorted((name, part.role) for name, part in parts.items() if part.is_matrix)
    for row in rows:
        assert row.coded_bytes == coded_bytes.get(row.name)
    return quantized, {row.name: row for row in rows}


def squared(error: Tensor, hessian: Tensor) -> float:
    return float((error.double() @ hessian.double() @ error.double().T).trace())


@pytest.mark.parametrize("changes", [{}, FREE, {"low_rank": {"max_bytes": 400, "bits": 8}}], ids=["clipped", "free", "low rank"])
def test_errors_are_those_of_the_verification_moments(checkpoint: Checkpoint, hessians: Hessians, changes: dict[str, Any]) -> None:
    quantized, table = make_table(checkpoint, hessians, **changes)
    results = quantized.weights()
    for source, names in hessians.inputs.items():
        for name in names:
            row, weight, hessian = table[name], checkpoint.weights[name].double(), hessians.verification.hessians[source].double()
            gradients, error = hessians.verification.gradients[name].double(), weight - results[name]
            assert (row.rows, row.columns) == tuple(weight.shape)
            assert row.relative_error == pytest.approx(squared(error, hessian) / squared(weight, hessian))
            assert row.sensitivity == pytest.approx(float(gradients.mean()) / 2)
            assert row.predicted_loss == pytest.approx(float(gradients @ (error @ hessian @ error.T).diagonal()) / 2)
            assert row.dead_columns == 0 and row.damping == make_quantize().damping


def test_codes_and_steps_of_free_matrices(checkpoint: Checkpoint, hessians: Hessians) -> None:
    quantized, table = make_table(checkpoint, hessians, **FREE)
    for name, row in table.items():
        matrix, weight = quantized.matrices[name], checkpoint.weights[name]
        steps = torch.exp2((matrix.row_exponents[:, None].double() + matrix.column_exponents) / 1024)
        assert (row.method, row.bits, row.rank) == ("gptq", "free", 0)
        assert row.step == pytest.approx(math.exp(float(steps.log().mean())))
        assert row.zeros == float((matrix.codes == 0).float().mean()) and row.entropy_bits == matrix.entropy_bits()
        source = next(source for source, names in hessians.inputs.items() if name in names)
        hessian = hessians.verification.hessians[source]
        nearest = weight - (weight / steps).round() * steps
        assert row.relative_error_rtn == pytest.approx(squared(nearest, hessian) / squared(weight, hessian), rel=1e-3)
    total = summarize(list(table.values()))
    assert total["relative_error"] < total["relative_error_rtn"]


def test_round_to_nearest_of_grids_that_clip_has_the_scales_of_the_rule(checkpoint: Checkpoint, hessians: Hessians) -> None:
    """Whatever GPTQ rounds to; and rounding to nearest itself is what it is compared with."""
    _, table = make_table(checkpoint, hessians, rate_weight=0.06)
    _, plain = make_table(checkpoint, hessians)
    _, nearest = make_table(checkpoint, hessians, method="rtn")
    name = "blocks.1.mlp.up.weight"
    weight, hessian = checkpoint.weights[name], hessians.verification.hessians["blocks.1.mlp.up"]
    scales = row_scales(weight, 4, make_quantize().clip)[:, None]
    expected = squared(weight - round_to_grid(weight, scales, 4) * scales, hessian) / squared(weight, hessian)
    assert table[name].relative_error_rtn == pytest.approx(expected, rel=1e-4)
    for each, row in nearest.items():
        assert row.relative_error == row.relative_error_rtn == table[each].relative_error_rtn == plain[each].relative_error_rtn
        assert (row.method, table[each].method, table[each].bits) == ("rtn", "gptq", row.bits)
    assert summarize(list(plain.values()))["relative_error"] < 0.8 * summarize(list(nearest.values()))["relative_error"]
    assert any(table[each].relative_error != plain[each].relative_error for each in table)


def test_sixteen_bits_have_no_codes(checkpoint: Checkpoint, hessians: Hessians) -> None:
    _, table = make_table(checkpoint, hessians, bits=dict.fromkeys(FREE_BITS, 16))
    for row in table.values():
        assert (row.method, row.bits, row.rank) == ("fp16", 16, 0)
        assert (row.step, row.entropy_bits, row.coded_bytes, row.zeros, row.damping) == (None,) * 5
        assert 0 < row.relative_error == row.relative_error_rtn < 1e-6
    total = summarize(list(table.values()))
    assert (total["entropy_bits"], total["coded_bits"]) == (0, 0)


def test_ranks_and_dead_columns(checkpoint: Checkpoint, hessians: Hessians) -> None:
    hessian = hessians.calibration.hessians["blocks.1.mlp.up"].clone()
    hessian[[3, 5]], hessian[:, [3, 5]] = 0, 0
    changed = Hessians(hessians.inputs, Moments(hessians.calibration.hessians | {"blocks.1.mlp.up": hessian},
                                                hessians.calibration.gradients), hessians.verification)
    quantized, table = make_table(checkpoint, changed, low_rank={"max_bytes": 400, "bits": 8})
    assert {name: row.dead_columns for name, row in table.items() if row.dead_columns} == {"blocks.1.mlp.up.weight": 2}
    ranks = {name: matrix.correction[0].codes.shape[1] for name, matrix in quantized.matrices.items() if matrix.correction}
    assert ranks and {name: row.rank for name, row in table.items() if row.rank} == ranks


def test_a_matrix_without_influence_has_no_error(checkpoint: Checkpoint, hessians: Hessians) -> None:
    nothing = hessians.verification.hessians | {"bigram.table": torch.zeros(4, 4)}
    _, table = make_table(checkpoint, Hessians(hessians.inputs, hessians.calibration, Moments(nothing, hessians.verification.gradients)))
    row = table["bigram.table.weight"]
    assert (row.relative_error, row.relative_error_rtn, row.predicted_loss) == (0, 0, 0)


def make_row(**values: Any) -> TensorRow:
    return TensorRow(**dict.fromkeys((field.name for field in fields(TensorRow)), 0) | values)


def test_summary_by_hand() -> None:
    rows = [make_row(rows=2, columns=10, relative_error=0.1, relative_error_rtn=0.4, entropy_bits=3.0, coded_bytes=10, predicted_loss=0.5),
            make_row(rows=4, columns=5, coded_bytes=None, entropy_bits=None, predicted_loss=0.25),
            make_row(rows=5, columns=8, relative_error=0.9, relative_error_rtn=0.8, entropy_bits=6.0, coded_bytes=20)]
    assert summarize(rows) == pytest.approx({
        "entropy_bits": (20 * 3 + 40 * 6) / 60, "coded_bits": 8 * 30 / 60, "relative_error": (20 * 0.1 + 40 * 0.9) / 80,
        "relative_error_rtn": (20 * 0.4 + 40 * 0.8) / 80, "predicted_loss": 0.75})
