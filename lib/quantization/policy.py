"""What happens to each parameter of a checkpoint: which grid, which steps, or fp16.

The role decides the bits, and exceptions by name; never the size: nothing stays unquantized because it is small.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lib.artifacts.checkpoint import Checkpoint, TrainedGrid
from lib.artifacts.hessians import Hessians
from lib.artifacts.quantized import QuantizedModel
from lib.distributed import Process
from lib.errors import UserError
from lib.model.parts import Part
from lib.progress import say
from lib.quantization.config import QuantizeParams
from lib.quantization.grid_config import FLOAT_BITS
from lib.quantization.quantizer import Matrices, Quantizer

FP16_MAX = torch.finfo(torch.float16).max


def choose_bits(parts: Mapping[str, Part], params: QuantizeParams) -> dict[str, int | str]:
    """Name of every matrix of a model -> 2 to 8, 16 or `FREE`.

    Raises:
        UserError: a role without bits, or exceptions for matrices that do not exist.
    """
    roles = {name: part.role for name, part in parts.items() if part.is_matrix}
    if missing := sorted(set(roles.values()) - params.bits.keys()):
        raise UserError(f"quantize.bits: expected bits for every role of the model's matrices, found none for {', '.join(missing)}")
    if unknown := sorted(params.bits_of.keys() - roles.keys()):
        raise UserError(f"quantize.bits_of: {unknown[0]}: expected the name of a matrix, one of {', '.join(sorted(roles))}")
    return {name: params.bits_of.get(name, params.bits[role]) for name, role in roles.items()}


def quantize_model(checkpoint: Checkpoint, parts: Mapping[str, Part], hessians: Hessians, params: QuantizeParams, *, process: Process,
                   measure: Callable[[QuantizedModel], int]) -> tuple[QuantizedModel, dict[str, float]]:
    """Quantize a checkpoint.

    Args:
        checkpoint: not changed; its matrices are (R, C).
        parts: from `lib.model.parts.parts_of` of the same model.
        hessians: second moments of the same model.
        params: section ``quantize``.
        process: every process calls this and gets the whole result.
        measure: size of code and artifact in bytes with a model; called by the main process alone, and only if there are free steps.

    Returns:
        The quantized model on the CPU; and the damping of the Hessian of each matrix with integer codes.

    Raises:
        TargetError: ``target_bytes`` cannot be reached.
        ValueError: a parameter that fp16 cannot hold, a Hessian that has no Cholesky decomposition, Hessians of another
            model, or exceptions for matrices that do not exist; the message names the tensor.
    """
    weights, bits, grid = checkpoint.weights, choose_bits(parts, params), checkpoint.training.qat
    if grid is not None and (differences := list_grid_differences(grid, params)):
        say("note: the checkpoint was trained for another grid than this one: " + "; ".join(differences), enabled=process.is_main)
    if different := sorted({name for names in hessians.inputs.values() for name in names} ^ bits.keys()):
        raise UserError(f"{different[0]}: expected in the checkpoint and in the Hessians, found in one; calibrate first (`dvc repro`)")
    for name, weight in weights.items():
        if not weight.abs().amax() <= FP16_MAX:
            raise UserError(f"{name}: expected magnitudes up to {FP16_MAX:g} (fp16), found {weight.abs().amax().item():g}; "
                            "the training diverged")
    vectors = {name: truncate(weight, params.vector_mantissa_bits) if not parts[name].is_matrix else weight.half()
               for name, weight in weights.items() if bits.get(name, FLOAT_BITS) == FLOAT_BITS}

    def model_of(matrices: Matrices) -> QuantizedModel:
        return QuantizedModel(checkpoint.model, checkpoint.training, matrices, vectors)

    def measure_everywhere(matrices: Matrices) -> int:
        size = torch.tensor(measure(model_of(matrices)) if process.is_main else 0, dtype=torch.int64, device=process.device)
        return int(process.sum(size))

    quantizer = Quantizer(weights, hessians, {name: kind for name, kind in bits.items() if kind != FLOAT_BITS}, params,
                          roles={name: part.role for name, part in parts.items()}, process=process)
    if params.first_target_bytes is None:
        return model_of(quantizer.round_clipped()), quantizer.dampings
    return model_of(quantizer.meet_target(params.first_target_bytes, measure_everywhere)), quantizer.dampings


def truncate(values: Tensor, mantissa_bits: int) -> Tensor:
    """fp16 with `mantissa_bits` of its 10 bits of mantissa, rounded to nearest, never to infinity: fp32 of any shape -> fp16."""
    mantissa, exponent = torch.frexp(values.half().float())
    scale = 2.0 ** (mantissa_bits + 1)  # the mantissa is 0 or from 1/2 to 1
    largest = 2.0**16 * (1 - 1 / scale)
    return torch.ldexp((mantissa * scale).round() / scale, exponent).clamp(-largest, largest).half()


def list_grid_differences(trained: TrainedGrid, params: QuantizeParams) -> list[str]:
    """Where the grid that the checkpoint was trained for, ``checkpoint.training.qat``, differs from that of the export.

    Args:
        trained: section ``train.qat``.
        params: section ``quantize``.

    Returns:
        One phrase for each differing key; empty if training and export share the grid.
    """
    clip, quantile = params.clip, trained.clip_quantile
    rule = {"max": [1.0], "percentile": list(clip.percentiles)}.get(clip.rule)
    differences = [f"bits.{role} {trained.bits.get(role)} in training, {bits} here"
                   for role, bits in params.bits.items() if trained.bits.get(role) != bits]
    if rule != [quantile]:
        differences.append(f"clip_quantile {quantile:g} in training, clip rule {clip.rule} here")
    if trained.floor != clip.floor:
        differences.append(f"floor {trained.floor:g} in training, {clip.floor:g} here")
    return differences + (["full_range in training, symmetric here"] if trained.full_range else [])
