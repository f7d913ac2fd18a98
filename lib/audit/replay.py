"""Replays of a real run: a fresh process scores files that are the same up to a cut and other real text after it.

All scores before the cut must be the bits of the real run. A strategy that recognises a probe, remembers an earlier strategy's text or
reads the validation text by itself does so in one of the two runs only, or on other text, and its scores differ. Where the cut is, is
drawn after the real run from a hash of its results. N targets, D documents.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lib.artifacts.metrics import load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.scores import load_nats
from lib.artifacts.tokens import Split, SplitWriter, Tokens, load_split
from lib.audit.chronology import Finding, load_ledger
from lib.audit.determinism import deterministic, judge, largest_difference
from lib.audit.isolation import confine, temporary_folder
from lib.audit.probe import same_hints
from lib.compression.container import load_artifact
from lib.distributed import Process, start_process
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Outcome, Text, make_jobs, restored
from lib.evaluation.ledger import SHARED
from lib.evaluation.limit import TimeLimit
from lib.evaluation.sheet import Losses, ScoreSheet
from lib.evaluation.strategies import STRATEGIES
from lib.model.gpt import GPT, build_model
from lib.params import parse_params

VAL, ARTIFACT = TOKENIZE_FOLDER / "val", Path("model.ptz")
NEAR_FRACTION, NEAR_CHUNKS = 0.02, 3  # of the text, and chunks: how far the quick level's cuts reach, whichever is more
QUICK_WORK = 0.12  # of the work of strategies that isolate documents, done again at the quick level
SHIFTS = 16  # tried, so that the text after a cut begins otherwise
SHARD_TOKENS = 100_000_000
IN_EVERY_DOCUMENT = "in every document"

Which = npt.NDArray[np.bool_]


class Replay(NamedTuple):
    """One repetition of a run.

    Attributes:
        names: strategies that are compared.
        others: strategies that are run besides, because those take over scores of theirs.
        first: number of the first token of each document that is replaced, (D,); N + 1 for none.
        work: fraction of a strategy's work after which it is stopped.
        kind: what the cut is at.
    """

    names: tuple[StrategyName, ...]
    others: tuple[StrategyName, ...]
    first: npt.NDArray[np.int64]
    work: float
    kind: str


Scores = dict[StrategyName, tuple[Losses, Which]]
Runner = Callable[[Tokens, Sequence[StrategyName], int, float], Scores]
"""Runs strategies on a text until the first so many targets are scored, or a fraction of the work is done: losses, which were scored."""


def plan_replays(outcomes: Mapping[StrategyName, Outcome], text: Text, params: EvaluateParams, *, thorough: bool,
                 seed_of_cuts: int = 0) -> list[Replay]:
    """Draw what is replayed from a hash of the results, so that nobody can know it beforehand.

    Strategies that isolate documents are cut in every document at once, and with a tilt, whose hints come from earlier documents, also
    somewhere in the second half of the text. For the others a cut is one place in the text: at the quick
    level two in its beginning, one at a border and one anywhere; at the thorough level before, at and after a border of each kind, and
    anywhere, all over the text.
    """
    digest = sha256(seed_of_cuts.to_bytes(8, "little"))
    for name in sorted(outcomes):
        digest.update(outcomes[name].nats.tobytes())
    generator = np.random.default_rng(int.from_bytes(digest.digest(), "little"))
    names = [name for name in STRATEGIES if name in outcomes and not STRATEGIES[name].transductive]
    isolated = tuple(name for name in names if STRATEGIES[name].isolates_documents(params))
    shared = tuple(name for name in names if name not in isolated)
    replays = []
    for _ in range(2 if thorough else 1) if isolated else ():
        chunk, work = max(STRATEGIES[name].chunk_tokens(params) for name in isolated), 1.0 if thorough else QUICK_WORK
        replays.append(Replay(isolated, (), _cut_documents(text, chunk, generator), work, IN_EVERY_DOCUMENT))
        if params.tilt is not None:
            cut = int(generator.integers(len(text.tokens) // 2, len(text.tokens)))
            replays.append(Replay(isolated, (), _cut_text(text, cut), work, "anywhere"))
    for kind, cut in _draw_cuts(shared, outcomes, text, params, generator, thorough=thorough) if shared else ():
        replays.append(Replay(shared, isolated if "phased" in shared else (), _cut_text(text, cut), 1.0, kind))
    return replays


def _cut_text(text: Text, cut: int) -> npt.NDArray[np.int64]:
    """A cut before the token of this number, for each document."""
    end = text.documents.start + text.documents.length
    return np.where(end <= cut, len(text.tokens), np.clip(cut, text.documents.start, end))


def _cut_documents(text: Text, chunk: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """A cut in every document: just before, at and after the border of a chunk, or anywhere, in turn."""
    start, length = text.documents
    anywhere = start + 1 + (generator.random(len(start)) * length).astype(np.int64)
    borders = start + chunk * (1 + (generator.random(len(start)) * np.maximum(1, length // chunk)).astype(np.int64))
    kind = generator.permutation(len(start)) % 4
    cuts = np.where(kind == 3, anywhere, borders + kind)
    return np.clip(cuts, start + 1, start + length)


def _draw_cuts(names: Sequence[StrategyName], outcomes: Mapping[StrategyName, Outcome], text: Text, params: EvaluateParams,
               generator: np.random.Generator, *, thorough: bool) -> Iterator[tuple[str, int]]:
    """Pairs (kind, number of the first other token)."""
    num_targets = len(text.tokens) - 1
    chunk = max(STRATEGIES[name].chunk_tokens(params) for name in names)
    trained = [next((event.last + 1 for event in outcomes[name].events if event.kind == "trained"), 0) for name in names]
    near = max(int(NEAR_FRACTION * num_targets), NEAR_CHUNKS * chunk, *(end + chunk for end in trained))
    end = num_targets if thorough else min(num_targets, near)
    begin = min(max(chunk, *trained) + 1, end - 1)  # else a replay shows nothing of what comes after
    borders = {"window": params.window_tokens, "stride": params.stride_tokens, "segment": params.segment_tokens, "chunk": chunk}
    places = {kind: np.arange(step, end, step) for kind, step in borders.items()}
    places["document"] = text.documents.start
    # Target n is token n + 1: a unit that ends with target b - 1 ends with token b, and what begins at target b is first seen in b + 1.
    near_by = {kind: [int(place) + offset for place in found for offset in (0, 1, 2) if begin < place + offset <= end]
               for kind, found in places.items()}
    kinds = [kind for kind in near_by if near_by[kind]]
    for kind in kinds if thorough else kinds and [str(generator.choice(kinds))]:
        drawn = generator.choice(near_by[kind])
        for offset in (0, 1, 2) if thorough else (0,):
            yield f"{kind} border", min(end, int(drawn) + offset)
    for _ in range(4 if thorough else 1):
        yield "anywhere", int(generator.integers(begin, end)) + 1


def replace_text(text: Text, first: npt.NDArray[np.int64], generator: np.random.Generator) -> Tokens:
    """The text with other real text from the given token on in each document, (D,); documents keep their places and lengths."""
    tokens, bos_id = text.tokens, int(text.tokens[0])
    number = np.arange(len(tokens))
    replaced = (number >= np.append(np.repeat(first, text.documents.length), first[-1])) & (tokens != bos_id)
    places = np.flatnonzero(tokens != bos_id)
    begins = np.searchsorted(places, np.minimum(first, places[-1]))
    body = tokens[places]
    shifts = generator.integers(1, max(2, len(body)), SHIFTS)
    shift = max(shifts.tolist(), key=lambda each: int((body[(begins + each) % len(body)] != body[begins]).sum()))
    new = tokens.copy()
    new[places] = np.roll(body, -shift)
    return np.where(replaced, new, tokens)


def check_replays(outcomes: Mapping[StrategyName, Outcome], text: Text, params: EvaluateParams, run: Runner, *, thorough: bool,
                  seed_of_cuts: int = 0) -> dict[StrategyName, Finding]:
    """Whether all scores before the cuts are the bits of the real run, by strategy; those that are declared transductive are left out.

    ``passed`` is None where a strategy trained or had chunks and no replay reached what came after, where the clock had cut its training
    short, and where differences may be the device's own noise.

    Args:
        outcomes: what the real run gave.
        text: what the real run scored.
        params: the section ``evaluate``.
        run: scores in a fresh process.
        thorough: cuts all over the text, everything scored again.
        seed_of_cuts: another one gives other cuts.
    """
    end = len(text.tokens) - 1
    found: dict[StrategyName, list[tuple[str, int, float, bool]]] = {}
    noise: dict[StrategyName, float] = {}
    for replay in plan_replays(outcomes, text, params, thorough=thorough, seed_of_cuts=seed_of_cuts):
        generator = np.random.default_rng(int(replay.first.sum()))
        isolating = STRATEGIES[replay.names[0]].isolates_documents(params)
        before = np.arange(1, end + 1) < np.repeat(replay.first, text.documents.length)  # targets' tokens
        if not isolating:
            before &= np.arange(1, end + 1) < replay.first.min()
        until = int(before.sum())
        replaced = replace_text(text, replay.first, generator)
        if replay.kind == IN_EVERY_DOCUMENT:  # hints come from other documents too
            before &= same_hints(text.tokens, replaced, params.tilt)
        scores = run(replaced, [*replay.names, *replay.others], until, replay.work)
        again: Scores = {}
        for name in replay.names:
            real, (nats, scored) = outcomes[name], scores[name]
            same = before & scored
            difference = largest_difference(nats[same], real.nats[same]) if (nats[same].tobytes() != real.nats[same].tobytes()) else 0.0
            if difference:  # how far the device repeats itself: the same text, so far
                again = again or run(text.tokens, [*replay.names, *replay.others], until, replay.work)
                repeated = same & again[name][1]
                noise[name] = max(noise.get(name, 0.0), largest_difference(again[name][0][repeated], real.nats[repeated]))
            found.setdefault(name, []).append((replay.kind, int(same.sum()), difference, _reaches(real, same, params, name)))
    return {name: _judge(each, outcomes[name], params, noise.get(name, 0.0)) for name, each in found.items()}


def _reaches(real: Outcome, same: Which, params: EvaluateParams, name: StrategyName) -> bool:
    """Whether some compared target came after training of its state, and after the first chunk, where the real run had such."""
    compared = np.flatnonzero(same)
    trained = [event for event in real.events if event.kind == "trained"]
    if trained:
        after = np.zeros(len(same), np.bool_)
        begins = {event.state: event.last + 1 for event in reversed(trained)}  # state -> what may be scored after it first changed
        for event in real.events:
            begin = min((begins[state] for state in (event.state, SHARED) if state in begins), default=len(same))
            if event.kind == "scored":
                after[max(event.first, begin):event.last + 1] = True
        return bool(same[after].any()) or not after.any()
    return len(same) <= STRATEGIES[name].chunk_tokens(params) or bool((compared >= STRATEGIES[name].chunk_tokens(params)).any())


def _judge(found: Sequence[tuple[str, int, float, bool]], real: Outcome, params: EvaluateParams, noise: float) -> Finding:
    largest = max(difference for _, _, difference, _ in found)
    figures: Finding = {"replays": len(found), "cuts": sorted({kind for kind, *_ in found}),
                      "scores_compared": sum(num for _, num, *_ in found),
                      "replays_differing": sum(difference > 0 for _, _, difference, _ in found),
                      "largest_difference": float(f"{largest:.2g}") if np.isfinite(largest) else None}
    if "epochs" in real.figures and real.figures["epochs"] < max(each.epochs for each in [params.score_first, params.phased]):
        return {"passed": None, "why": "the clock cut training short, which no replay repeats"} | figures
    passed = judge(largest, 0, lambda: noise)
    if passed is None:
        return {"passed": None, "why": "the same text gets other scores each time on this device"} | figures
    if passed and not any(reached for *_, reached in found):
        return {"passed": None, "why": "no replay reached what was scored after training, or after the first chunk"} | figures
    return {"passed": passed} | figures


class _ReachedError(Exception):
    """All that is compared has been scored."""


class _Clock(TimeLimit):
    """Limits work instead of time, so that a replay is the same on every machine."""

    def __init__(self, process: Process) -> None:
        super().__init__(float("inf"), process)
        self.start(lambda _: False)

    def start(self, is_enough: Callable[[int], bool]) -> None:
        """Stop a job as soon as what has been done `is_enough`."""
        self._is_enough, self._work = is_enough, 0

    def advance(self, work: int) -> None:
        self._work += work
        if self._is_enough(self._work):
            raise _ReachedError


def _is_enough(sheet: ScoreSheet, process: Process, end: int, most: float, done: int) -> bool:
    return done >= most or sheet.num_scored(end, process) == end


def _write_some(write: Callable[[Tensor, Tensor, Tensor], None], left: list[int], targets: Tensor, nats: Tensor, context: Tensor) -> None:
    """Write losses until there are as many as are `left` at the beginning: a batch of long documents may be most of the text."""
    write(targets, nats, context)
    left[0] -= targets.numel()
    if left[0] <= 0:
        raise _ReachedError


def score_again(model: GPT, text: Text, params: EvaluateParams, names: Sequence[StrategyName], *, until: int,
                work: float, process: Process) -> Scores:
    """Run strategies until their first `until` targets are scored, or about a fraction of their work is done; the model ends as it was."""
    clock, scores = _Clock(process), {}
    for name, job in make_jobs(model, text, params, names, process=process, limit=clock):
        most = work * STRATEGIES[name].work(text.documents, params) if work < 1 else float("inf")
        end = job.num_targets if STRATEGIES[name].isolates_documents(params) else until  # the longest documents come first
        clock.start(partial(_is_enough, job.sheet, process, end, most))
        if work < 1 and process.world_size == 1:  # several processes stop between batches, together
            job.sheet.write = partial(_write_some, job.sheet.write, [int(work * job.num_targets)])  # type: ignore[method-assign]
        with restored(model), suppress(_ReachedError):
            STRATEGIES[name].run(job)
        scores[name] = job.sheet.collect_unfinished(process)
    return scores


COMMAND = (sys.executable, "-c", "import sys\nfrom lib.audit.replay import serve\nif line := sys.stdin.readline():\n    serve(line)")


class Replayer:
    """Fresh processes, one for each process of the run, that score what they are given; a `Runner` once it is `prepared`.

    They are started before the run and before it is confined, so that they can join each other; until they are asked they load code only.
    """

    def __init__(self, process: Process, command: Sequence[str] = COMMAND) -> None:
        self._process, self._setup, self._vocab_size = process, "", 0
        folder = tempfile.mkdtemp(prefix="replay-", dir=temporary_folder()) if process.is_main else ""
        self._folder = Path(process.broadcast(folder)).resolve()
        self._port = process.broadcast(_free_port() if process.is_main and process.world_size > 1 else 0)
        code = str(Path(__file__).resolve().parents[2])
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [code, os.environ.get("PYTHONPATH")])),
                                    "TORCHELASTIC_USE_AGENT_STORE": "False"}
        if self._port:
            environment["MASTER_PORT"] = str(self._port)
        self._child = subprocess.Popen(command, cwd=self._folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       text=True)

    def prepare(self, artifact: Path, params: EvaluateParams, split: Split) -> "Replayer":
        """Tell the processes what to score with, and the real text, which they must not read."""
        self._vocab_size = split.vocab_size
        if self._process.is_main:
            (self._folder / ARTIFACT).write_bytes(artifact.read_bytes())
        forbidden = [str(path.resolve()) for path in sorted(split.folder.glob("*.bin"))]
        self._setup = json.dumps({"params": params.model_dump(mode="json"), "vocab_size": split.vocab_size,
                                  "threads": torch.get_num_threads(), "forbidden": forbidden})
        return self

    def __call__(self, tokens: Tokens, names: Sequence[StrategyName], until: int, work: float) -> Scores:
        """Score in the fresh processes; see `Runner`.

        Raises:
            RuntimeError: a process ended early; what it said is on the terminal.
        """
        if self._process.is_main:
            writer = SplitWriter(self._folder / VAL, self._vocab_size, SHARD_TOKENS)
            writer.add(tokens, 2 * len(tokens), 2 * len(tokens))
            writer.close()
        self._process.broadcast(None)
        assert self._child.stdin is not None and self._child.stdout is not None
        request = json.dumps({"names": names, "until": until, "work": work})
        for line in filter(None, (self._setup, request)):
            self._child.stdin.write(line + "\n")
        self._setup = ""
        self._child.stdin.flush()
        while (answer := self._child.stdout.readline()) != "replayed\n":
            if not answer:
                raise RuntimeError("a process that replays the run ended early; its own messages say why")
        scores: Scores = {}
        if self._process.is_main:
            with np.load(self._folder / "scores.npz") as arrays:
                scores = {name: (arrays[f"{name}.nats"], arrays[f"{name}.scored"]) for name in names}
        return self._process.broadcast(scores)

    def close(self) -> None:
        """End the processes and remove their files."""
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait()
        self._process.broadcast(None)
        if self._process.is_main:
            shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def start_replayer(process: Process, command: Sequence[str] = COMMAND, *, enabled: bool = True) -> Iterator[Replayer | None]:
    """A replayer for the time of the context; none where it is not `enabled`."""
    if not enabled:
        yield None
        return
    replayer = Replayer(process, command)
    try:
        yield replayer
    finally:
        replayer.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(line: str) -> None:
    """What a fresh process does: `line` says with what it scores, each line of the standard input what; answers ``replayed``."""
    setup = json.loads(line)
    params = parse_params(setup["params"], EvaluateParams, "evaluate.")
    with start_process() as process:
        torch.set_num_threads(setup["threads"])
        confine(read=[Path.cwd()], write=[Path.cwd()], forbidden=list(map(Path, setup["forbidden"])), network=process.world_size > 1)
        artifact = load_artifact(ARTIFACT)
        model = build_model(artifact.model, artifact.weights()).to(process.device)
        with deterministic(model, params.precision, process):
            for request in map(json.loads, sys.stdin):
                tokens = load_split(VAL, setup["vocab_size"]).tokens()
                text = Text.of(tokens, np.zeros(len(tokens) - 1, np.int64), int(tokens[0]))
                scores = score_again(model, text, params, request["names"], until=request["until"],
                                     work=request["work"], process=process)
                if process.is_main:
                    arrays: dict[str, Any] = {f"{name}.nats": nats for name, (nats, _) in scores.items()}
                    arrays |= {f"{name}.scored": scored for name, (_, scored) in scores.items()}
                    np.savez("scores.npz", **arrays)
                print("replayed", flush=True)


def load_outcome(folder: Path, name: StrategyName) -> Outcome:
    """What evaluate left of a strategy's run in its output `folder`, as far as the audit needs it.

    Raises:
        ArtifactError: a file is missing or damaged.
    """
    metrics, nats = load_metrics(folder), load_nats(folder, name)
    figures = {"epochs": metrics[f"{name}_epochs"]} if f"{name}_epochs" in metrics else {}
    return Outcome(nats, np.zeros(len(nats), np.int32), load_ledger(folder, name), figures, {}, None)
