"""The quantized model against the float one on held-out training documents: what quantization is judged by.

Shapes: N windows, T tokens of a window, V vocabulary.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from lib.artifacts.tokens import Split
from lib.data.tokenizer import Tokenizer
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.bpb import make_score
from lib.model.gpt import GPT
from lib.progress import Progress


class Comparison(NamedTuple):
    """Figures over the same held-out targets.

    Attributes:
        kl: mean Kullback-Leibler divergence of the quantized model's next-token distribution from the float model's, nats per token.
        loss_increase: of the quantized model, nats per token.
        bpb: of the quantized model, bits per byte.
        bpb_float: of the float model.
        num_tokens: targets.
    """

    kl: float
    loss_increase: float
    bpb: float
    bpb_float: float
    num_tokens: int

    def metrics(self) -> dict[str, float]:
        """Figures for ``metrics.json``."""
        return {"heldout_bpb": round(self.bpb, 8), "heldout_bpb_float": round(self.bpb_float, 8), "heldout_kl": round(self.kl, 8),
                "heldout_loss_increase": round(self.loss_increase, 8), "heldout_tokens": self.num_tokens}


@torch.inference_mode()
def compare_heldout(model: GPT, reference: GPT, split: Split, tokenizer: Tokenizer, *, window_tokens: int, max_tokens: int,
                    batch_windows: int, process: Process) -> Comparison:
    """Compare two models in fp32, in windows side by side that are evenly spread over a split.

    Args:
        model: the quantized one, on the process's device.
        reference: the float one, on the same device.
        split: held-out documents.
        tokenizer: that the split was made with.
        window_tokens: T.
        max_tokens: of all windows together, but at least one window.
        batch_windows: windows in one forward pass.
        process: which share of the windows is computed here; every process gets the result.

    Raises:
        ValueError: the split has no window of T + 1 tokens.
    """
    tokens = split.tokens()
    available = (len(tokens) - 1) // window_tokens
    if available < 1:
        raise UserError(f"{split.folder}: expected at least {window_tokens + 1} held-out tokens, found {len(tokens)}; "
                        "raise tokenize.heldout_fraction or enlarge the corpus")
    num_windows = min(available, max(1, max_tokens // window_tokens))
    starts = np.arange(num_windows) * available // num_windows * window_tokens
    rows = torch.from_numpy(np.stack([tokens[start:start + window_tokens + 1] for start in starts]).astype(np.int64))  # (N, T+1)
    nats = torch.zeros(2, num_windows, window_tokens, device=process.device)  # of the quantized and of the float model
    divergence = torch.zeros((), dtype=torch.float64, device=process.device)
    mine = torch.arange(process.rank, num_windows, process.world_size)
    with Progress("held-out", len(mine), " windows", enabled=process.is_main) as progress:
        for indices in torch.split(mine, batch_windows):
            batch = rows[indices].to(process.device)
            ours, theirs = (each.logits(batch[:, :-1]).log_softmax(-1) for each in (model, reference))  # (B, T, V)
            divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True)
            for index, log_probabilities in enumerate((ours, theirs)):
                nats[index, indices.to(process.device)] = -log_probabilities.gather(2, batch[:, 1:, None])[..., 0]
            progress.update(len(indices))
    target_bytes = np.concatenate([tokenizer.target_bytes(row) for row in rows.numpy().astype(tokens.dtype)])
    quantized, original = (make_score(each.flatten().numpy(), target_bytes) for each in process.sum(nats).cpu())
    kl = float(process.sum(divergence)) / quantized.num_tokens
    return Comparison(kl, quantized.loss - original.loss, quantized.bpb, original.bpb, quantized.num_tokens)
