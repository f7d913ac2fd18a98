"""A whole training run: from the text to the checkpoint that is handed on, with its figures."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lib.artifacts.checkpoint import Checkpoint, TrainedGrid, Training
from lib.artifacts.tokens import Split
from lib.data.loader import Batches, Loader
from lib.data.sequential import SequentialLoader
from lib.data.tokenizer import Tokenizer
from lib.distributed import Process
from lib.evaluation.bpb import Score
from lib.evaluation.heldout import score_heldout
from lib.model.config import ModelSection
from lib.model.gpt import GPT
from lib.model.initialization import initialize
from lib.model.kernels import choose_kernel
from lib.progress import say
from lib.training.config import TrainParams
from lib.training.loop import Stage, train
from lib.training.selection import score_candidates, select

Watch = Callable[[GPT], Callable[[], Mapping[str, str]]]


class Trained(NamedTuple):
    """What training leaves.

    Attributes:
        checkpoint: the selected weights.
        loss_curve: (tokens seen, mean loss in nats per token) rows.
        heldout_curve: (tokens seen, held-out loss in nats per token, held-out bits per byte) rows; none without ``train.heldout_curve``.
        metrics: figures that depend on the inputs alone.
        timing: what a clock measured.
    """

    checkpoint: Checkpoint
    loss_curve: list[tuple[int, float]]
    heldout_curve: list[tuple[int, float, float]]
    metrics: dict[str, Any]
    timing: dict[str, float]


def make_loader(params: TrainParams, text: Split, bos_id: int, seed: int) -> Batches:
    """The batches of `text` in the order that the section ``train`` names.

    Raises:
        UserError: too few tokens for one batch.
    """
    if params.data_order == "sequential":
        return SequentialLoader(text, params.tokens_per_row, params.batch_sequences, bos_id)
    return Loader(text, params.tokens_per_row, params.batch_sequences, seed)


def train_checkpoint(section: ModelSection, params: TrainParams, text: Split, heldout: Split, tokenizer: Tokenizer, *, seed: int,
                     process: Process, resume_path: Path, watch: Watch) -> Trained:
    """Train a model from its initialisation, or from where an interrupted run was, and choose among its weights.

    Args:
        section: the section ``model``.
        params: the section ``train``.
        text: the training tokens.
        heldout: held-out documents, by which the weights are chosen.
        tokenizer: the one that the tokens were made with.
        seed: seed of initialisation and data order.
        process: every process calls this and gets the whole result.
        resume_path: where the state of the run is kept; it stays until the caller has saved the result.
        watch: makes, from the model, what gives further figures for the progress line.

    Raises:
        SystemExit: interrupted.
        UserError: as `lib.training.loop.train`, or a kernel, a batch or a selection that is not possible here.
    """
    kernel = choose_kernel(section.attention, section.architecture, params.precision, process.device)
    say(f"train: attention by {kernel.reason}", enabled=process.is_main)
    model = GPT(section.architecture, kernel).to(process.device)
    initialize(model, seed)
    loader = make_loader(params, text, tokenizer.bos_id, seed)

    def score(stage: Stage, max_tokens: int | None = None) -> Score:
        window_tokens = stage.part_tokens or params.sequence_tokens
        batch_windows = params.micro_batch_sequences * params.tokens_per_row // window_tokens
        return score_heldout(model, tokens, tokenizer, window_tokens=window_tokens, batch_windows=batch_windows,
                             precision=params.precision, process=process, looped=stage.is_looped, max_tokens=max_tokens)

    tokens, curve = heldout.tokens(), params.heldout_curve
    result = train(model, params, loader, process, resume_path, status=watch(model),
                   measure=partial(score, max_tokens=curve.tokens) if curve else None)
    scores = score_candidates(model, result.candidates, lambda: score(Stage(is_looped=True, part_tokens=None)))
    selected = select(scores, params.averaging.select)
    checkpoint = Checkpoint(
        {name: weight.cpu() for name, weight in result.candidates[selected].items()}, section.architecture.model_dump(mode="json"),
        Training(sequence_tokens=params.sequence_tokens, num_steps=len(result.losses), selected=selected,
                 qat=TrainedGrid(**params.qat.model_dump()) if params.qat.below_lr else None,
                 calibration_seconds=params.reserve_seconds, distillation_seconds=params.reserve_distill_seconds))
    return Trained(checkpoint, result.loss_curve, result.heldout_curve, {
        "heldout_bpb": round(scores[selected].bpb, 8), "heldout_loss": round(scores[selected].loss, 8), "selected": selected,
        **{f"heldout_bpb_{kind}": round(score.bpb, 8) for kind, score in scores.items()}, "num_parameters": model.num_parameters,
        "num_tokens": result.num_tokens, "num_steps": len(result.losses), "budget_steps": result.plan, "attention": kernel.name,
    }, {"seconds": result.seconds, "tokens_per_second": result.num_tokens / result.seconds})
