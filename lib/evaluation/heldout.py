"""Bits per byte on the held-out training documents: what models are chosen by, and what quantization is judged by."""

from torch import nn

from lib.artifacts.tokens import Split
from lib.data.tokenizer import Tokenizer
from lib.distributed import Process
from lib.evaluation.bpb import Score, make_score
from lib.evaluation.score import score_plain
from lib.params import Precision


def score_heldout(model: nn.Module, split: Split, tokenizer: Tokenizer, *, window_tokens: int, batch_windows: int, precision: Precision,
                  process: Process) -> Score:
    """Score a split in windows side by side; every process gets the result.

    Args:
        model: called as `GPT.forward`, on the process's device.
        split: held-out documents.
        tokenizer: that the split was made with.
        window_tokens: inputs that the model sees at once.
        batch_windows: windows in one forward pass.
        precision: of the matrix products.
        process: which share of the windows is computed here.
    """
    tokens = split.tokens()
    nats = score_plain(model, tokens, window_tokens=window_tokens, batch_tokens=batch_windows * window_tokens, precision=precision,
                       process=process)
    return make_score(nats, tokenizer.target_bytes(tokens))
