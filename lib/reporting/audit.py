"""What the audit of an evaluation found, in words."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lib.artifacts.files import ArtifactError, read_json
from lib.artifacts.metrics import NOT_REPRODUCED, load_metrics
from lib.artifacts.paths import TOKENIZE_FOLDER
from lib.artifacts.scores import AUDIT_FILE

CONDITIONS = {  # the challenge's issue #1017
    "causality": ("C1", "A score depends on the artifact and earlier tokens only.",
                  "The run is repeated in a fresh process with other text after a cut, and a piece of it with later tokens replaced: "
                  "no score before them may change by a bit."),
    "distribution": ("C2", "It comes from a full, normalised distribution that does not depend on the target.",
                     "The last token is replaced: the distribution stated for it stays the same, sums to 1, and gives the loss."),
    "score_before_update": ("C3", "What is trained on has been scored before, and no score comes after training on its target.",
                            "Read from the record of the run; weights that change need an entry in it, and nothing may stay in the model."),
    "single_pass": ("C4", "One pass from left to right, every token scored once.", "Read from the record of the run."),
}
"""Name of each condition of a legal score: its number, what it says, how it is checked."""

Result = Literal["passed", "failed", "not checked"]

VERDICTS = {True: "legal", False: "NOT LEGAL", None: "NOT CHECKED"}
RESULTS: dict[bool | None, Result] = {True: "passed", False: "failed", None: "not checked"}


class CheckSummary(NamedTuple):
    """One check.

    Attributes:
        name: as in ``audit.json``.
        result: what came out.
        details: the numbers that show it, and why it could not be checked.
        why: it could not be checked; empty if it was.
    """

    name: str
    result: Result
    details: str
    why: str


class StrategyAudit(NamedTuple):
    """The checks of one strategy: whether its score is legal (None: not checked), and one check for each of `CONDITIONS`."""

    name: str
    legal: bool | None
    checks: list[CheckSummary]


class AuditSummary(NamedTuple):
    """All checks of one evaluation.

    Attributes:
        legal: whether all was found as it must be; None where a condition could not be checked.
        strategies: conditions of a legal score, by strategy.
        groups: other checks, under the name of what they are about.
    """

    legal: bool | None
    strategies: list[StrategyAudit]
    groups: dict[str, list[CheckSummary]]

    @property
    def verdict(self) -> str:
        """One line: the outcome, how many checks came to it, and why some were not made; where all is well, of legal scores only."""
        checks = [check for strategy in self.strategies if strategy.legal is not False or self.legal is False for check in strategy.checks]
        checks += [check for group in self.groups.values() for check in group]
        counts = {word: sum(check.result == word for check in checks) for word in RESULTS.values()}
        text = ", ".join(f"{count} {word}" for word, count in counts.items() if count or word == "passed")
        if reasons := list(dict.fromkeys(check.why for check in checks if check.why)):
            text += f": {'; '.join(reasons)}"
        return f"{VERDICTS[self.legal]} ({text})"


def load_audit(folder: Path) -> AuditSummary | None:
    """The audit in the output folder of evaluate; None where there was none (``evaluate.audit: false``).

    Raises:
        ArtifactError: missing, or a file that is no audit.
    """
    path = folder / AUDIT_FILE
    values = read_json(path)
    try:
        if values["legal"] is None and "strategies" not in values:
            return None
        strategies = [StrategyAudit(name, found["legal"], [_check(condition, found[condition]) for condition in CONDITIONS])
                      for name, found in values["strategies"].items()]
        groups = {group: [_check(name, check) for name, check in values[group].items()] for group in ("data", "process")}
        return AuditSummary(values["legal"], strategies, groups)
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not an audit ({error!r}); `dvc repro -f evaluate` makes it anew") from None


def worst(*passed: bool | None) -> bool | None:
    """What several verdicts come to together: a violation, else not checked, else legal."""
    return min(passed, key=(False, None, True).index)


def judge_strategies(audits: Sequence[AuditSummary | None]) -> dict[str, bool | None]:
    """Whether the score of each strategy is legal in all seeds: its own checks, and those of data and process, which concern every one.

    There is no entry where a seed has no audit.
    """
    verdicts: dict[str, bool | None] = {}
    known = [audit for audit in audits if audit is not None]
    for audit in known if len(known) == len(audits) else ():
        common = {check.result for checks in audit.groups.values() for check in checks}
        of_all = worst(True, *(value for value, result in RESULTS.items() if result in common))
        verdicts |= {each.name: worst(each.legal, of_all, verdicts.get(each.name, True)) for each in audit.strategies}
    return verdicts


def format_verdicts(audits: Sequence[AuditSummary | None]) -> str:
    """The verdicts on all seeds, each different one once; without an audit, what tokenize knows of the text."""
    text = load_metrics(TOKENIZE_FOLDER)["text"]
    if None in audits and text.startswith(NOT_REPRODUCED):
        return f"not audited: {text}, for which no score was ever accepted"
    return "; ".join(dict.fromkeys("not audited" if audit is None else audit.verdict for audit in audits))


def _check(name: str, values: Mapping[str, Any]) -> CheckSummary:
    parts = [values["why"]] if "why" in values else []
    parts += [f"{key}: {value}" for key, value in _flatten({key: values[key] for key in values if key not in ("passed", "why")})]
    return CheckSummary(name.replace("_", " "), RESULTS[values["passed"]], "; ".join(parts), values.get("why", ""))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Numbers and what they are, in words; those that do not apply are None and left out."""
    for key, value in values.items():
        name = f"{prefix}{key}".replace("_", " ")
        if isinstance(value, Mapping) and "passed" in value:
            part = _check(key, value)
            yield name, f"{part.result} ({part.details})"
        elif isinstance(value, Mapping):
            yield from _flatten(value, f"{name}, ")
        elif value is not None:
            yield name, _format(value)


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_format, value)) or "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
