"""dvc.yaml says the truth: code, parameters and data of every stage are what the stage really uses."""

import ast
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.params import SECTIONS

ROOT = Path(__file__).parents[1]
PIPELINE: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
TOKENS_FOR_ALL = {f"artifacts/tokenize/{name}" for name in ("metrics.json", "tokenizer.model", "train", "heldout")}
TOOLS = {"audit", "imports", "inspect", "score"}  # entry points that are no stages of the pipeline
UNDECLARED_CODE = {"lib/errors.py", "lib/problems.py", "lib/progress.py", "stages/__init__.py"}  # print, and nothing else
CONFINEMENT = "lib/audit/isolation.py"  # takes files from the stages that make the artifact; their results are the same without it
WATCH = ["lib.forecast.watch", "lib.forecast.corpus"]  # so do these, or refuse, but they need much code, and other parameters, to do it
SUBMITTED = "score"  # the entry point whose code is submitted
USE_SUBMITTED = {"quantize", "compress", "report"}  # they count its bytes or write it out, those of lib/progress.py included

IMPORTED_FILES = """
import sys
from unittest.mock import MagicMock
sys.modules.update(dict.fromkeys({watch!r}, MagicMock()))
import stages.{stage}
for module in list(sys.modules.values()):
    path = getattr(module, "__file__", None)
    if path and path.startswith({root!r} + "/") and "/.venv/" not in path:
        print(path[len({root!r}) + 1:])
"""


def paths(stage: str, kind: str) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in STAGES[stage].get(kind, [])]


def code(stage: str) -> set[str]:
    return {path for path in paths(stage, "deps") if path.startswith(("lib/", "stages/"))}


def imported_code(stage: str) -> set[str]:
    """Files with content that a fresh interpreter has loaded after importing the stage."""
    script = IMPORTED_FILES.format(stage=stage, root=str(ROOT), watch=WATCH)
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {path for path in output.split() if (ROOT / path).stat().st_size}


IMPORTED: dict[str, set[str]] = {}


@pytest.mark.parametrize("stage", STAGES)
def test_declared_code_is_the_imported_code(stage: str) -> None:
    for needed in (stage, SUBMITTED):
        if needed not in IMPORTED:
            IMPORTED[needed] = imported_code(needed)
    undeclared = UNDECLARED_CODE | ({CONFINEMENT} if stage in ("train", "calibrate", "quantize") else set())
    expected = (IMPORTED[stage] - undeclared) | (IMPORTED[SUBMITTED] if stage in USE_SUBMITTED else set())
    templates = {path for path in code(stage) if not path.endswith(".py")}
    assert code(stage) - templates == expected
    assert all((ROOT / path).is_file() for path in templates)


def test_code_that_is_not_declared_is_of_train_and_tokenize_which_do_not_depend_on_the_parameters_that_it_reads() -> None:
    """What that code computes is printed, or refused; tests/forecast/test_watch.py sees that the training does not change."""
    assert {path.stem for path in (ROOT / "stages").glob("*.py") if "lib.forecast" in path.read_text()} == {"tokenize", "train"}
    assert STAGES["tokenize"]["params"] == ["tokenize"]
    assert STAGES["train"]["params"] == ["model", "train"]


def test_stages_have_the_name_of_their_script_and_say_what_they_do() -> None:
    assert set(STAGES) == {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"} - TOOLS
    for name, stage in STAGES.items():
        assert f"-m stages.{name}" in stage["cmd"]
        assert re.fullmatch(r".+ -> .+", stage["desc"])


@pytest.mark.parametrize("stage", STAGES)
def test_declared_params_are_the_loaded_sections(stage: str) -> None:
    tree = ast.parse((ROOT / f"stages/{stage}.py").read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    loaded = {node.args[0].value for node in calls if node.func.id == "load_params" and isinstance(node.args[0], ast.Constant)}  # type: ignore[attr-defined]
    if any(node.func.id == "read_params" for node in calls):  # type: ignore[attr-defined]
        loaded = set(SECTIONS)
    assert {key.split(".")[0] for key in STAGES[stage]["params"]} == loaded


def test_only_evaluate_reads_validation_tokens() -> None:
    tokens = {name: {path for path in paths(name, "deps") if path.startswith("artifacts/tokenize")} for name in STAGES}
    assert {name for name in STAGES if tokens[name] - TOKENS_FOR_ALL} == {"evaluate"}
    sources = {path.stem: path.read_text() for path in (ROOT / "stages").glob("*.py")}
    assert {name for name, source in sources.items() if '"val"' in source} <= {"evaluate"} | TOOLS


def test_evaluate_reads_nothing_but_the_artifact_the_tokenizer_the_validation_tokens_and_the_manifest() -> None:
    assert set(paths("evaluate", "deps")) - code("evaluate") == {
        "artifacts/compress/seed${item.seed}/model.ptz", "artifacts/tokenize/manifest.json", "artifacts/tokenize/tokenizer.model",
        "artifacts/tokenize/val"}


def test_no_stage_reads_a_later_one_and_each_writes_only_its_own_folder() -> None:
    order = list(STAGES)
    for position, name in enumerate(order):
        for path in paths(name, "deps"):
            if path.startswith("artifacts/"):
                assert order.index(path.split("/")[1]) < position
        for kind in ("outs", "metrics", "plots"):
            assert all(path.startswith(f"artifacts/{name}/") for path in paths(name, kind))


def test_outputs_stay_in_the_run_cache() -> None:
    """`cache: false` or `persist: true` under outs silently disables the run cache; metrics and plots are in git instead."""
    for name, stage in STAGES.items():
        assert all(isinstance(entry, str) for entry in stage["outs"]), name
        for entry in stage.get("metrics", []) + stage.get("plots", []):
            assert next(iter(entry.values()))["cache"] is False, name


def test_git_ignores_what_dvc_keeps_and_nothing_else() -> None:
    kept = [path.replace("${item.seed}", "1") for name in STAGES for path in paths(name, "outs")]
    shown = [path.replace("${item.seed}", "1") for name in STAGES for kind in ("metrics", "plots") for path in paths(name, kind)]
    command = ["git", "check-ignore", "--no-index", *kept, *shown]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert ignored == kept


def test_process_count_invalidates_nothing() -> None:
    """It is in the environment, not in the command, of which DVC keeps a record."""
    for name in ("train", "calibrate", "quantize", "evaluate"):
        nodes = "\\${RENDEZVOUS} " if name == "train" else ""
        assert STAGES[name]["cmd"].startswith(f"python -m lib.launch {nodes}-m stages.{name} ")
