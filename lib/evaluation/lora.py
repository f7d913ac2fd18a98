"""Low-rank adapters (LoRA, arXiv:2106.09685) of single documents: a chunk is scored, then the document's adapter is trained on it.

Every document starts with a fresh adapter and sees no other document, so that documents can be scored in any order and many
at a time (pr410-lora). With a warm start (#1855) A is handed down a chain, from each document to the one `warm_start` documents after it.
There are `warm_start` chains; a process keeps some of them, so that scores depend neither on batches nor on the number of processes.
Shapes: B documents of a batch, T inputs of a window, P targets of a chunk, R rank.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib.errors import UserError
from lib.evaluation.adapter import BACKWARD_WORK, frozen
from lib.evaluation.config import LoraParams
from lib.evaluation.job import Job
from lib.evaluation.score import mode
from lib.evaluation.windows import Documents, Integers
from lib.model.gpt import GPT
from lib.model.linear import LowRank
from lib.model.parts import parts_of

INIT_SEED = 0
BESIDE = ("attention", "mlp")  # what has adapters from its input to its output, beside all that is in it
SHAPES = 4  # of compiled windows


def adapted_layers(model: GPT, layers: tuple[str, ...]) -> dict[str, list[tuple[int, int]]]:
    """Numbers of inputs and outputs of the adapters of some layers, by name: of one for each pass of a block, or of the head.

    Raises:
        ValueError: a kind of layer that the model has not.
    """
    width = model.params.model_dim
    shapes = {name.rpartition(".")[2]: model.get_parameter(part.name).shape
              for part in parts_of(model).values() if part.is_matrix for name in part.modules}
    shapes |= dict.fromkeys(BESIDE, torch.Size((width, width)))
    for layer in layers:
        if layer not in shapes:
            raise UserError(f"evaluate.lora.layers: {layer}: the model has no such layer")
    num_passes = len(model.params.layer_order())
    return {layer: [(shapes[layer][1], shapes[layer][0])] * (1 if layer == "head" else num_passes) for layer in layers}


class LowRankAdapters:
    """An adapter for each document of a batch: alpha / rank B A x is added, with A uniform in +-1/sqrt(inputs) and B zero at first.

    A starts with the same values for every document and run, so that scores do not depend on how documents are batched, or with those that
    were kept for its chain.

    Args:
        model: the model whose layers have the adapters while they are `attached`.
        settings: the section ``evaluate.lora``.
        device: where they are.
        num_chains: how many values of A are kept.
    """

    def __init__(self, model: GPT, settings: LoraParams, device: torch.device, num_chains: int = 0) -> None:
        generator = torch.Generator().manual_seed(INIT_SEED)
        factor = 1.0 if settings.alpha is None else settings.alpha / settings.rank
        self._model, self._initial, self._kept = model, list[Tensor](), list[Tensor]()
        self._adapters: dict[str, list[LowRank]] = {layer: [] for layer in settings.layers}
        for layer, shapes in adapted_layers(model, settings.layers).items():
            for num_inputs, num_outputs in shapes:
                initial = (2 * torch.rand(settings.rank, num_inputs, generator=generator) - 1) / math.sqrt(num_inputs)
                self._initial.append(initial.to(device))
                self._kept.append(initial.expand(num_chains, -1, -1).to(device, copy=True))
                self._adapters[layer].append(LowRank(
                    nn.Parameter(initial.expand(settings.batch_documents, -1, -1).to(device, copy=True)),
                    nn.Parameter(torch.zeros(settings.batch_documents, num_outputs, settings.rank, device=device)), factor))
        self._all = [adapter for of_layer in self._adapters.values() for adapter in of_layer]
        self.parameters = [parameter for a, b, _ in self._all for parameter in (a, b)]

    @property
    def num_parameters(self) -> int:
        """Number of parameters of one document's adapter."""
        return sum(parameter[0].numel() for parameter in self.parameters)

    @torch.no_grad()
    def reset(self, chains: Tensor | None) -> None:
        """Make all adapters as new; the first ones have the A of these chains."""
        for initial, kept, (a, b, _) in zip(self._initial, self._kept, self._all, strict=True):
            a.copy_(initial.expand_as(a))
            b.zero_()
            if chains is not None:
                a[: len(chains)] = kept[chains]

    @torch.no_grad()
    def keep(self, chains: Tensor, rows: slice) -> None:
        """Keep the A of some adapters for their chains."""
        for kept, (a, *_) in zip(self._kept, self._all, strict=True):
            kept[chains[rows]] = a[rows]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Row n of what the model computes uses adapter n."""
        self._model.adapters.update(self._adapters)
        try:
            yield
        finally:
            self._model.adapters.clear()


class DocumentScorer:
    """Scores documents, each with an adapter of its own, into the job's sheet; each process takes its share of the batches.

    Args:
        job: the job.
        documents: its documents in the order in which they are scored.

    Raises:
        ValueError: a kind of layer that the model has not.
    """

    def __init__(self, job: Job, documents: Documents) -> None:
        self._job, self._documents, self._settings = job, documents, job.params.lora
        model = job.forward.model
        assert isinstance(model, GPT)
        num_chains = -(-(self._settings.warm_start or 0) // job.process.world_size)
        self._adapters = LowRankAdapters(model, self._settings, job.stream.device, num_chains)
        self._longest_alike = model.params.rope_trained_tokens or math.inf

    def score(self, which: Integers) -> None:
        """Score the documents with these numbers, in the order of scoring; they follow each other and those of the last call."""
        documents, process = self._documents, self._job.process
        first_event = len(self._job.sheet.ledger.events)
        with mode(self._job.forward.model, training=False), frozen(list(self._job.forward.model.parameters())), self._adapters.attached():
            for of_round in self._rounds(which):
                if len(own := of_round[process.rank]):
                    self._score_batch(own)
                self._job.limit.advance(sum(document_work(documents.select(batch), self._settings) for batch in of_round))
        self._job.sheet.ledger.synchronize(process, first_event)

    def _rounds(self, which: Integers) -> Iterator[list[Integers]]:
        """What each process scores at the same time as the others: batches of similar length, the longest documents first.

        Only of documents that hand their A to each other an earlier one comes first, in the same process.
        """
        size, num_processes, period = self._settings.batch_documents, self._job.process.world_size, self._settings.warm_start
        for first in range(0, len(which), period or len(which)):
            group = which[first:first + (period or len(which))]
            group = group[np.argsort(-self._documents.length[group], kind="stable")]
            place = np.arange(len(group)) // size if period is None else group % period
            shares = [group[place % num_processes == rank] for rank in range(num_processes)]
            for begin in range(0, max(map(len, shares)), size):
                yield [share[begin:begin + size] for share in shares]

    def _score_batch(self, numbers: Integers) -> None:
        settings, ledger, period = self._settings, self._job.sheet.ledger, self._settings.warm_start
        states = (numbers if period is None else numbers % period).tolist()
        chains = None if period is None else torch.from_numpy(numbers % period // self._job.process.world_size).to(self._job.stream.device)
        documents = self._documents.select(numbers)
        starts, lengths = (torch.from_numpy(array).to(self._job.stream.device)[:, None] for array in documents)  # (B, 1)
        self._adapters.reset(chains)
        optimizer = torch.optim.AdamW(self._adapters.parameters, lr=settings.lr, betas=settings.adam_betas, eps=settings.adam_eps,
                                      weight_decay=settings.weight_decay)
        for first in range(0, int(documents.length[0]), settings.chunk_tokens):
            end = first + settings.chunk_tokens
            active = documents.select(documents.length > first)
            num_trained = int((documents.length > end).sum())  # the last chunk of a document is not trained on
            start = max(0, end - settings.window_tokens)
            scored = slice(first - start, end - start)
            rows, targets = self._gather(starts[: len(active.start)], lengths[: len(active.start)], start, scored)
            with torch.set_grad_enabled(num_trained > 0 or self._job.forward.compiled):  # one graph for both
                nats = self._forward(rows, scored, hints := self._job.sheet.hints(targets))  # (B, P), or (2, B, P)
            self._job.sheet.write(targets, nats.detach(), torch.arange(first - start, end - start, device=rows.device))
            nats = nats if hints is None else nats[0]
            for state, begin, length in zip(states, active.start.tolist(), active.length.tolist(), strict=False):
                ledger.scored(begin + first, begin + min(end, length) - 1, state)
            self._write_distribution(active, rows, start, first, end)
            for step in range(settings.steps if num_trained else 0):
                if step:
                    nats = self._forward(rows[:num_trained], scored)
                optimizer.zero_grad()
                nats[:num_trained].mean(1).sum().backward()
                optimizer.step()
            for state, begin in zip(states[:num_trained], active.start.tolist(), strict=False):
                ledger.trained(begin + first, begin + end - 1, settings.steps, settings.lr, state)
            if chains is not None:  # of documents that will not be trained again; the optimizer goes on moving them
                self._adapters.keep(chains, slice(int((documents.length > end + settings.chunk_tokens).sum()), num_trained))

    def _forward(self, rows: Tensor, scored: slice, hints: Tensor | None = None) -> Tensor:
        """Losses (B, P) of the `scored` positions of rows (B, T+1) that end with them; (2, B, P), of `hints` (B, P) too, where there are.

        Where the model is compiled, rows and positions are filled up to one of few shapes, so that each is compiled once: a quarter of
        the documents or all, about a quarter of the window, a half, three quarters or all.
        """
        settings = self._settings
        if not self._job.forward.compiled:
            return self._job.forward(rows, scored, hints=hints)
        step = settings.chunk_tokens * -(-settings.window_tokens // (SHAPES * settings.chunk_tokens))
        first, last = scored.start // step * step, min(-(-scored.stop // step) * step, settings.window_tokens)
        if last > self._longest_alike:  # in a longer window positions would be rotated otherwise
            first, last = scored.start, scored.stop
        few = -(-settings.batch_documents // SHAPES)
        num_rows = few if len(rows) <= few else settings.batch_documents
        filled = F.pad(rows, (0, last - scored.stop, 0, num_rows - len(rows)))
        if hints is not None:
            hints = F.pad(hints, (scored.start - first, last - scored.stop, 0, num_rows - len(rows)))
        nats = self._job.forward(filled, slice(first, last), hints=hints, repeats=True)
        return nats[..., : len(rows), scored.start - first : scored.stop - first]

    def _gather(self, begin: Tensor, length: Tensor, start: int, scored: slice) -> tuple[Tensor, Tensor]:
        """Rows (B, T+1) of tokens from `start` of each document on, which end with a chunk, and the targets (B, P) of the chunk.

        After the end of a document tokens are 0 and targets are N, which belongs to nothing.
        """
        num_targets = self._job.num_targets
        place = start + torch.arange(scored.stop + 1, device=begin.device)  # (T+1,)
        rows = self._job.stream[(begin + place).clamp(max=num_targets)].long().where(place <= length, 0)  # (B, T+1)
        inputs = place[:-1][scored]  # (P,)
        return rows, (begin + inputs).where(inputs < length, num_targets)

    def _write_distribution(self, documents: Documents, rows: Tensor, start: int, first: int, end: int) -> None:
        if (wanted := self._job.sheet.wanted) is None:
            return
        for row in np.flatnonzero((documents.start <= wanted) & (wanted < documents.start + documents.length)).tolist():
            if first <= (position := wanted - int(documents.start[row])) < end:
                with torch.no_grad():
                    self._job.sheet.write_distribution(self._job.forward.log_probabilities(rows, position - start)[row])


def document_work(documents: Documents, settings: LoraParams) -> int:
    """Cost of scoring documents, in inputs scored."""
    work = 0
    for first in range(0, int(documents.length.max(initial=0)), settings.chunk_tokens):
        end = first + settings.chunk_tokens
        inputs = end - max(0, end - settings.window_tokens)
        num_trained = int((documents.length > end).sum())
        num_active = int((documents.length > first).sum())
        work += inputs * (num_active + num_trained * ((1 + BACKWARD_WORK) * settings.steps - 1))
    return work
