"""Revisions side by side, from a git repository made here: commits, a branch, and experiments under the references that DVC gives them."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tools.compare import RevisionError, changed_keys, find_experiments, format_revisions, main, read_revision

PARAMS: dict[str, Any] = {"seeds": [1], "quantize": {"damping": 0.01, "bits": {"mlp": 5, "head": 8}, "bits_of": {}}}
REPORT = {"evaluate": {"val_bpb": {"mean": 1.25}}, "compress": {"artifact_bytes": {"mean": 123456.0}}}


def git(*arguments: str) -> str:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def write_run(params: dict[str, Any], report: dict[str, Any], recorded: dict[str, Any] | None = None) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.dump(params, Path("params.yaml"))
    yaml.dump({"stages": {"report": {"params": {"params.yaml": recorded or params}}}}, Path("dvc.lock"))
    Path("artifacts/report").mkdir(parents=True, exist_ok=True)
    Path("artifacts/report/metrics.json").write_text(json.dumps(report))


def commit(message: str) -> str:
    git("add", "--all")
    git("commit", "--quiet", "--message", message)
    return git("rev-parse", "HEAD")


@pytest.fixture(autouse=True)
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three commits, the last of them an experiment that started from the second, and the second checked out."""
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=trunk")
    write_run(PARAMS, REPORT)
    commit("first")
    fewer_bits = {**PARAMS["quantize"], "bits": {"mlp": 4, "head": 8}}
    write_run({**PARAMS, "quantize": fewer_bits}, {**REPORT, "evaluate": {"val_bpb": {"mean": 1.5}}})
    second = commit("second")
    git("checkout", "--quiet", "--detach")
    write_run({**PARAMS, "quantize": {**fewer_bits, "damping": 0.1}}, REPORT)
    git("update-ref", f"refs/exps/{second[:2]}/{second[2:]}/tidy-newt", commit("experiment"))
    git("update-ref", "refs/exps/exec/EXEC_HEAD", second)
    git("checkout", "--quiet", "trunk")


def test_two_revisions_are_columns_with_their_difference() -> None:
    assert format_revisions([read_revision(name, {}) for name in ("HEAD~1", "trunk")]).splitlines() == [
        "                      HEAD~1    trunk",
        "quantize.bits.mlp          5        4",
        "audit                      -        -",
        "val_bpb               1.2500   1.5000  +0.2500",
        "held-out bpb               -        -",
        "held-out bpb, float        -        -",
        "KL                         -        -",
        "bytes                123,456  123,456       +0",
    ]


HELDOUT = {key: {"mean": value} for key, value in {"heldout_bpb": 1.25, "heldout_kl": 0.5, "heldout_tokens": 100.0}.items()}


@pytest.mark.parametrize(("label", "change", "reason"), [
    ("val_bpb", {"evaluate": {"strategy": "plain"}}, "other evaluate.strategy"),
    ("val_bpb", {"compress": {"limit_bytes": 2}}, "other compress.limit_bytes"),
    ("val_bpb", {"evaluate": {"val_bpb": 1.0, "num_bytes": 2}}, "other evaluate num_bytes"),
    ("val_bpb", {"tokenize": {"vocab_size": 512}}, "+0.0000"),  # other tokens for the same bytes
    ("held-out bpb", {"tokenize": {"vocab_size": 512, "seed": 1, "path": "a"}}, "other tokenize.path, tokenize.seed, ..."),
    ("KL", {"quantize": {"heldout_tokens": 50}}, "other quantize heldout_tokens"),
    ("KL", {"quantize": {"damping": 0.5}}, "+0.00000"),
    ("bytes", {"evaluate": {"strategy": "plain"}}, "+0"),
])
def test_figures_of_other_texts_and_strategies_are_not_subtracted(label: str, change: dict[str, Any], reason: str) -> None:
    report = {**REPORT, "evaluate": {key: {"mean": value} for key, value in (("val_bpb", 1.25), ("num_bytes", 1))}, "quantize": HELDOUT}
    stage, values = next(iter(change.items()))
    params = {**PARAMS, "evaluate": {"strategy": "lora", "limit_seconds": 1}, "compress": {"limit_bytes": 1}}
    write_run(params, report)
    commit("before")
    metrics = {key: {"mean": value} for key, value in values.items() if key in report.get(stage, {})}
    settings = {key: value for key, value in values.items() if key not in report.get(stage, {})}
    write_run({**params, stage: {**params.get(stage, {}), **settings}}, {**report, stage: {**report.get(stage, {}), **metrics}})
    lines = format_revisions([read_revision(name, {}) for name in ("HEAD", "workspace")]).splitlines()
    assert next(line.split("  ")[-1].strip() for line in lines if line.startswith(label + " ")) == reason


