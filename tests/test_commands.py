"""The commands of docs/experiments.md, run as they stand there in a clone, and what they run again."""

import re
import time
from pathlib import Path

import pytest

from tests.clone import Clone, stages_run

pytestmark = pytest.mark.xdist_group("commands")

ROOT = Path(__file__).parents[1]
SEED = 1337
OF_A_SEED = {f"{stage}@{SEED}" for stage in ("train", "calibrate", "quantize", "compress", "evaluate")}
AFTER_QUANTIZE = {f"{stage}@{SEED}" for stage in ("quantize", "compress", "evaluate")} | {"report"}
COMMANDS: dict[str, set[str]] = {  # what runs again; in this order
    f"dvc repro evaluate@{SEED}": {"tokenize", *OF_A_SEED},
    f"dvc repro --single-item quantize@{SEED}": set(),
    "dvc repro": {"report"},
    'git add --all && git commit --message "Run"': set(),
    "dvc exp run --set-param quantize.bits.mlp=4": AFTER_QUANTIZE,
    'git add --all && git commit --message "Four bits"': set(),
    'make compare REVS="HEAD~1 HEAD"': set(),
    "dvc params diff HEAD~1": set(),
    "dvc metrics diff HEAD~1": set(),
    "dvc plots diff HEAD~1": set(),
    "dvc exp run --queue --name grid --set-param quantize.method=gptq,rtn": set(),
    "dvc queue start": set(),
    "dvc queue status": set(),
    "make compare": set(),
    "dvc exp apply grid-2": set(),
    "git restore --source HEAD~1 params.yaml && dvc repro": set(),
    "git checkout --force --detach HEAD~1 && dvc checkout --force": set(),
    "dvc commit --force": set(),
}


def test_the_commands_of_the_page_do_what_it_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "docs/experiments.md").read_text(), re.DOTALL)
    assert [re.split(r"  +#", line)[0].strip() for block in blocks for line in block.splitlines()] == list(COMMANDS)

    short = {"train": {"budget_steps": 10}, "evaluate": {"strategies": ["plain"], "strategy": "plain"}}
    clone = Clone(tmp_path, {"seeds": [SEED], **short})
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/installed").touch()  # so that make uses the environment of this test
    shown = {}
    for command, expected in COMMANDS.items():
        shown[command] = clone.run("sh", "-c", command)
        assert stages_run(shown[command]) == expected, command
        if command == "dvc queue start":
            wait_for_queue(clone)
        if command.startswith("git checkout"):
            assert clone.run("git", "status", "--porcelain", "--untracked-files=no") == ""
            with (tmp_path / "lib/training/loop.py").open("a") as code:
                code.write("# a comment\n")
            assert f"train@{SEED}" in clone.run("dvc", "status")

    compared = shown['make compare REVS="HEAD~1 HEAD"'].splitlines()
    assert compared[1].split() == ["quantize.bits.mlp", "free", "4"]
    (scores,) = (line.split() for line in compared if line.startswith("val_bpb"))
    assert "-" not in scores[1:3]
    assert re.search(r"quantize\.bits\.mlp +free +4", shown["dvc params diff HEAD~1"])
    assert re.search(r"seed1337/metrics\.json +val_bpb +\d", shown["dvc metrics diff HEAD~1"])
    assert (tmp_path / "dvc_plots/index.html").exists()
    grid = {line.split()[0]: line.split()[1:] for line in shown["make compare"].splitlines()[1:]}
    assert {name: cells[0] for name, cells in grid.items()} == {"HEAD": "gptq", "workspace": "gptq", "grid-1": "gptq", "grid-2": "rtn"}
    assert grid["grid-1"] == grid["HEAD"]
    assert grid["grid-2"][1:] != grid["HEAD"][1:]
    assert "up to date" in clone.run("dvc", "status")


def wait_for_queue(clone: Clone) -> None:
    """Until both experiments of the grid are there; asking git costs far less than asking DVC."""
    deadline = time.monotonic() + 300
    while not {"grid-1", "grid-2"} <= set(clone.run("git", "for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split()):
        assert time.monotonic() < deadline, clone.run("dvc", "queue", "status")
        time.sleep(0.5)
