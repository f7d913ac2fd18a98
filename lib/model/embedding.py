"""What a token contributes before the first block: hashed bigrams, the smear gate and the shared value embedding.

Shapes: B batch, T tokens, D model, K*E key/value width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.model.config import GATE_DIMS, ModelParams
from lib.model.linear import Linear

HASH_CURRENT, HASH_PREVIOUS = 36313, 27191  # pr585, pr410


def bigram_rows(tokens: Tensor, starts: Tensor | None, num_rows: int) -> Tensor:
    """Row of the bigram table for each position: a hash of the token and its predecessor; the first position has the last row.

    Args:
        tokens: (B, T) int64.
        starts: (B, T) bool, which positions count as the first; None for position 0 alone.
        num_rows: rows of the table.

    Returns:
        (B, T) int64 in 0 .. `num_rows` - 1.
    """
    hashed = torch.bitwise_xor(HASH_CURRENT * tokens[:, 1:], HASH_PREVIOUS * tokens[:, :-1]) % (num_rows - 1)
    rows = torch.cat((torch.full_like(tokens[:, :1], num_rows - 1), hashed), dim=1)
    return rows if starts is None else rows.masked_fill(starts, num_rows - 1)


class BigramHash(nn.Module):
    """Embedding of hashed token pairs, projected to the model width and scaled."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.table = nn.Embedding(params.bigram_rows, params.bigram_dim)
        self.projection = Linear(params.bigram_dim, params.model_dim)
        self.scale = nn.Parameter(torch.empty(()))

    def forward(self, tokens: Tensor, starts: Tensor | None) -> Tensor:
        """(B, T) int64, and `starts` as `bigram_rows` takes it -> (B, T, D)."""
        return self.projection(self.table(bigram_rows(tokens, starts, self.table.num_embeddings))) * self.scale


class SmearGate(nn.Module):
    """x_t <- (1 - g) x_t + g x_{t-1} with one learned gate g = sigmoid(w) per channel; the first position keeps (1 - g) x_0."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(params.model_dim))

    def forward(self, x: Tensor, starts: Tensor | None) -> Tensor:
        """(B, T, D), and (B, T) bool, which positions count as the first (None for position 0 alone) -> (B, T, D)."""
        gate = torch.sigmoid(self.gate).to(x.dtype)
        previous = torch.cat((torch.zeros_like(x[:, :1]), x[:, :-1]), dim=1)
        if starts is not None:
            previous = previous.masked_fill(starts[..., None], 0)
        return torch.lerp(x, previous, gate)


class TokenSmearGate(nn.Module):
    """x_t <- x_t + g x_{t-1} with one gate g = factor * sigmoid(w . x_t) for each token, which reads its first dimensions; 0 at a start
    (#1855)."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(min(GATE_DIMS, params.model_dim)))
        self.factor = nn.Parameter(torch.empty(()))

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """(B, T, D), and (B, T) bool, where nothing is added, position 0 among them -> (B, T, D)."""
        gate = (self.factor * torch.sigmoid(x[..., :GATE_DIMS] @ self.weight)).masked_fill(starts, 0)
        return x + gate[..., None].to(x.dtype) * F.pad(x[:, :-1], (0, 0, 1, 0))


class ValueEmbedding(nn.Module):
    """One token table whose projection is added to the values of several layers, each with its own learned factor."""

    def __init__(self, params: ModelParams) -> None:
        super().__init__()
        self.layers = params.value_embedding_layers
        self.table = nn.Embedding(params.vocab_size, params.value_embedding_dim)
        self.projection = Linear(params.value_embedding_dim, params.kv_dim)
        self.scale = nn.Parameter(torch.empty(()))
        self.layer_scales = nn.Parameter(torch.empty(len(self.layers)))

    def forward(self, tokens: Tensor) -> dict[int, Tensor]:
        """(B, T) int64 -> layer -> (B, T, K*E)."""
        values = self.projection(self.table(tokens)) * self.scale
        return {layer: values * self.layer_scales[n] for n, layer in enumerate(self.layers)}
