"""Quality and speed of GPTQ against its alternatives, as ratios measured in one run: ``python -m bench.quantize``.

The weights are normal; the Hessian has a power-law spectrum in a random basis and log-normal input scales; both are 512 x 512.
"raw inverse" is the procedure of entry #585, which propagates with the inverse Hessian itself, columns in ascending order.
"""

import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lib.artifacts.quantized import dequantize
from lib.quantization.gptq import factorize, quadratic_error, round_gptq
from lib.quantization.grid import round_to_grid, row_scales
from lib.quantization.grid_config import ClipParams

SIZE, BITS, DAMPING, BLOCK_SIZE = 512, 5, 0.01, 128
CLIP = ClipParams(rule="mse", percentiles=(1.0,), num_candidates=50, num_std=4.0)
NUM_REPEATS = 3


def make_problem() -> tuple[Tensor, Tensor]:
    """Weight and Hessian, (512, 512) fp32 each."""
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    gains = torch.randn(SIZE, generator=generator, dtype=torch.float64).mul(0.5).exp()
    hessian = gains[:, None] * ((basis / torch.arange(1, SIZE + 1)) @ basis.T) * gains
    return torch.randn(SIZE, SIZE, generator=generator) * 0.05, ((hessian + hessian.T) / 2).float()


def round_columns(weight: Tensor, hessian: Tensor, scales: Tensor, *, raw_inverse: bool) -> Tensor:
    """Column by column, every later column updated after each: with the Cholesky factor, or with the inverse itself."""
    order = torch.argsort(hessian.diagonal(), descending=not raw_inverse)
    damped = hessian.double() + DAMPING * hessian.diagonal().double().mean() * torch.eye(SIZE, dtype=torch.float64)
    inverse = torch.linalg.inv(damped[order][:, order])
    factor = (inverse if raw_inverse else torch.linalg.cholesky(inverse, upper=True)).float()
    columns, codes = weight[:, order].clone(), torch.empty(weight.shape, dtype=torch.int8)
    for j in range(SIZE):
        codes[:, j, None] = round_to_grid(columns[:, j, None], scales, BITS)
        error = (columns[:, j] - dequantize(codes[:, j, None], scales)[:, 0]) / factor[j, j]
        columns[:, j + 1:] -= error[:, None] * factor[j, j + 1:]
    return codes[:, torch.argsort(order)]


def measure(function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Result and the shortest of `NUM_REPEATS` times in seconds, after one run to warm up."""
    result, seconds = function(), []
    for _ in range(NUM_REPEATS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def main() -> None:
    """Print the table."""
    weight, hessian = make_problem()
    scales = row_scales(weight, BITS, CLIP)
    methods: dict[str, Callable[[], Tensor]] = {
        "GPTQ": lambda: round_gptq(weight, scales, BITS, factorize("bench", hessian, DAMPING, True), BLOCK_SIZE),
        "GPTQ, natural order": lambda: round_gptq(weight, scales, BITS, factorize("bench", hessian, DAMPING, False), BLOCK_SIZE),
        "GPTQ, column by column": lambda: round_columns(weight, hessian, scales, raw_inverse=False),
        "raw inverse, ascending (#585)": lambda: round_columns(weight, hessian, scales, raw_inverse=True),
        "round-to-nearest": lambda: round_to_grid(weight, scales, BITS),
    }
    print(f"torch {torch.__version__}, cpu {platform.machine()}, {torch.get_num_threads()} threads; {SIZE} x {SIZE}, int{BITS}")
    print(f"{'method':32}{'relative error':>16}{'error / GPTQ':>16}{'time / GPTQ':>16}")
    reference = quadratic_error(weight, hessian)
    first: tuple[float, float] | None = None
    for name, function in methods.items():
        codes, seconds = measure(function)
        error = quadratic_error(weight - dequantize(codes, scales), hessian) / reference
        first = first or (error, seconds)
        print(f"{name:32}{error:16.5f}{error / first[0]:16.2f}{seconds / first[1]:16.2f}")


if __name__ == "__main__":
    main()
