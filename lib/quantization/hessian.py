"""Second moments of the inputs of linear layers, what GPTQ weighs rounding errors with.

Shapes: N sequences, T tokens, R rows, C columns. For a linear layer with weight W (R, C) the squared error of its outputs after a
change E of W is tr(E H E^T) per token, H = E[x x^T] (C, C). (GPTQ's paper has H = 2 X X^T; the factor changes nothing.)
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lib.artifacts.tokens import Split
from lib.data.loader import sample_sequences
from lib.model.gpt import GPT
from lib.progress import Progress


def draw_sequences(split: Split, num_sequences: int, sequence_tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two disjoint sets of training sequences, both spread over all shards: for calibration and for verification.

    Args:
        split: the training tokens.
        num_sequences: of each set.
        sequence_tokens: T.
        seed: decides which sequences.

    Returns:
        (num_sequences, T) int64 each.

    Raises:
        ValueError: the split has fewer sequences than both sets need.
    """
    sequences = sample_sequences(split, 2 * num_sequences, sequence_tokens, seed)[:, :-1]  # in the order of the split
    return sequences[::2], sequences[1::2]


def collect_hessians(model: GPT, sequences: Tensor, batch_sequences: int, device: torch.device, description: str) -> dict[str, Tensor]:
    """Mean of x x^T over all tokens for every distinct input of linear layers; products in fp32, their sum in fp64.

    Args:
        model: on `device`.
        sequences: (N, T) int64 tokens.
        batch_sequences: sequences per forward pass.
        device: where the model is.
        description: what the progress display says.

    Returns:
        name of the input, as in ``model.linear_inputs()`` -> (C, C) fp32 on the CPU, symmetric.
    """
    sums: dict[str, Tensor] = {}
    handles: list[RemovableHandle] = []
    for name, weights in model.linear_inputs().items():
        linear = model.get_submodule(weights[0].removesuffix(".weight"))
        assert isinstance(linear, nn.Linear)
        sums[name] = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64, device=device)
        handles.append(linear.register_forward_pre_hook(_accumulator(sums[name])))
    try:
        with torch.inference_mode(), Progress(description, len(sequences), "seq") as progress:
            for batch in torch.split(sequences, batch_sequences):
                model.logits(batch.to(device))
                progress.update(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return {name: (total / sequences.numel()).float().cpu() for name, total in sums.items()}


def _accumulator(total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()  # (tokens, C)
        total.add_(x.T @ x)

    return add
