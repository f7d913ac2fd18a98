"""The values from which a model is trained."""

import math

import torch
from torch import nn

from lib.model.gpt import GPT

VALUE_TABLE_STD = 0.01  # pr585, pr410
INITIAL: dict[str, float | list[list[float]]] = {
    "bigram.table.weight": 0, "bigram.scale": 0.05, "smear_gate.gate": 0, "smear_gate.weight": 0, "smear_gate.factor": 0,
    "value_embedding.projection.weight": 0, "value_embedding.scale": 0.1, "value_embedding.layer_scales": 1, "attention.output.weight": 0,
    "attention.gate": 0, "mlp.down.weight": 0, "attention_scale": 1, "mlp_scale": 1, "residual_mix": [[1], [0]], "lane_residual": 1.1,
    "lane_outputs": 1, "skip_weights": 1, "skip_gates": 0, "head.weight": 0}
"""Initial values of what does not begin at random; of parameters of blocks by their names within one."""


@torch.no_grad()
def initialize(model: GPT, seed: int) -> None:
    """Set all parameters as pr585, pr410 and #1855 do, on the CPU generator, so that a seed means the same on every device.

    Matrices are orthogonal; the outputs of attention and MLP start at zero, so that each block starts as the identity.
    The scripts meant the projections of the bigram and value embeddings to start at zero, but a later pass overwrote them
    with scaled orthogonal ones. Zero is restored for the value embedding; the bigram projection must stay non-zero because
    its table starts at zero, and a product of two zeros has no gradient.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            weight = torch.empty(module.weight.shape)
            nn.init.orthogonal_(weight, generator=generator)
            module.weight.copy_(weight)
    embedding = model.token_embedding.weight
    embedding.copy_(torch.randn(embedding.shape, generator=generator) * model.params.embedding_init_std)
    if model.bigram is not None:
        model.bigram.projection.weight.mul_(1 / math.sqrt(2 * model.params.num_layers))
    if model.value_embedding is not None:
        table = model.value_embedding.table.weight
        table.copy_(torch.randn(table.shape, generator=generator) * VALUE_TABLE_STD)
    for name, parameter in model.named_parameters():
        if (value := INITIAL.get(name.split(".", 2)[-1] if name.startswith("blocks.") else name)) is not None:
            parameter.copy_(torch.tensor(value))
        elif name.endswith("q_gain"):
            parameter.fill_(model.params.q_gain_init)
