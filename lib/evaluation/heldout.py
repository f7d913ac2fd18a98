"""Held-out training documents, in windows side by side: what models are chosen by, and what quantization is judged by.

Shapes: N windows, T tokens of a window, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.artifacts.tokens import Split, Tokens
from lib.data.tokenizer import Tokenizer
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.bpb import Score, make_score
from lib.params import Precision
from lib.progress import Progress

Logits = Callable[[Tensor], Tensor]


class HeldoutComparison(NamedTuple):
    """Figures over the same held-out targets.

    Attributes:
        kl: mean Kullback-Leibler divergence of the quantized model's next-token distribution from the float model's, nats per token.
        loss_increase: by how much the quantized model's loss is higher, nats per token.
        bpb: bits per byte of the quantized model.
        bpb_float: bits per byte of the float model.
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


def score_heldout(model: nn.Module, tokens: Tokens, tokenizer: Tokenizer, *, window_tokens: int, batch_windows: int, precision: Precision,
                  process: Process, looped: bool = True, max_tokens: int | None = None) -> Score:
    """Score a stream, or windows that are evenly spread over it, with one model; every process gets the result.

    Args:
        model: called as `GPT.forward`, on the process's device.
        tokens: (n+1,) uint16, held-out documents.
        tokenizer: the one that they were made with.
        window_tokens: inputs that the model sees at once.
        batch_windows: windows in one forward pass.
        precision: precision of the matrix products.
        process: says which share of the windows is computed here.
        looped: argument of `GPT.forward`.
        max_tokens: most tokens of all windows together, but at least one window; None for the whole stream.
    """
    if max_tokens is None or len(tokens) - 1 <= max(max_tokens, window_tokens):
        nats = window_losses(model, tokens, window_tokens=window_tokens, batch_windows=batch_windows, precision=precision, process=process,
                             looped=looped)
        return make_score(nats, tokenizer.target_bytes(tokens))
    rows = spread_windows(tokens, window_tokens, max_tokens)
    batches = torch.split(torch.from_numpy(rows.astype(np.int64)), max(1, min(batch_windows, -(-len(rows) // process.world_size))))
    nats = _batch_losses(model, batches, precision, process, looped=looped)
    return make_score(nats, np.concatenate([tokenizer.target_bytes(row) for row in rows]))


def spread_windows(tokens: Tokens, window_tokens: int, max_tokens: int) -> Tokens:
    """Windows (N, T+1) of a stream, side by side or evenly apart; at most `max_tokens` inputs together, but at least one window."""
    available = (len(tokens) - 1) // window_tokens
    num_windows = min(available, max(1, max_tokens // window_tokens))
    starts = np.arange(num_windows) * available // num_windows * window_tokens
    return np.stack([tokens[start:start + window_tokens + 1] for start in starts])


def window_losses(model: nn.Module, tokens: Tokens, *, window_tokens: int, batch_windows: int, precision: Precision, process: Process,
                  looped: bool = True) -> npt.NDArray[np.float32]:
    """Loss of every target of a stream in windows side by side, the last of which may be shorter; the model is in evaluation mode.

    Args:
        model: called as `GPT.forward`, on the process's device.
        tokens: (n+1,) uint16.
        window_tokens: inputs that the model sees at once.
        batch_windows: windows in one forward pass.
        precision: precision of the matrix products.
        process: says which share of the windows is computed here; every process gets the whole result.
        looped: argument of `GPT.forward`.

    Returns:
        (n,) fp32 nats.

    Raises:
        UserError: fewer than two tokens.
    """
    num_targets = len(tokens) - 1
    if num_targets < 1:
        raise UserError(f"expected at least one target to score, found {len(tokens)} tokens")
    stream = torch.from_numpy(tokens.astype(np.int64))
    num_full = num_targets // window_tokens
    rows = stream[:num_full * window_tokens + 1].unfold(0, window_tokens + 1, window_tokens) if num_full else stream[:0, None]  # (N, T+1)
    share = max(1, min(batch_windows, -(-num_full // process.world_size)))  # so that each process gets some
    batches = [batch for batch in (*torch.split(rows, share), stream[num_full * window_tokens:][None]) if batch.numel() > len(batch)]
    return _batch_losses(model, batches, precision, process, looped=looped)


@torch.inference_mode()
def _batch_losses(model: nn.Module, batches: Sequence[Tensor], precision: Precision, process: Process, *,
                  looped: bool) -> npt.NDArray[np.float32]:
    """Losses of all targets of batches (N, T+1), one after the other."""
    num_targets = sum(batch[:, 1:].numel() for batch in batches)
    nats, done, was_training = torch.zeros(num_targets, device=process.device), 0, model.training
    model.eval()
    try:
        for number, batch in enumerate(batches):
            num_losses = batch[:, 1:].numel()
            if number % process.world_size == process.rank:
                on_device = batch.to(process.device)
                with torch.autocast(process.device.type, torch.bfloat16, enabled=precision == "bf16"):
                    nats[done:done + num_losses] = model(on_device[:, :-1], on_device[:, 1:], looped=looped).flatten()
            done += num_losses
    finally:
        model.train(was_training)
    return process.sum(nats).cpu().numpy()


@torch.inference_mode()
def compare_heldout(model: Logits, reference: Logits, split: Split, tokenizer: Tokenizer, *, window_tokens: int, max_tokens: int,
                    batch_windows: int, process: Process) -> HeldoutComparison:
    """Compare two models in fp32, in windows side by side that are evenly spread over a split.

    Args:
        model: tokens (B, T) -> logits (B, T, V) of the quantized model, on the process's device.
        reference: the same of the float model.
        split: held-out documents.
        tokenizer: the one that the split was made with.
        window_tokens: T.
        max_tokens: most tokens of all windows together, but at least one window.
        batch_windows: windows in one forward pass.
        process: says which share of the windows is computed here; every process gets the result.

    Raises:
        UserError: the split has no window of T + 1 tokens.
    """
    tokens = split.tokens()
    if len(tokens) <= window_tokens:
        raise UserError(f"{split.folder}: expected at least {window_tokens + 1} held-out tokens, found {len(tokens)}; "
                        "raise tokenize.heldout_fraction or enlarge the corpus")
    rows = torch.from_numpy(spread_windows(tokens, window_tokens, max_tokens).astype(np.int64))  # (N, T+1)
    num_windows = len(rows)
    nats = torch.zeros(2, num_windows, window_tokens, device=process.device)  # of the quantized and of the float model
    divergence = torch.zeros((), dtype=torch.float64, device=process.device)
    mine = torch.arange(process.rank, num_windows, process.world_size)
    with Progress("held-out", len(mine), " windows", enabled=process.is_main) as progress:
        for indices in torch.split(mine, batch_windows):
            batch = rows[indices].to(process.device)
            ours, theirs = (each(batch[:, :-1]).log_softmax(-1) for each in (model, reference))  # (B, T, V)
            divergence += F.kl_div(ours, theirs, reduction="sum", log_target=True)
            for index, log_probabilities in enumerate((ours, theirs)):
                nats[index, indices.to(process.device)] = -log_probabilities.gather(2, batch[:, 1:, None])[..., 0]
            progress.update(len(indices))
    target_bytes = np.concatenate([tokenizer.target_bytes(row) for row in rows.numpy().astype(tokens.dtype)])
    quantized, original = (make_score(each.flatten().numpy(), target_bytes) for each in process.sum(nats).cpu())
    kl = float(process.sum(divergence)) / quantized.num_tokens
    return HeldoutComparison(kl, quantized.loss - original.loss, quantized.bpb, original.bpb, quantized.num_tokens)
