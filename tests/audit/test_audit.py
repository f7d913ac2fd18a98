"""Leaks that are planted are found, by the condition that they violate; what is legal passes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lib.artifacts.files import read_json, write_bytes, write_json
from lib.artifacts.tokens import SplitWriter, load_split
from lib.audit.chronology import Finding, check_score_before_update, check_single_pass
from lib.audit.probe import geometry, make_probe
from lib.audit.provenance import MANIFEST, PIPELINE, check_data, check_readers
from lib.audit.replay import Runner, Scores, score_again
from lib.audit.verdict import AuditError, audit_scores, describe_audit, raise_violations
from lib.data.encoder import encode_documents
from lib.data.tokenizer import Tokenizer, load_tokenizer
from lib.data.tokenizer_training import train_tokenizer
from lib.distributed import SINGLE_CPU, Process
from lib.evaluation.adapter import Adapter
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import run_strategy
from lib.evaluation.job import Job
from lib.evaluation.ledger import SHARED, Event
from lib.evaluation.lora import DocumentScorer, LowRankAdapters
from lib.evaluation.score import Forward
from lib.evaluation.strategies import STRATEGIES, Strategy
from lib.evaluation.windows import Documents, find_documents, plain_windows
from lib.model.embedding import SmearGate
from lib.model.gpt import GPT
from tests.data.texts import ENGLISH
from tests.evaluation.tiny import BOS, make_job, make_model, make_params, make_text, make_tokens
from tests.evaluation.tiny import STRATEGIES as NAMES
from tests.processes import run_processes

TEXTS = [ENGLISH[first:].lstrip() for first in range(0, 150, 25)]
TOKENS = make_tokens(150, starts=(0, 5, 31, 60, 83, 107))
LEGAL = [name for name in NAMES if not STRATEGIES[name].transductive]
PASSED: dict[str, Finding] = {"checked": {"passed": True}}


def audit(name: StrategyName, model: GPT | None = None, params: EvaluateParams | None = None, process: Process = SINGLE_CPU, *,
          thorough: bool = False, nondeterministic: str | None = None) -> dict[str, Any]:
    """Run one strategy and audit the run."""
    model, params = model or make_model(), params or make_params()
    outcome = run_strategy(name, make_job(model, TOKENS, params, process))
    return audit_scores(model, make_text(TOKENS), params, {name: outcome}, replay=replayer(model, params, process), data=PASSED,
                        confinement=PASSED, process=process, thorough=thorough, nondeterministic=nondeterministic)


def replayer(model: GPT, params: EvaluateParams, process: Process = SINGLE_CPU) -> Runner:
    """Replays in the same process, so that planted leaks are there as well."""
    def run(tokens: npt.NDArray[np.uint16], names: Sequence[StrategyName], until: int, work: float) -> Scores:
        return score_again(model, make_text(tokens), params, names, until=until, work=work, process=process)
    return run


def violated(report: dict[str, Any], name: StrategyName) -> list[str]:
    """The conditions that are violated; the verdict must agree."""
    strategy = report["strategies"][name]
    failed = [condition for condition, check in strategy.items() if condition != "legal" and check["passed"] is False]
    unknown = any(check["passed"] is None for condition, check in strategy.items() if condition != "legal")
    verdict = False if failed else None if unknown else True
    assert strategy["legal"] is verdict
    if not STRATEGIES[name].transductive:
        assert report["legal"] is verdict
        for condition in failed:
            with pytest.raises(AuditError, match=rf"strategies\.{name}\.{condition}: FAILED: .*\d"):
                raise_violations(report)
    return failed


def plant(monkeypatch: pytest.MonkeyPatch, name: StrategyName, run: Callable[[Job], None]) -> None:
    monkeypatch.setitem(STRATEGIES, name, Strategy(run, lambda documents, params: 1))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "thorough"), [*((name, False) for name in LEGAL), ("score_first", True), ("phased", True)])
def test_legal_strategies_pass_every_check(name: StrategyName, thorough: bool) -> None:
    report = audit(name, thorough=thorough)
    assert violated(report, name) == []
    raise_violations(report)
    assert all(check["passed"] for condition, check in report["strategies"][name].items() if condition != "legal")
    assert thorough or report == audit(name)
    assert describe_audit(report).endswith("\nlegal")


@pytest.mark.parametrize(("name", "changes"), [
    *((name, {"precision": "bf16"}) for name in ("sliding", "score_first", "lora", "phased")),
    ("score_first", {"score_first": {"windows": "one_pass", "epochs": 1}}), ("score_first", {"when_late": "fewer_epochs"}),
    ("phased", {"when_late": "fewer_epochs"}), ("lora", {"lora": {"steps": 2, "batch_documents": 3}}),
    ("lora", {"lora": {"warm_start": 2}}), ("phased", {"lora": {"warm_start": 3}, "phased": {"boundaries": [2, 4]}})])
def test_legal_strategies_pass_with_other_parameters(name: StrategyName, changes: dict[str, Any]) -> None:
    assert violated(audit(name, params=make_params(**changes)), name) == []


@pytest.mark.parametrize("part", ["data", "confinement"])
def test_what_was_not_checked_of_data_or_process_is_not_legal(part: str) -> None:
    model, params, unchecked = make_model(), make_params(), {"checked": {"passed": None, "why": "not here"}}
    outcome = run_strategy("plain", make_job(model, TOKENS, params, SINGLE_CPU))
    parts: dict[str, Any] = {"data": PASSED, "confinement": PASSED, part: unchecked}
    report = audit_scores(model, make_text(TOKENS), params, {"plain": outcome}, replay=replayer(model, params), process=SINGLE_CPU, **parts)
    assert report["strategies"]["plain"]["legal"] and report["legal"] is None
    raise_violations(report)
    assert describe_audit(report).endswith("\nNOT CHECKED")


def test_training_on_the_text_before_scoring_it_is_illegal_and_expected_of_a_transductive_strategy() -> None:
    report = audit("two_phase")
    assert violated(report, "two_phase") == ["causality", "distribution", "score_before_update"]
    raise_violations(report)
    assert report["legal"]


def test_documents_in_the_order_of_their_lengths_are_illegal() -> None:
    report = audit("longest_first")
    assert violated(report, "longest_first") == ["causality", "score_before_update", "single_pass"]
    raise_violations(report)
    assert report["legal"]


def test_a_legal_strategy_that_is_declared_transductive_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "plain", STRATEGIES["plain"]._replace(transductive=True))
    report = audit("plain")
    assert report["strategies"]["plain"]["legal"]
    assert not report["legal"]
    with pytest.raises(AuditError, match=r"strategies\.plain: declared transductive"):
        raise_violations(report)


def smear_ahead(gate: SmearGate, x: Tensor, starts: Tensor | None) -> Tensor:
    following = torch.cat((x[:, 1:], torch.zeros_like(x[:, :1])), dim=1)
    return torch.lerp(x, following, torch.sigmoid(gate.gate))


@pytest.mark.parametrize("name", LEGAL)
def test_a_smear_gate_that_reads_ahead_is_caught(name: StrategyName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SmearGate, "forward", smear_ahead)
    of_documents = name in ("lora", "phased")  # their rows go on after the last target, so that it sees itself
    assert violated(audit(name), name) == ["distribution"] if of_documents else ["causality", "distribution"]


def test_rows_of_a_batch_that_leak_into_each_other_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = SmearGate.forward
    monkeypatch.setattr(SmearGate, "forward", lambda gate, x, starts: original(gate, x, starts) + 0.1 * x.mean(0, keepdim=True))
    assert "causality" in violated(audit("sliding"), "sliding")
    report = audit("lora")
    assert "causality" in violated(report, "lora")
    assert report["strategies"]["lora"]["causality"]["documents_isolated"]["passed"] is False


def test_a_strategy_that_trains_on_a_chunk_before_scoring_it_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job) -> None:
        adapter, windows = Adapter(job, job.params.score_first), plain_windows(job.num_targets, 8)
        for number in range(len(windows.start)):
            window = windows.select(slice(number, number + 1))
            if window.length[0] == 8:
                adapter.train(window.start, 0.01, 1)
            job.scorer().score(window)
    plant(monkeypatch, "score_first", run)
    assert violated(audit("score_first"), "score_first") == ["causality", "distribution", "score_before_update"]


def test_training_that_no_record_shows_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(job: Job) -> None:
        optimizer = torch.optim.SGD(job.forward.model.parameters(), lr=0.01)
        for first in range(0, job.num_targets, 16):
            optimizer.zero_grad()
            job.forward(job.stream[first:first + 17].long()[None], slice(None)).mean().backward()
            optimizer.step()
            windows = plain_windows(min(16, job.num_targets - first), 16)
            job.scorer().score(windows._replace(start=windows.start + first))
    plant(monkeypatch, "score_first", run)
    report = audit("score_first")
    assert violated(report, "score_first") == ["causality", "distribution", "score_before_update"]
    state = report["strategies"]["score_first"]["score_before_update"]["model_state"]
    assert state["runs_with_training_that_no_record_shows"] == 2
    assert "token_embedding.weight" in state["left_behind"]  # its gradient


def test_a_tail_that_is_scored_twice_is_refused_and_seen_in_the_record() -> None:
    def score(job: Job) -> None:
        job.scorer().score(plain_windows(job.num_targets, 8))
        windows = plain_windows(job.num_targets, 8)
        job.scorer().score(windows.select(slice(len(windows.start) - 1, None)))
    job = make_job(make_model(), TOKENS, make_params())
    score(job)
    with pytest.raises(RuntimeError, match="exactly once"):
        job.sheet.collect(SINGLE_CPU)
    check = check_single_pass(job.sheet.ledger.events, 150, job.documents)
    assert not check["passed"]
    assert check["targets_scored_again"] == 150 % 8
    assert check_score_before_update(job.sheet.ledger.events, 150)["passed"]


def test_a_mixture_that_knows_the_target_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    other, original = Forward(make_model(logit_softcap=2.0), "fp32"), Forward.__call__

    def smaller(forward: Forward, *args: Any, **options: Any) -> Tensor:
        return torch.minimum(original(forward, *args, **options), original(other, *args, **options))
    monkeypatch.setattr(Forward, "__call__", smaller)
    assert violated(audit("plain"), "plain") == ["causality", "distribution"]


def test_a_distribution_that_knows_the_target_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Forward.log_probabilities

    def boosted(forward: Forward, rows: Tensor, position: int, attention_tokens: int | None = None) -> Tensor:
        log_probabilities = original(forward, rows, position, attention_tokens)
        log_probabilities[torch.arange(len(rows)), rows[:, position + 1]] += 0.5
        return log_probabilities.log_softmax(-1)
    monkeypatch.setattr(Forward, "log_probabilities", boosted)
    report = audit("sliding")
    assert "distribution" in violated(report, "sliding")
    figures = report["strategies"]["sliding"]["distribution"]
    assert figures["distributions_differing"] == 4 + 2 * (figures["places"] - 1) > 4  # of the last token, of others


@pytest.mark.parametrize("thorough", [False, True])
def test_a_cache_that_looks_up_only_the_realised_token_is_caught_wherever_it_does(thorough: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token of a row has no part in it, so that nothing is wrong at the end of the text, unless the text is cut."""
    original = Forward.__call__

    def looked_up(forward: Forward, rows: Tensor, positions: slice, *args: Any, **options: Any) -> Tensor:
        nats = original(forward, rows, positions, *args, **options)
        bonus = torch.full((rows.shape[1] - 1,), 0.25)
        bonus[-1] = 0
        return nats - bonus[positions]
    monkeypatch.setattr(Forward, "__call__", looked_up)
    report = audit("plain", thorough=thorough)
    assert "distribution" in violated(report, "plain")
    figures = report["strategies"]["plain"]["distribution"]
    assert figures["largest_deviation_of_loss"] == pytest.approx(0.25, rel=0.01)
    assert figures["distributions_differing"] == 0


