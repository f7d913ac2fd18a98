"""Strict parameters: every kind of mistake is an error that names file, dotted key, expected and found."""

import copy
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import model_validator

from lib.params import MAX_SEED, SECTIONS, Params, ParamsError, Positive, PositiveFloat, load_params, parse_params, parse_seed, read_params
from lib.schema import PipelineParams


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
    ({"cuont": 1}, "p: train.cuont: unknown key; did you mean count?"),
    ({"count": None}, "p: train.count: expected a whole number, found null"),
    ({"count": 2.0}, "p: train.count: expected a whole number, found 2.0"),
    ({"count": "3"}, 'p: train.count: expected a whole number, found "3"'),
    ({"count": True}, "p: train.count: expected a whole number, found true"),
    ({"count": 0}, "p: train.count: expected a number above 0, found 0"),
    ({"low": float("nan")}, "p: train.low: expected a finite number"),
    ({"low": 5}, "p: train.low: expected at most count 3, found 5.0"),
    ({"inner": {"rates": [1.0, -2.0]}}, "p: train.inner.rates.1: expected a number above 0, found -2.0"),
    ({"inner": {}}, "p: train.inner.rates: missing"),
])
def test_mistakes_name_the_key(change: dict[str, object], message: str) -> None:
    with pytest.raises(ParamsError) as error:
        parse_params({**GOOD, **change}, Outer, "p: train.")
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(("prefix", "expected"), [("p: train.", "p: train: expected"), ("p: ", "p: expected"), ("", "expected")])
def test_a_section_that_is_none_is_named(prefix: str, expected: str) -> None:
    with pytest.raises(ParamsError, match=f"^{expected} keys with values, found null$"):
        parse_params(None, Outer, prefix)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ParamsError) as error:
        parse_params({"count": -1, "inner": {"rates": []}, "extra": 1}, Outer, "")
    assert {line.split(":")[0] for line in str(error.value).splitlines()} == {"count", "low", "extra"}


