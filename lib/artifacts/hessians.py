"""The seam between calibrate and quantize: how much an error in each matrix costs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lib.artifacts.files import ArtifactError
from lib.artifacts.tensors import load_tensors, save_tensors


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments over one set of training sequences.

    A change E of a matrix (R, C) raises the loss by about 1/2 sum_i g_i e_i H e_i^T nats per token, e_i row i of E.

    Attributes:
        hessians: name of the input -> H (C, C) fp32. For weights of linear layers E[x x^T] of the input x; for embedding tables
            the second moment of the loss gradients at their output, over its trace; for a table that is also the head, both.
        gradients: name of the matrix -> g (R,) fp32. For weights of linear layers the mean squared loss gradient at output i; for
            tables the mean squared loss gradient at the output of row i, summed over the C outputs.
        outputs: name of the matrix -> G (R, R) fp32, of linear layers: the second moment of the loss gradients at the output, whose
            diagonal is g; the change costs 1/2 tr(G E H E^T). Empty where nothing asks for it, and in files from before.
    """

    hessians: dict[str, Tensor]
    gradients: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Hessians:
    """Second moments over two disjoint sets of training sequences.

    Attributes:
        inputs: name of the input -> names of the matrices (R, C) that read it; query, key and value share one. The input of an
            embedding table has the name of its module.
        calibration: what quantization minimises the error with.
        verification: what errors are reported with; with those that were minimised they would look smaller than they are.
    """

    inputs: dict[str, tuple[str, ...]]
    calibration: Moments
    verification: Moments


def save_hessians(path: Path, hessians: Hessians, checkpoint: Path) -> None:
    """Write second moments of the model in the file `checkpoint` as safetensors; the same values give the same bytes."""
    tensors = {f"{name}:{kind}:{key}": tensor for name, moments in _sets(hessians).items() for kind, values in vars(moments).items()
               for key, tensor in values.items()}
    save_tensors(path, tensors, {"inputs": hessians.inputs}, [checkpoint])


def load_hessians(path: Path, checkpoint: Path) -> Hessians:
    """Read second moments of the model in the file `checkpoint`, tensors on the CPU.

    Raises:
        ArtifactError: missing, damaged, not second moments, or those of another checkpoint.
    """
    tensors, metadata = load_tensors(path, [checkpoint])
    try:
        inputs = {name: tuple(matrices) for name, matrices in metadata["inputs"].items()}
        return Hessians(inputs, *(_moments(tensors, name, inputs) for name in ("calibration", "verification")))
    except KeyError as error:
        raise ArtifactError(f"{path}: not the Hessians of a model (no {error}); `dvc repro -f` makes it anew") from None


def _sets(hessians: Hessians) -> dict[str, Moments]:
    return {"calibration": hessians.calibration, "verification": hessians.verification}


def _moments(tensors: dict[str, Tensor], name: str, inputs: dict[str, Any]) -> Moments:
    return Moments({source: tensors[f"{name}:hessians:{source}"] for source in inputs},
                   {matrix: tensors[f"{name}:gradients:{matrix}"] for matrices in inputs.values() for matrix in matrices},
                   {matrix: tensors[key] for matrices in inputs.values() for matrix in matrices
                    if (key := f"{name}:outputs:{matrix}") in tensors})