def test_probabilities_that_do_not_add_up_to_one_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    loss, distribution = Forward.__call__, Forward.log_probabilities
    monkeypatch.setattr(Forward, "__call__", lambda *args, **options: loss(*args, **options) - 0.01)
    monkeypatch.setattr(Forward, "log_probabilities", lambda *args: distribution(*args) + 0.01)
    report = audit("one_pass")
    assert violated(report, "one_pass") == ["distribution"]
    assert report["strategies"]["one_pass"]["distribution"]["largest_deviation_of_sum"] == pytest.approx(0.01, rel=0.02)


def test_adapters_that_are_not_reset_between_documents_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LowRankAdapters, "reset", lambda *_: None)
    report = audit("lora")
    assert violated(report, "lora") == ["causality"]
    assert report["strategies"]["lora"]["causality"]["documents_isolated"]["passed"] is False


def test_a_warm_start_from_a_later_document_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    original = DocumentScorer.score
    monkeypatch.setattr(DocumentScorer, "score", lambda scorer, which: original(scorer, which[::-1]))
    params = make_params(lora={"warm_start": 2})
    assert violated(audit("lora", params=params), "lora") == ["causality", "score_before_update", "single_pass"]


def test_a_model_that_ignores_its_input_shows_that_a_comparison_is_dead() -> None:
    model = make_model()
    with torch.no_grad():
        model.token_embedding.weight.zero_()  # tied: all logits are 0
    assert violated(audit("plain", model), "plain") == ["causality"]


