"""Strict reading of ``params.yaml``: whatever is unknown, missing, mistyped or out of range is an error naming its dotted key.

Parameter classes derive from `Params` and live beside the code they configure. They hold no default values: the file is
the whole record of a run.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

from lib.errors import UserError
from lib.problems import SHOWN, list_problems, show, suggest

PARAMS_FILE = Path("params.yaml")
SECTIONS = ("seeds", "model", "tokenize", "train", "calibrate", "quantize", "compress", "evaluate", "report")

MAX_SEED = 2**64 - 1  # torch's
MAX_DEPTH, MAX_VALUES = 32, 100_000  # of a parameter file, whose aliases could unfold without end
TOO_DEEP = f"expected at most {MAX_DEPTH} levels of keys and lists, found more"

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]
"""Precision of matrix products; weights and losses are fp32."""


class Params(BaseModel):
    """Base of every parameter class: immutable, unknown keys forbidden, no type coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ParamsError(UserError):
    """A parameter file that cannot be used; the message names file, dotted key, what was expected and what was found."""


P = TypeVar("P", bound=Params)


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole parameter file as plain data, its top-level keys checked.

    Raises:
        ParamsError: as `read_yaml`, or a top-level key that is unknown or missing.
    """
    values = read_yaml(path)
    for key in values:
        if key not in SECTIONS:
            raise ParamsError(f"{path}: {key}: unknown section; {suggest(key, SECTIONS) or 'the sections are ' + ', '.join(SECTIONS)}")
    for key in SECTIONS:
        if key not in values:
            raise ParamsError(f"{path}: {key}: missing section; presets/default.yaml shows it")
    return values


def read_yaml(path: Path) -> dict[str, Any]:
    """A file with some sections of parameters as plain data.

    YAML 1.2, so that ``1e-4`` is a number.

    Raises:
        ParamsError: no such file, not YAML, a repeated key, or values that JSON does not have.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the repository root, or `make preset NAME=default` there") from None
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ParamsError(f"{path}, line {line}: expected text in UTF-8, found the byte {error.object[error.start]:#04x}; save the file "
                          "as UTF-8") from None
    except Exception as error:  # damaged scalars and deep nesting raise exceptions of many kinds
        raise ParamsError(f"{path}{_describe_yaml_error(error)}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected the sections {', '.join(SECTIONS)}, found {type(values).__name__}")
    found = list(islice(_list_foreign(values, ()), MAX_VALUES))
    if len(found) == MAX_VALUES:
        raise ParamsError(f"{path}: expected fewer than {MAX_VALUES:,} values, found more, by aliases (*name) perhaps; write them out")
    if foreign := [problem for problem in found if problem]:
        raise ParamsError("\n".join(f"{path}: {problem}" for problem in foreign))
    return values


def load_params(section: str, kind: type[P], path: Path = PARAMS_FILE) -> P:
    """One section of the parameter file as an instance of its parameter class.

    Args:
        section: one of `SECTIONS`.
        kind: the class that describes the section.
        path: the parameter file.

    Raises:
        ParamsError: as `read_params`, or a key of the section that is unknown, missing, mistyped or out of range.
    """
    return parse_params(read_params(path)[section], kind, f"{path}: {section}.")


def parse_params(values: Any, kind: type[P], prefix: str) -> P:
    """Plain data as an instance of a parameter class.

    Validators of a field raise ``expected ..., found ...``; validators of a class raise ``key: expected ..., found ...``.

    Args:
        values: the data, as YAML or JSON gives it.
        kind: the class that describes it.
        prefix: goes before each dotted key in errors.

    Raises:
        ParamsError: a key that is unknown, missing, mistyped or out of range; all of them are listed, one a line.
    """
    try:
        return kind.model_validate_json(json.dumps(values))  # JSON mode: lists may become tuples, nothing else is coerced
    except ValidationError as error:
        raise ParamsError("\n".join(f"{prefix.rstrip('.: ') if problem.startswith(': ') else prefix}{problem}".removeprefix(": ")
                                    for problem in list_problems(error, values, kind))) from None


def _list_foreign(value: Any, keys: tuple[str, ...]) -> Iterator[str | None]:
    """For every value that YAML gave, what is wrong with it if it is none of JSON's, or None."""
    key = ".".join(keys) or "keys"
    if len(keys) > MAX_DEPTH:
        yield f"{key[:SHOWN]}...: {TOO_DEEP}"
    elif (isinstance(value, dict) and all(isinstance(name, str) for name in value)) or isinstance(value, list):
        yield None
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _list_foreign(inner, (*keys, str(name)))
    elif isinstance(value, dict):
        yield f"{key}: expected names as keys, found {show(next(name for name in value if not isinstance(name, str)))}; quote it"
    elif isinstance(value, int) and abs(value) >= 2**64:
        yield f"{key}: expected a number of at most 64 bits, found one of {value.bit_length()}"
    elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        yield f"{key}: expected text that UTF-8 can hold, found {ascii(value)[:SHOWN]}"
    elif value is None or isinstance(value, bool | int | float | str):
        yield None
    else:
        kind = {"datetime": "date", "TimeStamp": "date", "bytes": "binary value"}.get(name := type(value).__name__, name)
        yield f"{key}: expected text, a number, true, false, null, a list or keys, found a {kind}; quote what is meant as text"


def _describe_yaml_error(error: Exception) -> str:
    """Where a YAML file is not valid, and why, to follow the name of the file."""
    if isinstance(error, RecursionError):
        return f": {TOO_DEEP}"
    if not isinstance(error, MarkedYAMLError):
        return f": not valid YAML 1.2: {' '.join(str(error).split())}"
    mark = error.problem_mark or error.context_mark
    return f"{f', line {mark.line + 1}' if mark else ''}: not valid YAML 1.2: {error.problem or error.context}"


def parse_seed(description: str | None) -> int:
    """The value of ``--seed``, the one command-line argument of a stage; `description` is shown by ``--help``."""
    parser = argparse.ArgumentParser(description=description)
    add_seed(parser, required=True, help="one of `seeds` in params.yaml; part of every artifact's path")
    seed: int = parser.parse_args().seed
    return seed


def add_seed(parser: argparse.ArgumentParser, *, required: bool, help: str) -> None:
    """Give a command the option ``--seed``."""
    parser.add_argument("--seed", type=_seed, required=required, help=help)


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(MAX_SEED)) and int(text) <= MAX_SEED):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {MAX_SEED}, found {text[:SHOWN]}")
    return int(text)
