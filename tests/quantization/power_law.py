"""Weights and a Hessian like those of trained models: correlated inputs whose variances follow a power law."""

import torch
from torch import Tensor

from lib.quantization.grid_config import ClipParams


def make_clip(rule: str = "max", percentiles: tuple[float, ...] = (0.9, 0.99, 1.0), num_candidates: int = 20,
              num_std: float = 3.0) -> ClipParams:
    return ClipParams.model_validate({"rule": rule, "percentiles": percentiles, "num_candidates": num_candidates, "num_std": num_std})


def make_weight(num_rows: int, num_columns: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def make_hessian(num_columns: int, seed: int = 0, exponent: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(num_columns, num_columns, generator=generator, dtype=torch.float64))
    gains = torch.rand(num_columns, generator=generator, dtype=torch.float64) + 0.5  # so that the diagonal is not flat
    spectrum = torch.arange(1, num_columns + 1, dtype=torch.float64) ** -exponent
    hessian: Tensor = gains[:, None] * ((basis * spectrum) @ basis.T) * gains
    return ((hessian + hessian.T) / 2).float()