@pytest.mark.parametrize("num_targets", [1, 2, 7, 20])
@pytest.mark.parametrize("name", NAMES)
def test_a_piece_of_a_short_text_is_all_of_it_or_less(name: StrategyName, num_targets: int) -> None:
    text = make_text(make_tokens(num_targets))
    probe = make_probe(text, geometry(name, make_params()), 8, thorough=True)
    assert 2 <= len(probe.tokens) <= num_targets + 1
    assert all(1 <= change < len(probe.tokens) for change in probe.changes)
    assert all(1 <= cut < len(probe.tokens) for cut in probe.cuts)


@pytest.mark.parametrize("name", ["score_first", "lora", "phased"])
def test_a_strategy_adapts_within_the_piece_before_the_places_where_it_is_cut(name: StrategyName) -> None:
    params = make_params()
    probe = make_probe(make_text(TOKENS), geometry(name, params), 8, thorough=False)
    events = run_strategy(name, make_job(make_model(), probe.tokens, params)).events
    states = {event.state for event in events if event.kind == "trained"}
    last = len(find_documents(probe.tokens, BOS).start) - 1
    assert states >= {"score_first": {SHARED}, "lora": {last}, "phased": {SHARED, last}}[name]
    assert max(event.last for event in events if event.kind == "trained") < probe.cuts[-1] - 1


