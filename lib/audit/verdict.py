"""Machine checks that every score is legal: the challenge's four conditions, the data, and the process that evaluated.

A check is a dictionary with ``passed`` - None, and ``why``, where it could not be made - and the numbers that show it. C1 and C2 are
tried on the real model (`lib.audit.probe`), C1 also by repeating the real run with other text after a cut (`lib.audit.replay`), C3 and C4
read off the record of the real run (`lib.audit.chronology`). What could not be checked is not legal.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.audit.chronology import Finding, check_score_before_update, check_single_pass
from lib.audit.determinism import worst
from lib.audit.probe import Trial
from lib.audit.replay import Runner, check_replays
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Outcome, Text
from lib.evaluation.ledger import SHARED
from lib.evaluation.score import Forward
from lib.evaluation.strategies import STRATEGIES
from lib.model.gpt import GPT

Audit = dict[str, Any]

VERDICTS = {True: "legal", False: "NOT LEGAL", None: "NOT CHECKED"}
NOT_AUDITED: Audit = {"legal": None, "why": "evaluate.audit is false"}


class AuditError(UserError):
    """A score is not legal, or one that was declared not to be is."""


def audit_scores(model: GPT, text: Text, params: EvaluateParams, outcomes: Mapping[StrategyName, Outcome], *, replay: Runner,
                 data: Mapping[str, Finding], confinement: Mapping[str, Finding], process: Process, thorough: bool = False,
                 seed_of_cuts: int = 0, nondeterministic: str | None = None) -> Audit:
    """Check all conditions.

    Args:
        model: the artifact's model, on the process's device; it ends as it was.
        text: what was scored.
        params: the section ``evaluate``.
        outcomes: what the real run gave, by strategy.
        replay: scores other texts in a fresh process: a `lib.audit.replay.Replayer`.
        data: from `lib.audit.provenance.check_data`.
        confinement: what `lib.audit.isolation.confine` found in this process.
        process: every process calls this and gets the same audit.
        thorough: try more tokens in more places, and cut the real run all over the text.
        seed_of_cuts: another one cuts the real run in other places.
        nondeterministic: why results may not repeat on this device, from `lib.audit.determinism.deterministic`.

    Returns:
        What ``audit.json`` holds; `raise_violations` judges it.
    """
    forward = Forward(model, params.precision, compiled=params.compile)
    strategies = {}
    replays = check_replays(outcomes, text, params, replay, thorough=thorough, seed_of_cuts=seed_of_cuts)
    for name, outcome in outcomes.items():
        trial = Trial(name, forward, text, params, process, vocab_size=model.params.vocab_size, thorough=thorough,
                      nondeterministic=nondeterministic)
        causality, distribution = trial.check()
        checks = {"causality": _with_part(causality, "replays", replays.get(name)), "distribution": distribution,
                  "score_before_update": _with_part(check_score_before_update(outcome.events, len(text.tokens) - 1), "model_state",
                                                    check_state([outcome, trial.original])),
                  "single_pass": check_single_pass(outcome.events, len(text.tokens) - 1, text.documents, params.lora.warm_start)}
        passed = worst(*(check["passed"] for check in checks.values()))  # type: ignore[arg-type]
        strategies[name] = {"legal": passed, **checks}
    everywhere = process.merge({process.rank: confinement}).values()
    of_process = {part: min((each[part] for each in everywhere), key=lambda check: (False, None, True).index(check["passed"]))
                  for part in confinement}
    audit: Audit = {"strategies": strategies, "data": dict(data), "process": of_process}
    unknown = any(check["passed"] is None for _, check in _claims(audit))
    return {"legal": False if list(_violations(audit)) else None if unknown else True, **audit}


def check_state(outcomes: Sequence[Outcome]) -> Finding:
    """That runs of a strategy left nothing in the model, and that weights which changed have an entry in the ledger."""
    unrecorded = sum(outcome.trained and not any(event.kind == "trained" and event.state == SHARED for event in outcome.events)
                     for outcome in outcomes)
    left_behind = sorted({name for outcome in outcomes for name in outcome.left_behind})
    return {"passed": not unrecorded and not left_behind, "runs": len(outcomes), "runs_with_training_that_no_record_shows": unrecorded,
            "left_behind": left_behind}


def _with_part(check: Finding, name: str, part: Finding | None) -> Finding:
    """A check of which another one is a part: it passed where both did."""
    if part is None:
        return check
    passed = worst(check["passed"], part["passed"])  # type: ignore[arg-type]
    why = {"why": (check if check["passed"] is None else part)["why"]} if passed is None else {}
    return {**check, "passed": passed, **why, name: part}


def raise_violations(audit: Audit) -> None:
    """Judge what `audit_scores` returned.

    Raises:
        AuditError: a check that did not pass, in the data, the process or a strategy; or a strategy that is declared to train on text
            before it is scored, for which every check passed.
    """
    if violations := list(_violations(audit)):
        raise AuditError("the scores are not legal:\n" + "\n".join(violations))


def describe_audit(audit: Audit) -> str:
    """One line for each check: what it is, whether it passed, and its numbers."""
    lines = [f"{where}: {_describe(check)}" for where, check in _checks(audit)]
    return "\n".join([*lines, VERDICTS[audit["legal"]]])


def _violations(audit: Audit) -> Iterator[str]:
    for where, check in _claims(audit):
        if check["passed"] is False:
            yield f"{where}: {_describe(check)}"
    for name, strategy in audit["strategies"].items():
        if STRATEGIES[name].transductive and strategy["legal"]:
            yield f"strategies.{name}: declared transductive, yet every check passed; correct STRATEGIES or the checks"


def _claims(audit: Audit) -> Iterator[tuple[str, Finding]]:
    """The checks, but for those of strategies that are declared not to be legal."""
    for where, check in _checks(audit):
        part, name, *_ = where.split(".")
        if not (part == "strategies" and STRATEGIES[name].transductive):  # type: ignore[index]
            yield where, check


def _checks(audit: Audit) -> Iterator[tuple[str, Finding]]:
    for name, strategy in audit["strategies"].items():
        yield from ((f"strategies.{name}.{condition}", check) for condition, check in strategy.items() if condition != "legal")
    for part in ("data", "process"):
        yield from ((f"{part}.{name}", check) for name, check in audit[part].items())


def _describe(check: Finding) -> str:
    verdict = {True: "passed", False: "FAILED", None: "not checked"}[check["passed"]]  # type: ignore[index]
    figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in check.items() if key != "passed" and value is not None)
    return f"{verdict}: {figures}"
