"""dvc.yaml says the truth: code, parameters and data of every stage are what the stage really uses."""

import ast
import copy
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from lib.params import SECTIONS
from tools.deps import fill_in

ROOT = Path(__file__).parents[1]
PIPELINE: dict[str, Any] = YAML(typ="safe", pure=True).load(ROOT / "dvc.yaml")
STAGES: dict[str, dict[str, Any]] = PIPELINE["stages"]
TOKENS_FOR_ALL = {f"artifacts/tokenize/{name}" for name in ("metrics.json", "tokenizer.model", "train", "heldout")}


def paths(stage: str, kind: str) -> list[str]:
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in STAGES[stage].get(kind, [])]


def code(stage: str) -> set[str]:
    return {path for path in paths(stage, "deps") if path.startswith(("lib/", "stages/"))}


@pytest.mark.slow
def test_declared_code_is_what_make_deps_writes() -> None:
    """Two lists are looked at by hand, because the rest is what the tool says itself."""
    filled = copy.deepcopy(PIPELINE)
    fill_in(filled, ROOT)
    assert filled == PIPELINE
    assert code("tokenize") >= {"stages/tokenize.py", "lib/data/corpus.py", "lib/artifacts/tokens.py"}
    assert {path.split("/")[1] for path in code("compress")} >= {"compression", "submission", "evaluation", "model"}


def test_what_a_stage_does_not_compute_with_it_does_not_depend_on() -> None:
    """A clip rule trains nothing anew, and code that evaluates quantizes nothing anew."""
    assert not any(path.startswith(("lib/quantization/", "lib/compression/")) for path in code("calibrate"))
    assert {path for path in code("train") | code("calibrate") | code("quantize") if path.startswith("lib/evaluation/")} == {
        "lib/evaluation/bpb.py", "lib/evaluation/heldout.py"}
    for stage in ("train", "calibrate", "quantize"):
        assert not any(path.startswith(("lib/submission/", "lib/reporting/", "lib/audit/")) for path in code(stage))


def test_code_that_is_not_declared_is_of_train_and_tokenize_which_do_not_depend_on_the_parameters_that_it_reads() -> None:
    """What that code computes is printed, or refused; tests/forecast/test_watch.py sees that the training does not change."""
    assert {path.stem for path in (ROOT / "stages").glob("*.py") if "lib.forecast" in path.read_text()} == {"tokenize", "train"}
    assert STAGES["tokenize"]["params"] == ["tokenize"]
    assert STAGES["train"]["params"] == ["model", "train"]


def test_stages_have_the_name_of_their_script_and_say_what_they_do() -> None:
    assert set(STAGES) == {path.stem for path in (ROOT / "stages").glob("*.py")} - {"__init__"}
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


def test_keys_that_quantize_declares_of_another_section_are_those_that_it_reads() -> None:
    sources = (ROOT / path for path in ("stages/quantize.py", "lib/compression/budget.py"))  # artifact_bytes reads what the stage gives it
    read = {key for source in sources for key in re.findall(r"\bcoding\.(\w+)", source.read_text())}
    assert {key for key in STAGES["quantize"]["params"] if "." in key} == {f"compress.{key}" for key in read}


def test_only_evaluate_reads_validation_tokens() -> None:
    tokens = {name: {path for path in paths(name, "deps") if path.startswith("artifacts/tokenize")} for name in STAGES}
    assert {name for name in STAGES if tokens[name] - TOKENS_FOR_ALL} == {"evaluate"}
    sources = {path.stem: path.read_text() for path in (ROOT / "stages").glob("*.py")}
    assert {name for name, source in sources.items() if '"val"' in source} <= {"evaluate"}


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
        assert STAGES[name]["cmd"].startswith(f"python -m tools.launch {nodes}-m stages.{name} ")