@pytest.mark.parametrize(("text", "message"), [
    ("trian: {}\n", r"trian: unknown section; did you mean train\?"),
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


def eight(name: str) -> str:
    return "[" + f"*{name}, " * 8 + "]"


FOREIGN: dict[str, tuple[str, str]] = {  # what stands behind `train: ` -> what is said of it
    "date": ("{count: 2020-01-01}", r"train\.count: expected text, a number, .*, found a date; quote"),
    "time": ("{count: 2020-01-01T10:00:00Z}", r"train\.count: expected text, .*, found a date; quote"),
    "binary": ("{count: !!binary aGVsbG8=}", r"train\.count: expected text, .*, found a binary value; quote"),
    "set": ("{count: !!set {a, b}}", r"train\.count: expected text, .*, found a set; quote"),
    "object": ("!!python/object:os.system x", r", line 9: not valid YAML 1\.2: could not determine a constructor for the tag"),
    "tag": ("!!int abc", r": not valid YAML 1\.2: "),
    "key": ("{1: 2}", r"train: expected names as keys, found 1; quote it"),
    "list as key": ("{? [a] : 2}", r"train: expected names as keys, found \["),
    "deep": ("[" * 3000, r": expected at most 32 levels of keys and lists, found more"),
    "deep but short": ("[" * 40 + "]" * 40, r"train\.0\.0.*: expected at most 32 levels of keys and lists, found more"),
    "endless": ("&a [*a]", r"train\.0.*: expected at most 32 levels"),
    "unfolding": (f"[&a {[1] * 8}, &b {eight('a')}, &c {eight('b')}, &d {eight('c')}, &e {eight('d')}, &f {eight('e')}]",
                  r"expected fewer than 100,000 values, found more, by aliases"),
    "huge": ("{count: 1" + "0" * 400 + "}", r"train\.count: expected a number of at most 64 bits, found one of 1329"),
    "digits": ("{count: " + "1" * 5000 + "}", r": not valid YAML 1\.2: Exceeds the limit"),
    "surrogate": ('{count: "\\ud800"}', r"train\.count: expected text that UTF-8 can hold, found"),
    "unclosed": ("[", r", line 10: not valid YAML 1\.2: "),
    "two documents": ("{}\n---\n{}", r", line 10: not valid YAML 1\.2: but found another document"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_json_has_not_is_one_line(tmp_path: Path, kind: str) -> None:
    text, message = FOREIGN[kind]
    with pytest.raises(ParamsError) as error:
        read_params(write(tmp_path / "p.yaml", f"train: {text}\n"))
    assert re.match(re.escape(str(tmp_path / "p.yaml")) + r"(: )?" + message, str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300 + len(str(tmp_path))


@pytest.mark.parametrize(("encoding", "byte"), [("latin-1", "0xe9"), ("utf-16", "0xff"), ("utf-32", "0xff")])
def test_files_in_other_encodings_are_named(tmp_path: Path, encoding: str, byte: str) -> None:
    path = write(tmp_path / "p.yaml", "train: {} # caf\u00e9\n")
    path.write_bytes(path.read_text().encode(encoding))
    with pytest.raises(ParamsError, match=rf"p\.yaml, line \d: expected text in UTF-8, found the byte {byte}; save the file as UTF-8$"):
        read_params(path)
    path.write_bytes(path.read_bytes().decode(encoding).encode("utf-8-sig"))
    assert read_params(path)["train"] == {}


BAD_VALUES: list[Any] = [None, True, -1, 2**63, 2**64 - 1, -1.5, 1e300, float("nan"), "x", "", [], {}, ["x"], {"a": 1}, [[1, 2]], [None],
                         [-1], [[-1, 5]]]


def test_no_mistake_in_any_key_shows_what_pydantic_says() -> None:
    """Every value of the parameter file, replaced by values of other kinds."""
    params = read_params(Path(__file__).parents[1] / "params.yaml")

    def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            yield from paths(inner, (*path, key))

    lines = []
    for *parents, last in filter(None, paths(params)):
        for bad in BAD_VALUES:
            changed = copy.deepcopy(params)
            section: Any = changed
            for key in parents:
                section = section[key]
            section[last] = bad
            try:
                parse_params(changed, PipelineParams, "")
            except ParamsError as error:
                lines += (found := str(error).splitlines())
                keys = [line.partition(":")[0] for line in found]
                assert not any(other.startswith(f"{key}.") for key in keys for other in keys), found
    assert len(lines) > 1000
    known = r"expected .|missing; presets/default|unknown key; (did you mean|presets/default)"
    assert [line for line in lines if not re.match(rf"[\w., ]+: ({known})", line)] == []
    assert [line for line in lines if re.search(r"Input should|valid |constrained|function-|literal\[|instance of|nullable", line)] == []


@pytest.mark.parametrize(("change", "message"), [
    ({"train": {"matrix_lr": 0.1}}, "train.matrix_lr: unknown key; did you mean train.optimizer.matrix_lr?"),
    ({"train": {"precision": "fp23"}}, 'train.precision: expected fp32 or bf16, found "fp23"; did you mean fp32?'),
    ({"quantize": {"bits": {"mlp": 9}}}, "quantize.bits.mlp: expected 2 to 8, or 16 for fp16 without quantization or free, found 9"),
    ({"train": {"budget_steps": -3}}, "train.budget_steps: expected a number above 0 or a list, found -3"),
])
def test_what_may_have_been_meant(change: dict[str, Any], message: str) -> None:
    params: Any = read_params(Path(__file__).parents[1] / "params.yaml")

    def merge(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        return values | {key: merge(values[key], value) if isinstance(value, dict) else value for key, value in changes.items()}

    with pytest.raises(ParamsError) as error:
        parse_params(merge(params, change), PipelineParams, "")
    assert message in str(error.value).splitlines()


@pytest.mark.parametrize(("section", "value", "message"), [
    ("seeds", [-1], "seeds.0: expected a number from 0, found -1"), ("seeds", [], "seeds: expected a list of 1 or more, found []"),
    ("train", {"budget_steps": [[0, 0]]}, "train.budget_steps.0.1: expected a number above 0, found 0"),
    ("quantize", {"clip": {"percentiles": ["x"]}}, 'quantize.clip.percentiles.0: expected a number, found "x"')])
def test_one_mistake_is_one_line(section: str, value: Any, message: str) -> None:
    params: Any = read_params(Path(__file__).parents[1] / "params.yaml")
    for key, inner in value.items() if isinstance(value, dict) else ():
        value = params[section] | {key: params[section][key] | inner if isinstance(inner, dict) else inner}
    with pytest.raises(ParamsError) as error:
        parse_params(params | {section: value}, PipelineParams, "")
    assert str(error.value) == message


def test_seeds_reach_as_far_as_torch_takes_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    params = read_params(Path(__file__).parents[1] / "params.yaml")
    assert parse_params(params | {"seeds": [0, MAX_SEED]}, PipelineParams, "").seeds == (0, MAX_SEED)
    monkeypatch.setattr(sys, "argv", ["stage", "--seed", str(MAX_SEED)])
    torch.Generator().manual_seed(parse_seed(None))
    for seed in (str(MAX_SEED + 1), "-1", "1e3", "9" * 5000):
        monkeypatch.setattr(sys, "argv", ["stage", "--seed", seed])
        with pytest.raises(SystemExit):
            parse_seed(None)
        assert f"expected a whole number from 0 to {MAX_SEED}, found {seed[:60]}" in capsys.readouterr().err
