"""What distillation trains: integer codes of the matrices, and what is stored as floats beside them.

What is trained of a matrix are latents, in steps, which start at the codes. Each forward pass rounds them, and the gradient at a code is
taken for that at its latent (straight-through, arXiv:1308.3432). Latents do not start at the weights: those lie beside the thresholds, and
noise would turn the codes of GPTQ back into the nearest ones. Steps stay as they are.

Lengths are those of two-sided geometric distributions: a constant and `code_slopes` bits for every step away from 0. Shapes: R rows,
C columns.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lib.artifacts.quantized import QuantizedModel, QuantizedTensor, clip_range, scales_of
from lib.model.parts import parts_of, write_weights
from lib.quantization.config import QuantizeParams
from lib.quantization.gptq import SMALLEST_MAGNITUDE
from lib.quantization.policy import truncate

BETAS, EPSILON = (0.9, 0.99), 1e-12  # of Adam
SHARPNESS = 2.0  # of tanh, which stands for the sign of a latent


def code_slopes(codes: Tensor) -> Tensor:
    """Bits that every step away from 0 adds to a code, by what the magnitudes of its row and its column lead to expect.

    Args:
        codes: (R, C) fp32 integers.

    Returns:
        (R, C) fp32, log2(1/theta) of the distribution (1 - theta) / (1 + theta) theta^|q| with a mean magnitude of 2 theta / (1 - theta^2).
    """
    magnitudes = codes.abs()
    mean = magnitudes.mean().clamp(min=SMALLEST_MAGNITUDE)
    rows, columns = ((magnitudes.sum(dim) + mean) / (magnitudes.shape[dim] + 1) for dim in (1, 0))  # as if there were one code more
    expected = (rows[:, None] * columns / mean).clamp(min=SMALLEST_MAGNITUDE)
    return torch.log2(((1 + expected.square()).sqrt() + 1) / expected)


def code_bits(codes: Tensor) -> Tensor:
    """Length of all codes (R, C) together, fp64, with `code_slopes`."""
    slopes = code_slopes(codes).double()
    return (slopes * codes.abs() - torch.log2(1 - 2 / (1 + torch.exp2(slopes)))).sum()


@dataclass(eq=False)
class Codes:
    """What is trained of one matrix.

    Attributes:
        start: the matrix before.
        name: name of the parameter.
        transposed: whether the model has it as (C, R).
        steps: (R, C) fp32.
        latents: (R, C) fp32, in steps.
        slopes: (R, C) fp32, `code_slopes`; 0 for grids that clip.
    """

    start: QuantizedTensor
    name: str
    transposed: bool
    steps: Tensor
    latents: Tensor
    slopes: Tensor

    def rounded(self, shift: float = 0.0) -> Tensor:
        """Codes as fp32, of latents moved towards 0 by `shift` steps for each bit per step."""
        nearest = (self.latents.abs() - shift * self.slopes).clamp_(min=0).round_().clamp_(max=clip_range(self.start.bits))
        return nearest.mul_(self.latents.sign())

    def set_gradient(self, gradient: Tensor, price: float) -> None:
        """Take the gradient at the weights, as the model has them, for that at the latents, and add that of the length."""
        self.latents.grad = (gradient.T if self.transposed else gradient).float() * self.steps
        self.latents.grad.addcmul_(self.slopes, torch.tanh(SHARPNESS * self.latents), value=price)


class Student:
    """A model in which quantized weights, which are trained, take turns with its own."""

    def __init__(self, model: nn.Module, start: QuantizedModel, params: QuantizeParams, device: torch.device) -> None:
        self._model, self._start, self._mantissa_bits, parts = model, start, params.vector_mantissa_bits, parts_of(model)
        self.parameters = dict(model.named_parameters())
        self._own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._frozen = [parameter for parameter in self.parameters.values() if not parameter.requires_grad]
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.codes = []
        for name, matrix in start.matrices.items():
            steps, latents = scales_of(matrix.row_exponents)[:, None] * scales_of(matrix.column_exponents), matrix.codes.float()
            self.codes.append(Codes(matrix, name, parts[name].transposed, steps.to(device), latents.to(device),
                                     torch.zeros_like(latents, device=device)))
        self.vectors = {name: vector.to(device, torch.float32) for name, vector in start.vectors.items() if not parts[name].is_matrix}
        self.optimizer = torch.optim.Adam([{"params": [codes.latents for codes in self.codes], "lr": params.distill.code_lr},
                                           {"params": list(self.vectors.values()), "lr": params.distill.vector_lr}],
                                          betas=BETAS, eps=EPSILON)

    @torch.no_grad()
    def put_own(self) -> None:
        """Give the model its own weights."""
        for name, own in self._own.items():
            self.parameters[name].copy_(own)

    @torch.no_grad()
    def put_quantized(self) -> None:
        """Give the model what the codes and vectors stand for."""
        for codes in self.codes:
            weight = codes.rounded().mul_(codes.steps)
            self.parameters[codes.name].copy_(weight.T if codes.transposed else weight)
        for name, vector in self._quantized_vectors().items():
            self.parameters[name].copy_(vector)

    def put(self, quantized: QuantizedModel) -> None:
        """Give the model the weights of another quantized one."""
        write_weights(self._model, quantized.weights())

    def measure_slopes(self) -> None:
        """Let lengths be those of the codes as they are now."""
        for codes in self.codes:
            if codes.start.bits is None:
                codes.slopes = code_slopes(codes.rounded())

    def quantized(self, shift: float = 0.0) -> QuantizedModel:
        """The quantized model as it is now, on the CPU."""
        matrices = {codes.name: QuantizedTensor(codes.rounded(shift).to(torch.int16).cpu(), codes.start.row_exponents,
                                                codes.start.column_exponents, codes.start.bits) for codes in self.codes}
        vectors = self._start.vectors | {name: vector.cpu() for name, vector in self._quantized_vectors().items()}
        return QuantizedModel(self._start.model, self._start.training, matrices, vectors)

    def step(self, price: float, lr_multiplier: float) -> None:
        """One step of Adam with the gradients that the model has."""
        for codes in self.codes:
            gradient = self.parameters[codes.name].grad
            assert gradient is not None
            codes.set_gradient(gradient, price)
        for name, vector in self.vectors.items():
            gradient = self.parameters[name].grad
            assert gradient is not None
            vector.grad = gradient.float()
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] *= lr_multiplier
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """All that changes from step to step."""
        return {"latents": [codes.latents for codes in self.codes], "slopes": [codes.slopes for codes in self.codes],
                "vectors": self.vectors, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the state of `state_dict`."""
        for codes, latents, slopes in zip(self.codes, state["latents"], state["slopes"], strict=True):
            codes.latents.copy_(latents)
            codes.slopes = slopes.to(codes.latents.device)
        for name, vector in self.vectors.items():
            vector.copy_(state["vectors"][name])
        self.optimizer.load_state_dict(state["optimizer"])

    def restore(self) -> None:
        """Leave the model as it was."""
        self.put_own()
        for parameter in self.parameters.values():
            parameter.grad = None
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _quantized_vectors(self) -> dict[str, Tensor]:
        """fp16, as they are stored."""
        return {name: truncate(vector, self._mantissa_bits) for name, vector in self.vectors.items()}
