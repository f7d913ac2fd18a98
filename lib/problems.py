"""What is wrong with data that a pydantic class describes, in words that need no knowledge of pydantic."""

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

SHOWN = 60  # characters of what was found

_EXPECTED = {  # kind of problem -> what was expected; names in braces are of its context
    "int_type": "a whole number", "int_from_float": "a whole number", "float_type": "a number", "finite_number": "a finite number",
    "bool_type": "true or false", "string_type": "text", "none_required": "null", "tuple_type": "a list", "list_type": "a list",
    "dict_type": "keys with values", "model_type": "keys with values", "literal_error": "{expected}",
    "greater_than": "a number above {gt}", "greater_than_equal": "a number from {ge}", "less_than": "a number below {lt}",
    "less_than_equal": "a number up to {le}", "too_short": "a list of {min_length} or more", "too_long": "a list of at most {max_length}",
    "string_too_short": "text of {min_length} or more characters",
    "string_too_long": "text of at most {max_length} characters", "string_pattern_mismatch": "text that matches {pattern}",
}


def list_problems(error: ValidationError, values: Any, kind: type[BaseModel]) -> list[str]:
    """What is wrong with data, a line for each key: the key, what was expected, what was found.

    Nothing is said of a key below which something is wrong: pydantic calls a list too short that has elements which are wrong, and where
    a value may be of several kinds it says of each what is wrong with it.

    Args:
        error: what pydantic says of it.
        values: the data.
        kind: the class that describes it.
    """
    by_key: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors(include_url=False):
        by_key.setdefault(_key(problem, values), []).append(problem)
    innermost = (key for key in by_key if not any(other.startswith(f"{key}.") for other in by_key))
    return [line for key in innermost for line in _describe(key, by_key[key], kind)]


def describe_problem(problem: ErrorDetails) -> str:
    """What was expected in place of a value; without its key, and without the value, which may be long."""
    context = {name: f"{value:.12g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()}
    words = _EXPECTED.get(problem["type"])
    return f"expected {words.format_map(context).replace(chr(39), '')}" if words else {
        "missing": "missing", "extra_forbidden": "unknown key", "json_invalid": problem["msg"]}.get(problem["type"], "not valid")


def _describe(key: str, problems: list[ErrorDetails], kind: type[BaseModel]) -> Iterator[str]:
    """Lines on one key; where a value may be of several kinds, there is a problem with each."""
    expected: dict[str, None] = {}
    for problem in problems:
        if problem["type"] == "missing":
            yield f"{key}: missing; presets/default.yaml shows it"
        elif problem["type"] == "extra_forbidden":
            yield f"{key}: unknown key; {_suggest_key(key, kind) or 'presets/default.yaml shows the known ones'}"
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            if message.startswith("expected ") and len(problems) > 1:
                expected[message.removeprefix("expected ").rsplit(", found", 1)[0]] = None
            else:
                yield ": ".join([key, message]) if message.startswith("expected") else ".".join(filter(None, [key, message]))
        else:
            expected[describe_problem(problem).removeprefix("expected ")] = None
    if expected:
        found = problems[-1]["input"]
        choices = [problem["ctx"]["expected"] for problem in problems if problem["type"] == "literal_error"]
        suggestion = suggest(found, re.findall("'(.*?)'", " ".join(choices)))
        yield f"{key}: expected {' or '.join(expected)}, found {show(found)}" + (f"; {suggestion}" if suggestion else "")


def _key(problem: ErrorDetails, values: Any) -> str:
    """The dotted key of a problem, without what pydantic adds to it for alternatives and for keys."""
    parts = []
    for part in problem["loc"]:
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            parts.append(part)
            values = values[part]  # type: ignore[index]  # of the kind that was just seen
    if problem["type"] == "missing":
        parts.append(problem["loc"][-1])
    return ".".join(map(str, parts))


def _suggest_key(key: str, kind: type[BaseModel]) -> str:
    """A known key that may have been meant: one beside it of a similar name, or one elsewhere of the same name."""
    section, _, name = key.rpartition(".")
    known = [each.rpartition(".") for each in _known_keys(kind)]
    beside = {last: f"{first}{dot}{last}" for first, dot, last in known if first == section}
    elsewhere = [f"{first}{dot}{last}" for first, dot, last in known if last == name]
    matches = [beside[match] for match in get_close_matches(name, beside, 1)] or elsewhere
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def _known_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys below a class, or below the classes in a type."""
    if not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        for part in get_args(kind):
            yield from _known_keys(part, prefix)
        return
    for name, field in kind.model_fields.items():
        yield prefix + name
        yield from _known_keys(field.annotation, f"{prefix}{name}.")


def suggest(found: Any, known: Iterable[str]) -> str:
    """A question for the known name that is most like a given one; empty where none is."""
    matches = get_close_matches(found, known, 1) if isinstance(found, str) else []
    return f"did you mean {matches[0]}?" if matches else ""


def show(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