def write_strategies(**bpb: float) -> None:
    report = {"val_bpb": 1.0, "num_bytes": 10.0, **{f"{name}_bpb": value for name, value in bpb.items()}}
    write_run(PARAMS, {"evaluate": {key: {"mean": value} for key, value in report.items()}})


def test_every_strategy_that_both_have_is_a_row_and_the_others_are_named() -> None:
    write_strategies(plain=1.5, lora=1.25, two_phase_transductive=1.0, phased=1.0)
    commit("before")
    write_strategies(plain=1.25, two_phase_transductive=1.5, score_first=2.0, sliding=3.0)
    lines = format_revisions([read_revision(name, {}) for name in ("HEAD", "workspace")]).splitlines()
    assert [line.split() for line in lines[-4:]] == [
        ["plain", "bpb", "1.5000", "1.2500", "-0.2500"], ["two_phase", "bpb,", "not", "legal", "1.0000", "1.5000", "+0.5000"],
        ["only", "HEAD:", "lora", "bpb,", "phased", "bpb"], ["only", "workspace:", "score_first", "bpb,", "sliding", "bpb"]]


def test_what_was_not_checked_is_neither_legal_nor_not() -> None:
    for verdict in ("legal", "NOT CHECKED"):
        write_run(PARAMS, {**REPORT, "audit": {"verdict": verdict}})
        commit(verdict)
    revisions = [read_revision(name, {}) for name in ("HEAD~1", "HEAD", "trunk~2")]
    assert format_revisions(revisions[:2]).splitlines()[1].split() == ["audit", "legal", "NOT", "CHECKED"]
    assert [line.split("  ")[0] for line in format_revisions(revisions).splitlines()[2:3]] == ["HEAD"]
    assert "NOT CHECKED" in format_revisions(revisions).splitlines()[2]


def test_of_more_revisions_it_is_said_what_cannot_be_compared_with_the_first() -> None:
    write_run({**PARAMS, "evaluate": {"strategy": "lora"}}, REPORT)
    assert format_revisions([read_revision(name, {}) for name in ("HEAD", "HEAD~1", "workspace")]).splitlines()[4:] == [
        "workspace: val_bpb is not to be compared with HEAD: other evaluate.strategy"]


def test_more_are_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without arguments: HEAD, the workspace, and the experiments of HEAD only, not what DVC keeps beside them."""
    monkeypatch.setattr("sys.argv", ["revisions"])
    main()
    cells = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert cells[0][:3] == ["quantize.damping", "audit", "val_bpb"]
    assert [line[:4] for line in cells[1:]] == [
        ["HEAD", "0.01", "-", "1.5000"], ["workspace", "0.01", "-", "1.5000"], ["tidy-newt", "0.1", "-", "1.2500"]]
    assert list(find_experiments()) == ["tidy-newt"]
    git("checkout", "--quiet", "HEAD~1")
    main()
    assert "tidy-newt" not in capsys.readouterr().out


def test_one_is_compared_with_the_workspace(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["revisions", "tidy-newt"])
    main()
    assert capsys.readouterr().out.splitlines()[0].split() == ["tidy-newt", "workspace"]


def test_figures_of_other_parameters_are_not_shown() -> None:
    """Parameters were changed and nothing was run since: the report on disk is not theirs."""
    assert read_revision("workspace", {}).metrics == {"evaluate": {"val_bpb": 1.5}, "compress": {"artifact_bytes": 123456.0}}
    write_run({**PARAMS, "seeds": [1, 2]}, REPORT, recorded=PARAMS)
    assert read_revision("workspace", {}).metrics == {}
    expected = "workspace: no figures, for there is no report on these parameters; `make repro` makes it"
    for names in (["HEAD", "workspace"], ["HEAD", "HEAD~1", "workspace"]):
        assert format_revisions([read_revision(name, {}) for name in names]).splitlines()[-1] == expected


def test_a_value_of_another_type_is_a_change() -> None:
    first = read_revision("HEAD", {})
    second = first._replace(params={**first.params, "seeds": (1,), "quantize.bits_of": None, "quantize.damping": 0.01})
    assert set(changed_keys([first, second])) == {"seeds", "quantize.bits_of"}


def test_an_unknown_revision_is_named() -> None:
    with pytest.raises(RevisionError, match=r"nowhere: expected a commit, branch, tag or experiment with a params\.yaml"):
        read_revision("nowhere", {})