def _audit_in_processes(process: Process) -> None:
    report = audit("phased", process=process)
    assert report["legal"]
    other: dict[str, Finding] = {"checked": {"passed": False, "rank": 1}} if process.rank else PASSED
    model, params = make_model(), make_params()
    outcome = run_strategy("plain", make_job(model, TOKENS, params, process))
    report = audit_scores(model, make_text(TOKENS), params, {"plain": outcome}, replay=replayer(model, params, process), data=PASSED,
                          confinement=other, process=process)
    with pytest.raises(AuditError, match=r"process\.checked: FAILED: rank 1"):
        raise_violations(report)


@pytest.mark.slow
def test_all_processes_get_the_same_audit_and_none_can_hide() -> None:
    run_processes(_audit_in_processes, 2)


DOCUMENTS = Documents(np.array([0, 4, 9]), np.array([4, 5, 3]))
NUM_TARGETS = 12
TARGETS = st.integers(0, NUM_TARGETS - 1)
EVENTS = st.lists(st.builds(lambda step, kind, state, a, b: Event(step, kind, state, min(a, b), max(a, b)),
                            st.integers(0, 6), st.sampled_from(["scored", "trained"]), st.integers(-1, 2), TARGETS, TARGETS), max_size=12)


def is_score_before_update(events: list[Event]) -> bool:
    """Every pair of events, target by target."""
    for event in events:
        for target in range(event.first, event.last + 1):
            earlier = [other for other in events if other.step < event.step]
            if event.kind == "trained" and not any(other.kind == "scored" and other.first <= target <= other.last for other in earlier):
                return False
            if event.kind == "scored" and any(other.kind == "trained" and other.state in (SHARED, event.state) and other.last >= target
                                              for other in earlier):
                return False
    return True


def is_single_pass(events: list[Event], warm_start: int | None = None) -> bool:
    scored = [event for event in events if event.kind == "scored"]
    targets = [(event.state, target) for event in scored for target in range(event.first, event.last + 1)]
    if sorted(target for _, target in targets) != list(range(NUM_TARGETS)):
        return False
    for state in range(-1, 3):
        own = [target for of, target in targets if of == state]
        if own != sorted(own):
            return False
    bounds = [range(start, start + length) for start, length in zip(*DOCUMENTS, strict=True)]
    allowed = {SHARED: [range(NUM_TARGETS)]} | {state: bounds[state :: warm_start or 3] for state in range(warm_start or 3)}
    return all(any(event.first in each and event.last in each for each in allowed.get(event.state, [])) for event in events)


@given(EVENTS, st.sampled_from([None, 1, 2]))
def test_the_judges_of_a_record_agree_with_brute_force(events: list[Event], warm_start: int | None) -> None:
    events.sort()
    assert check_score_before_update(events, NUM_TARGETS)["passed"] == is_score_before_update(events)
    assert check_single_pass(events, NUM_TARGETS, DOCUMENTS, warm_start)["passed"] == is_single_pass(events, warm_start)


