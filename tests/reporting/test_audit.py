from pathlib import Path
from typing import Any

import pytest

from lib.artifacts.files import ArtifactError
from lib.artifacts.metrics import save_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.scores import save_audit
from lib.audit.verdict import NOT_AUDITED
from lib.reporting.audit import AuditSummary, format_verdicts, judge_strategies, load_audit
from tests.reporting.results import make_audit


def load(folder: Path, values: dict[str, Any]) -> AuditSummary:
    save_audit(folder, values)
    audit = load_audit(folder)
    assert audit is not None
    return audit


def test_every_check_has_its_result_and_its_numbers_in_words(tmp_path: Path) -> None:
    audit = load(tmp_path, make_audit(("plain", "two_phase")))
    assert [(each.name, each.legal, [check.result for check in each.checks]) for each in audit.strategies] == [
        ("plain", True, ["passed"] * 4), ("two_phase", False, ["passed", "passed", "failed", "passed"])]
    assert [check.details for check in audit.strategies[0].checks] == [
        "targets compared: 1,234", "largest deviation: 1.25e-06", "scored before, trained targets: 5,000",
        "targets: 400,000"]
    assert audit.groups == {"data": [("validation readers", "passed", "stages: evaluate", "")],
                            "process": [("files", "not checked", "this kernel <cannot>", "this kernel <cannot>")]}


def test_parts_of_a_check_have_their_own_result(tmp_path: Path) -> None:
    values = make_audit(("lora",))
    values["strategies"]["lora"]["causality"]["documents_isolated"] = {"passed": False, "scores_differing": 12345}
    values["process"]["files"] = {"passed": True, "network_off": False, "stages": [], "largest": 0.00004, "share": 12.0}
    audit = load(tmp_path, values)
    assert audit.strategies[0].checks[0].details == "targets compared: 1,234; documents isolated: failed (scores differing: 12,345)"
    assert audit.groups["process"][0].details == "network off: no; stages: none; largest: 4e-05; share: 12"


def test_conditions_are_in_the_order_of_the_challenge_whatever_the_order_in_the_file(tmp_path: Path) -> None:
    values = make_audit(("two_phase",))
    values["strategies"]["two_phase"] = dict(reversed(values["strategies"]["two_phase"].items()))
    assert [check.name for check in load(tmp_path, values).strategies[0].checks] == [
        "causality", "distribution", "score before update", "single pass"]


@pytest.mark.parametrize(("changes", "verdict"), [
    ({}, "NOT CHECKED (5 passed, 1 not checked: this kernel <cannot>)"),  # what two_phase fails is as declared
    ({"legal": False, "data": {"bytes": {"passed": False}}}, "NOT LEGAL (7 passed, 2 failed, 1 not checked: this kernel <cannot>)"),
    ({"legal": True, "data": {}, "process": {}}, "legal (4 passed)"),
])
def test_the_verdict_counts_checks_of_what_claims_to_be_legal(tmp_path: Path, changes: dict[str, Any], verdict: str) -> None:
    assert load(tmp_path, make_audit(("plain", "two_phase")) | changes).verdict == verdict


def test_verdicts_of_seeds_that_agree_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_metrics(TOKENIZE_FOLDER, {"text": "text is reproduced"}, {})
    audit = load(tmp_path, make_audit())
    assert format_verdicts([audit, audit]) == audit.verdict
    assert format_verdicts([audit, None]) == f"{audit.verdict}; not audited"
    save_metrics(TOKENIZE_FOLDER, {"text": "text is not reproduced by the tokenizer: 2 of 9"}, {})
    assert format_verdicts([None]) == "not audited: text is not reproduced by the tokenizer: 2 of 9, for which no score was ever accepted"


def test_a_score_is_legal_where_nothing_was_left_unchecked(tmp_path: Path) -> None:
    unconfined = make_audit(("plain", "lora", "two_phase"))
    sound = unconfined | {"process": {}}
    unsure = make_audit(("plain", "lora")) | {"process": {}}
    unsure["strategies"]["lora"]["legal"] = None
    assert judge_strategies([load(tmp_path, sound)]) == {"plain": True, "lora": True, "two_phase": False}
    assert judge_strategies([load(tmp_path, unconfined)]) == {"plain": None, "lora": None, "two_phase": False}
    assert judge_strategies([load(tmp_path, unsure), load(tmp_path, sound)]) == {"plain": True, "lora": None, "two_phase": False}
    assert judge_strategies([load(tmp_path, sound), None]) == {}


def test_an_evaluation_without_audit_says_so(tmp_path: Path) -> None:
    save_audit(tmp_path, NOT_AUDITED)
    assert load_audit(tmp_path) is None
    (tmp_path / "audit.json").unlink()
    with pytest.raises(ArtifactError, match=r"audit.json"):
        load_audit(tmp_path)


@pytest.mark.parametrize("path", [
    ("legal",), ("data",), ("strategies", "plain", "legal"), ("strategies", "plain", "causality"),
    ("strategies", "plain", "causality", "passed")])
def test_a_check_that_is_missing_is_an_error_and_not_a_pass(tmp_path: Path, path: tuple[str, ...]) -> None:
    values = make_audit(("plain",))
    *parents, last = path
    place = values
    for key in parents:
        place = place[key]
    del place[last]
    save_audit(tmp_path, values)
    with pytest.raises(ArtifactError, match=rf"audit.json: not an audit \(KeyError\('{last}'\)\); `dvc repro -f evaluate` makes it anew"):
        load_audit(tmp_path)
