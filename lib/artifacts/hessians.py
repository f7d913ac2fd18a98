"""The seam between calibrate and quantize: second moments of the inputs of linear layers."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors

CALIBRATION, VERIFICATION = "calibration:", "verification:"


@dataclass(frozen=True, eq=False)
class Hessians:
    """Input Hessians E[x x^T], (C, C) fp32, over two disjoint sets of training sequences.

    An input that several weights read (query, key and value) has one Hessian.

    Attributes:
        inputs: name of the input -> names of the weights (R, C) that read it.
        calibration: name of the input -> Hessian that GPTQ minimises the error with.
        verification: name of the input -> Hessian that errors are reported with; with the one that was minimised they
            would look smaller than they are.
    """

    inputs: dict[str, tuple[str, ...]]
    calibration: dict[str, Tensor]
    verification: dict[str, Tensor]


def save_hessians(path: Path, hessians: Hessians) -> None:
    """Write Hessians as safetensors; the same Hessians give the same bytes."""
    tensors = {CALIBRATION + name: hessian for name, hessian in hessians.calibration.items()}
    tensors |= {VERIFICATION + name: hessian for name, hessian in hessians.verification.items()}
    save_tensors(path, tensors, {"inputs": hessians.inputs})


def load_hessians(path: Path) -> Hessians:
    """Read Hessians, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, or not Hessians.
    """
    tensors, metadata = load_tensors(path)
    try:
        inputs = {name: tuple(weights) for name, weights in metadata["inputs"].items()}
        calibration, verification = ({name: tensors[kind + name] for name in inputs} for kind in (CALIBRATION, VERIFICATION))
        return Hessians(inputs, calibration, verification)
    except KeyError as error:
        raise ArtifactError(f"{path}: not the Hessians of a model (no {error}); `dvc repro -f` makes it anew") from None