@pytest.mark.parametrize(("states", "warm_start"), [((0, 1, 2), None), ((0, 1, 0), 2), ((0, 0, 0), 1), ((0, 1, 2), 3)])
def test_an_adapter_belongs_to_a_document_or_to_those_of_its_chain(states: tuple[int, ...], warm_start: int | None) -> None:
    events = [Event(step, "scored", state, start, start + length - 1)
              for step, (state, start, length) in enumerate(zip(states, *DOCUMENTS, strict=True))]
    for other in (None, 1, 2, 3):
        alike = other == warm_start or {other, warm_start} == {None, 3}
        assert check_single_pass(events, NUM_TARGETS, DOCUMENTS, other)["passed"] == is_single_pass(events, other) == alike


@given(st.lists(st.integers(1, 4), min_size=3, max_size=12), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=2))
def test_the_judges_agree_on_records_that_are_nearly_right(sizes: list[int], swaps: list[tuple[int, int]]) -> None:
    ends = [end for end in np.cumsum(sizes).tolist() if end < NUM_TARGETS] + [NUM_TARGETS]
    events = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        events += [("scored", SHARED, first, end - 1), ("trained", SHARED, first, end - 1)]
    for a, b in swaps:
        events[a % len(events)], events[b % len(events)] = events[b % len(events)], events[a % len(events)]
    record = [Event(step, *event) for step, event in enumerate(events)]  # type: ignore[arg-type]
    assert check_score_before_update(record, NUM_TARGETS)["passed"] == is_score_before_update(record)
    assert check_single_pass(record, NUM_TARGETS, DOCUMENTS)["passed"] == is_single_pass(record)
    if not swaps:
        assert is_score_before_update(record)
        assert is_single_pass(record)


def test_what_happened_at_the_same_time_does_not_count_as_earlier() -> None:
    scored, trained = Event(0, "scored", SHARED, 0, NUM_TARGETS - 1), Event(0, "trained", SHARED, 0, 3)
    assert not check_score_before_update([scored, trained], NUM_TARGETS)["passed"]
    assert check_score_before_update([scored, trained._replace(step=1)], NUM_TARGETS)["passed"]


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tokenizer:
    """A validation split, its manifest and a pipeline, in the folder that the test runs in."""
    monkeypatch.chdir(tmp_path)
    path = MANIFEST.with_name("tokenizer.model")
    write_bytes(path, train_tokenizer(TEXTS, 300, 100_000))
    tokenizer = load_tokenizer(path)
    writer = SplitWriter(MANIFEST.with_name("val"), 300, 100_000)
    for text, tokens in zip(TEXTS, encode_documents(tokenizer, TEXTS), strict=True):
        writer.add(tokens, len(text.encode()), int(tokenizer.target_bytes(tokens).sum()))
    val = {**writer.close(), "distinct_documents": len(TEXTS), "reproduced_documents": len(TEXTS)}
    write_json(MANIFEST, {"tokenizer": {"sha256": tokenizer.sha256}, "splits": {"val": val}, "shared_documents": {"train and val": 0}})
    write_pipeline(evaluate=["artifacts/tokenize/val"], train=["artifacts/tokenize/train"])
    return tokenizer


def write_pipeline(**readers: object) -> None:
    write_json(PIPELINE, {"stages": {name: {"cmd": "true", "deps": deps} for name, deps in readers.items()}})  # JSON is YAML


def failed_data_checks(tokenizer: Tokenizer, **metrics: int) -> list[str]:
    split = load_split(MANIFEST.with_name("val"), 300)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    checks = check_data({"num_tokens": split.num_tokens - 1, "num_bytes": num_bytes} | metrics, split, tokenizer, SINGLE_CPU)
    return [name for name, check in checks.items() if check["passed"] is False]


def test_of_several_processes_only_the_main_one_checks_the_data(tokenizer: Tokenizer) -> None:
    class Other(Process):
        """A process that is told what the main one found."""

        def broadcast(self, value: Any) -> Any:
            assert not value
            return PASSED

    MANIFEST.unlink()
    assert check_data({}, load_split(MANIFEST.with_name("val"), 300), tokenizer, Other(1, 2, SINGLE_CPU.device)) == PASSED


def test_the_data_of_a_sound_pipeline_pass(tokenizer: Tokenizer) -> None:
    assert failed_data_checks(tokenizer) == []


