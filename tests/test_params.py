"""Strict parameters: every kind of mistake is an error that names file, dotted key, expected and found."""

from pathlib import Path

import pytest
from pydantic import model_validator

from lib.params import SECTIONS, Params, ParamsError, Positive, PositiveFloat, load_params, parse_params, read_params


class Inner(Params):
    rates: tuple[PositiveFloat, ...]


class Outer(Params):
    count: Positive
    low: float
    inner: Inner

    @model_validator(mode="after")
    def _check(self) -> "Outer":
        if self.low > self.count:
            raise ValueError(f"low: expected at most count {self.count}, found {self.low}")
        return self


GOOD = {"count": 3, "low": 1, "inner": {"rates": [0.5, 1]}}


def write(path: Path, train: str) -> Path:
    path.write_text("".join(f"{section}: {{}}\n" for section in SECTIONS if section != "train") + train)
    return path


def test_values_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    path = write(tmp_path / "p.yaml", "train: {count: 3, low: 1e-4, inner: {rates: [2.5e-3]}}\n")
    params = load_params("train", Outer, path)
    assert (params.count, params.low, params.inner.rates) == (3, 1e-4, (2.5e-3,))


@pytest.mark.parametrize(("change", "message"), [
    ({"cuont": 1}, "p: train.cuont: unknown key"),
    ({"count": None}, "p: train.count: Input should be a valid integer, found null"),
    ({"count": 2.0}, "p: train.count: Input should be a valid integer, found 2.0"),
    ({"count": "3"}, 'p: train.count: Input should be a valid integer, found "3"'),
    ({"count": True}, "p: train.count: Input should be a valid integer, found true"),
    ({"count": 0}, "p: train.count: Input should be greater than 0, found 0"),
    ({"low": float("nan")}, "p: train.low: Input should be a finite number"),
    ({"low": 5}, "p: train.low: expected at most count 3, found 5.0"),
    ({"inner": {"rates": [1.0, -2.0]}}, "p: train.inner.rates.1: Input should be greater than 0, found -2.0"),
    ({"inner": {}}, "p: train.inner.rates: missing"),
])
def test_mistakes_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError) as error:
        parse_params({**GOOD, **change}, Outer, "p: train.")
    assert str(error.value).startswith(message)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ParamsError) as error:
        parse_params({"count": -1, "inner": {"rates": []}, "extra": 1}, Outer, "")
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == {"count", "low", "extra"}


@pytest.mark.parametrize(("text", "message"), [
    ("trian: {}\n", "trian: unknown section"),
    ("", "train: missing section"),
    ("train: {}\ntrain: {}\n", "not valid YAML"),
    ("train: [\n", "not valid YAML"),
])
def test_sections_are_checked(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        read_params(write(tmp_path / "p.yaml", text))


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no such file; run from the repository root"):
        read_params(tmp_path / "p.yaml")
