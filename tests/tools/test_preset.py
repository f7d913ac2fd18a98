"""`make preset`: what it writes, what it does not overwrite, what it says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lib.params import ParamsError
from lib.presets import compose_preset, list_presets
from tools.preset import apply_preset, describe_parameters, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with params.yaml and the presets."""
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "presets/default.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    for command in ("init --quiet", "add --all", "-c user.name=test -c user.email=test@example.org commit --quiet --message start"):
        subprocess.run(["git", *command.split()], check=True)
    return tmp_path


def run(*arguments: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["preset", *arguments])
        main()


@pytest.mark.slow
def test_a_preset_replaces_what_git_or_another_preset_has(workspace: Path) -> None:
    for name in list_presets():
        apply_preset(name)
        assert (workspace / "params.yaml").read_text() == compose_preset(name)
        assert describe_parameters() == f"params.yaml is the preset {name}"
    (workspace / "params.yaml").unlink()
    apply_preset("pr585")
    assert (workspace / "params.yaml").read_text() == compose_preset("pr585")


def test_a_preset_does_not_replace_work(workspace: Path) -> None:
    edited = (workspace / "params.yaml").read_text().replace("damping: 0.003", "damping: 0.004")
    (workspace / "params.yaml").write_text(edited)
    with pytest.raises(ParamsError, match=r"found some that are not committed; commit them, or drop them with `git restore params\.yaml`"):
        apply_preset("pr585")
    assert (workspace / "params.yaml").read_text() == edited
    assert describe_parameters() == "params.yaml is the preset default, but for quantize.damping"


def test_a_preset_that_is_unknown_or_wrong_changes_nothing(workspace: Path) -> None:
    before = (workspace / "params.yaml").read_bytes()
    with pytest.raises(ParamsError, match=r"NAME: expected a preset, found 'pr584'; did you mean pr585\?"):
        apply_preset("pr584")
    preset = workspace / "presets/pr585.yaml"
    preset.write_text(preset.read_text().replace("num_layers: 11", "num_layers: 0"))
    with pytest.raises(ParamsError, match=r"presets/pr585\.yaml: model\.num_layers"):
        apply_preset("pr585")
    assert (workspace / "params.yaml").read_bytes() == before


def test_it_says_which_preset_is_active_and_what_it_needs(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pr585-brief")
    printed = capsys.readouterr().out
    assert printed.startswith("params.yaml is now the preset pr585-brief:\n  Entry #585's model in full size")
    assert "\n  Needs two CPU cores for 40 minutes" in printed and "\n  Run it with: make repro ARGS=calibrate\n" in printed


def test_without_a_name_it_lists_them(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run()
    usage, *listed, active = capsys.readouterr().err.splitlines()
    assert (end.value.code, usage, active) == (2, "usage: make preset NAME=pr585", "params.yaml is the preset default")
    assert [line.split()[0] for line in listed] == list(list_presets()) and all(len(line) < 150 for line in listed)


def test_with_a_wrong_name_it_lists_them(workspace: Path) -> None:
    with pytest.raises(SystemExit) as end:
        run("deflaut")
    problem, *listed = str(end.value.code).splitlines()
    assert problem == "NAME: expected a preset, found 'deflaut'; did you mean default?"
    assert [line.split()[0] for line in listed] == list(list_presets())
