"""Parameters of the calibrate stage."""

from typing import Self

from pydantic import model_validator

from lib.params import Params, Positive, Precision


class CalibrateParams(Params):
    """Section ``calibrate``."""

    num_sequences: Positive
    """Training sequences that quantization minimises errors on, and as many others that errors are reported on."""
    num_gradient_sequences: Positive
    """So many of each set also get a backward pass, for what needs gradients."""
    batch_sequences: Positive
    """Sequences per forward pass; more is faster and takes more memory."""
    precision: Precision
    """bf16: matrix products of the model in bfloat16 (torch.autocast), those of its inputs in TF32 on GPUs, and all their sums in fp32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_gradient_sequences > self.num_sequences:
            raise ValueError(f"num_gradient_sequences: expected at most num_sequences {self.num_sequences}, "
                             f"found {self.num_gradient_sequences}")
        return self
