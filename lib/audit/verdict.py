"""Machine checks that every score is legal: the challenge's four conditions, the data, and the process that evaluated.

A check is a dictionary with ``passed`` - None, and ``why``, where it could not be made - and the numbers that show it. C1 and C2 are
tried on the real model (`lib.audit.probe`), C3 and C4 read off the record of the real run (`lib.audit.chronology`).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lib.audit.chronology import Check, check_score_before_update, check_single_pass
from lib.audit.probe import Trial
from lib.distributed import Process
from lib.errors import UserError
from lib.evaluation.config import EvaluateParams, StrategyName
from lib.evaluation.evaluation import Text
from lib.evaluation.ledger import Event
from lib.evaluation.score import Forward
from lib.evaluation.strategies import STRATEGIES
from lib.model.gpt import GPT

Audit = dict[str, Any]

NOT_AUDITED: Audit = {"legal": None, "why": "evaluate.audit is false"}


class AuditError(UserError):
    """A score is not legal, or one that was declared not to be is."""


def audit_scores(model: GPT, text: Text, params: EvaluateParams, ledgers: Mapping[StrategyName, Sequence[Event]], *,
                 data: Mapping[str, Check], confinement: Mapping[str, Check], process: Process, thorough: bool = False,
                 nondeterministic: str | None = None) -> Audit:
    """Check all conditions.

    Args:
        model: the artifact's model, on the process's device; it ends as it was.
        text: what was scored.
        params: the section ``evaluate``.
        ledgers: what happened, by strategy.
        data: from `lib.audit.provenance.check_data`.
        confinement: what `lib.audit.isolation.confine` found in this process.
        process: every process calls this and gets the same audit.
        thorough: try more tokens in more places.
        nondeterministic: why results may not repeat on this device, from `lib.audit.determinism.deterministic`.

    Returns:
        What ``audit.json`` holds; `raise_violations` judges it.
    """
    forward = Forward(model, params.precision, compiled=params.compile)
    strategies = {}
    for name, events in ledgers.items():
        causality, distribution = Trial(name, forward, text, params, process, vocab_size=model.params.vocab_size, thorough=thorough,
                                        nondeterministic=nondeterministic).check()
        checks = {"causality": causality, "distribution": distribution,
                  "score_before_update": check_score_before_update(events, len(text.tokens) - 1),
                  "single_pass": check_single_pass(events, len(text.tokens) - 1, text.documents)}
        strategies[name] = {"legal": all(check["passed"] is not False for check in checks.values()), **checks}
    everywhere = process.merge({process.rank: confinement}).values()
    worst = {part: min((each[part] for each in everywhere), key=lambda check: (False, None, True).index(check["passed"]))
             for part in confinement}
    audit: Audit = {"strategies": strategies, "data": dict(data), "process": worst}
    return {"legal": not list(_violations(audit)), **audit}


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
    return "\n".join([*lines, "legal" if audit["legal"] else "NOT LEGAL"])


def _violations(audit: Audit) -> Iterator[str]:
    for where, check in _checks(audit):
        part, name, *_ = where.split(".")
        if check["passed"] is False and not (part == "strategies" and STRATEGIES[name].transductive):  # type: ignore[index]
            yield f"{where}: {_describe(check)}"
    for name, strategy in audit["strategies"].items():
        if STRATEGIES[name].transductive and strategy["legal"]:
            yield f"strategies.{name}: declared transductive, yet every check passed; correct STRATEGIES or the checks"


def _checks(audit: Audit) -> Iterator[tuple[str, Check]]:
    for name, strategy in audit["strategies"].items():
        yield from ((f"strategies.{name}.{condition}", check) for condition, check in strategy.items() if condition != "legal")
    for part in ("data", "process"):
        yield from ((f"{part}.{name}", check) for name, check in audit[part].items())


def _describe(check: Check) -> str:
    verdict = {True: "passed", False: "FAILED", None: "not checked"}[check["passed"]]  # type: ignore[index]
    figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in check.items() if key != "passed" and value is not None)
    return f"{verdict}: {figures}"
