"""Strict reading of ``params.yaml``: whatever is unknown, missing, mistyped or out of range is an error naming its dotted key.

Parameter classes derive from `Params` and live beside the code they configure. They hold no default values: the file is
the whole record of a run.
"""

import argparse
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

PARAMS_FILE = Path("params.yaml")
SECTIONS = ("seeds", "model", "tokenize", "train", "calibrate", "quantize", "compress", "evaluate", "report")

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Precision = Literal["fp32", "bf16"]
"""Of matrix products; weights and losses are fp32."""


class Params(BaseModel):
    """Base of every parameter class: immutable, unknown keys forbidden, no type coercion."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ParamsError(ValueError):
    """A parameter file that cannot be used; the message names file, dotted key, what was expected and what was found."""


P = TypeVar("P", bound=Params)


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """The whole parameter file as plain data, its top-level keys checked.

    YAML 1.2, so that ``1e-4`` is a number.

    Raises:
        ParamsError: no such file, not YAML, a repeated key, or a top-level key that is unknown or missing.
    """
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the repository root, or copy a file of presets/ there") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML 1.2: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path}: expected the sections {', '.join(SECTIONS)}, found {type(values).__name__}")
    for key in values:
        if key not in SECTIONS:
            raise ParamsError(f"{path}: {key}: unknown section; the sections are {', '.join(SECTIONS)}")
    for key in SECTIONS:
        if key not in values:
            raise ParamsError(f"{path}: {key}: missing section; every preset in presets/ shows it")
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
        raise ParamsError("\n".join(prefix + _describe(problem) for problem in error.errors(include_url=False))) from None


def _describe(problem: ErrorDetails) -> str:
    key = ".".join(map(str, problem["loc"]))
    if problem["type"] == "missing":
        return f"{key}: missing; every preset in presets/ shows it"
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; presets/ show the known ones"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return ": ".join([key, message]) if message.startswith("expected") else ".".join(filter(None, [key, message]))
    return f"{key}: {problem['msg']}, found {json.dumps(problem['input'])}"


def parse_seed(description: str | None) -> int:
    """The value of ``--seed``, the one command-line argument of a stage; `description` is shown by ``--help``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seed", type=int, required=True, help="one of `seeds` in params.yaml; part of every artifact's path")
    seed: int = parser.parse_args().seed
    return seed
