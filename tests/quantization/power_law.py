"""Weights and Hessians like those of trained models: correlated inputs whose variances follow a power law.

Shapes: R rows, C columns, S samples.
"""

import torch
from torch import Tensor

from lib.artifacts.hessians import Hessians, Moments
from lib.artifacts.quantized import QuantizedTensor, exponents_of, scales_of
from lib.quantization.config import ClipParams
from lib.quantization.gptq import Problem, factorize, row_errors

DAMPING = 0.01
SHAPES = {"blocks.0.attention.input": {"query": (24, 48), "key": (12, 48), "value": (12, 48)},
          "blocks.0.mlp.up": {"up": (64, 48)}, "blocks.0.mlp.down": {"down": (48, 64)}}


def make_clip(rule: str = "max", percentiles: tuple[float, ...] = (0.9, 0.99, 1.0), num_candidates: int = 20,
              num_std: float = 3.0, floor: float = 0.0) -> ClipParams:
    return ClipParams.model_validate({"rule": rule, "percentiles": percentiles, "num_candidates": num_candidates, "num_std": num_std,
                                      "num_std_of": {}, "floor": floor})


def make_weight(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def make_hessian(num_columns: int, seed: int = 0, exponent: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64))
    gains = torch.rand(num_columns, generator=generator, dtype=torch.float64) + 0.5  # so that the diagonal is not flat
    spectrum = torch.arange(1, num_columns + 1, dtype=torch.float64) ** -exponent
    hessian: Tensor = gains[:, None] * ((basis * spectrum) @ basis.T) * gains
    return ((hessian + hessian.T) / 2).float()


def damped(hessian: Tensor) -> Tensor:
    """H with `DAMPING` of its mean diagonal added, fp64."""
    hessian = hessian.double()
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)


def make_problem(num_rows: int, num_columns: int, seed: int = 0, *, act_order: bool = True, pruned: Tensor | None = None) -> Problem:
    """In fp64, so that references agree to the last code."""
    return Problem(make_weight(num_rows, num_columns, seed).double(),
                   factorize("test", make_hessian(num_columns, seed), DAMPING, act_order), pruned)


def make_steps(num_rows: int, num_columns: int, seed: int = 0, mean: float = 0.01) -> tuple[Tensor, Tensor]:
    """Scales of rows and columns over two octaves, (R,) and (C,) fp32, powers of 2 as they are stored."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.exp2(2 * torch.rand(size, generator=generator) - 1) for size in (num_rows, num_columns))
    return scales_of(exponents_of(rows * mean)), scales_of(exponents_of(columns))


def entropy_bits(codes: Tensor) -> float:
    """Order-0 entropy of the codes of one matrix, bits per weight."""
    rows, columns = (torch.zeros(size, dtype=torch.int16) for size in codes.shape)
    return QuantizedTensor(codes.to(torch.int16), rows, columns, None).entropy_bits()


def make_layers() -> tuple[dict[str, Tensor], Hessians]:
    """Matrices of one block, and moments of two sets of samples of the same inputs and gradients, whose sizes follow power laws."""
    generator = torch.Generator().manual_seed(5)
    weights: dict[str, Tensor] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    sets = Moments({}, {}), Moments({}, {})
    for number, (source, shapes) in enumerate(SHAPES.items()):
        num_columns = next(iter(shapes.values()))[1]
        root = torch.linalg.cholesky(make_hessian(num_columns, number).double()).float()
        module = source.removesuffix(".input") if "attention" in source else source.rpartition(".")[0]
        inputs[source] = tuple(f"{module}.{name}.weight" for name in shapes)
        for moments in sets:
            x = torch.randn(500, num_columns, generator=generator) @ root.T  # (S, C)
            moments.hessians[source] = x.T @ x / len(x)
        for name, (num_rows, _) in zip(inputs[source], shapes.values(), strict=True):
            weights[name] = torch.randn(num_rows, num_columns, generator=generator) * 0.05
            gradients = 1e-3 * 4.0**number * torch.randn(num_rows, generator=generator).exp()
            for moments in sets:
                moments.gradients[name] = gradients * (torch.randn(num_rows, 500, generator=generator) ** 2).mean(1)
    return weights, Hessians(inputs, *sets)


def quadratic_error(error: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T)."""
    return float(row_errors(error, hessian).sum())