def test_bytes_or_targets_that_are_missing_are_caught(tokenizer: Tokenizer) -> None:
    assert failed_data_checks(tokenizer, num_bytes=sum(len(text.encode()) for text in TEXTS) - 1) == ["bytes"]
    assert failed_data_checks(tokenizer, num_tokens=100) == ["targets"]


def rewrite(tokenizer: Tokenizer, spell: bool, raw_bytes: int) -> None:
    """The same text with as many bytes, in single letters if `spell`, and a manifest that says what the split says."""
    writer = SplitWriter(MANIFEST.with_name("val"), 300, 100_000)
    for text, tokens in zip(TEXTS, encode_documents(tokenizer, TEXTS), strict=True):
        spelled = [token for letter in text for token in tokenizer.processor.encode(letter)] if spell else tokens[1:].tolist()
        written = np.array([tokenizer.bos_id, *spelled], np.uint16)
        writer.add(written, len(text.encode()) + raw_bytes, int(tokenizer.target_bytes(written).sum()))
    manifest = read_json(MANIFEST)
    manifest["splits"]["val"] |= writer.close()
    write_json(MANIFEST, manifest)


def test_tokens_that_another_tokenizer_made_are_caught_though_their_bytes_agree(tokenizer: Tokenizer) -> None:
    rewrite(tokenizer, spell=False, raw_bytes=0)
    assert failed_data_checks(tokenizer) == []
    rewrite(tokenizer, spell=True, raw_bytes=0)
    assert failed_data_checks(tokenizer) == ["text"]


@pytest.mark.parametrize(("lossless", "raw_bytes", "failed"), [
    (True, -1, ["bytes"]), (True, 1, ["bytes"]), (False, -1, ["bytes"]), (False, 1, [])])
def test_more_accounted_bytes_than_the_text_has_are_caught(tokenizer: Tokenizer, lossless: bool, raw_bytes: int, failed: list[str]) -> None:
    rewrite(tokenizer, spell=False, raw_bytes=raw_bytes)
    tokenizer.lossless = lossless
    assert failed_data_checks(tokenizer) == failed


def test_a_text_that_is_not_reproduced_is_said_and_not_passed(tokenizer: Tokenizer) -> None:
    manifest = read_json(MANIFEST)
    manifest["splits"]["val"]["reproduced_documents"] -= 1
    write_json(MANIFEST, manifest)
    split = load_split(MANIFEST.with_name("val"), 300)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    check = check_data({"num_tokens": split.num_tokens - 1, "num_bytes": num_bytes}, split, tokenizer, SINGLE_CPU)["text"]
    assert check["passed"] is None
    assert str(check["why"]).startswith(f"text is not reproduced by the tokenizer (1 of {len(TEXTS)} ")


@pytest.mark.parametrize(("change", "failed"), [
    ({"shared_documents": {"train and val": 1}}, "disjoint"), ({"tokenizer": {"sha256": "0"}}, "checksums")])
def test_validation_documents_in_training_and_another_tokenizer_are_caught(tokenizer: Tokenizer, change: dict[str, Any],
                                                                          failed: str) -> None:
    write_json(MANIFEST, read_json(MANIFEST) | change)
    assert failed_data_checks(tokenizer) == [failed]


def test_shards_that_are_not_those_of_the_manifest_are_caught(tokenizer: Tokenizer) -> None:
    manifest = read_json(MANIFEST)
    manifest["splits"]["val"]["shards"][0]["sha256"] = "0"
    write_json(MANIFEST, manifest)
    assert failed_data_checks(tokenizer) == ["checksums"]


@pytest.mark.parametrize("path", ["artifacts/tokenize/val", "artifacts/tokenize/val/", "./artifacts/tokenize", "artifacts",
                                  "artifacts/tokenize/val/val_000000.bin", {"artifacts/tokenize/val": {"cache": False}}])
def test_another_stage_that_reads_the_validation_text_is_caught(path: object, tokenizer: Tokenizer) -> None:
    write_pipeline(train=["lib/params.py", path], evaluate=["artifacts/tokenize/val"])
    assert failed_data_checks(tokenizer) == ["validation_readers"]
    assert check_readers(PIPELINE) == {"passed": False, "stages": ["train", "evaluate"]}


@pytest.mark.usefixtures("tokenizer")
def test_the_readers_are_unknown_without_a_pipeline_and_wrong_without_evaluate() -> None:
    write_pipeline(train=["artifacts/tokenize/train"])
    assert check_readers(PIPELINE)["passed"] is False
    PIPELINE.unlink()
    assert check_readers(PIPELINE)["passed"] is None
