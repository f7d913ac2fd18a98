"""Which package may import which: the layers of the project, as a table."""

import ast
from pathlib import Path

import pytest

BASE = {"errors", "params", "progress", "distributed"}
ALLOWED = {  # package or module below lib -> what of lib it may import, besides itself
    "errors": set(),
    "problems": set(),
    "params": {"errors", "problems"},
    "progress": set(),
    "distributed": {"errors"},
    "startup": {"errors"},
    "artifacts": {"errors", "problems", "progress"},
    "data": BASE | {"artifacts"},
    "model": {"errors", "params"},
    "compression": {"errors", "params", "problems", "artifacts"},
    "calibration": BASE | {"artifacts", "data", "model"},
    "quantization": BASE | {"artifacts", "data", "model"},
    "evaluation": BASE | {"artifacts", "data", "model"},
    "generation": BASE | {"data", "model", "evaluation"},
    "audit": BASE | {"artifacts", "data", "model", "evaluation", "compression"},
    "training": BASE | {"artifacts", "data", "model", "quantization", "evaluation"},
    "published": {"errors", "params", "artifacts", "model", "compression"},
    "forecast": BASE | {"artifacts", "data", "model", "calibration", "training", "quantization", "compression"},
    "reporting": {"errors", "params", "artifacts"},
    "submission": BASE | {"artifacts", "data", "model", "calibration", "training", "quantization", "compression", "evaluation",
                          "reporting"},
}
ALLOWED["schema"] = set(ALLOWED)
ALLOWED["presets"] = {"params", "problems", "schema"}

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path.relative_to(ROOT) for folder in ("lib", "stages", "tools") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    tree = ast.parse((ROOT / path).read_text())
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in ast.walk(tree)), f"{path}: relative import"
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_follow_the_table(path: Path) -> None:
    own = [name.split(".") for name in imported_modules(path) if name.split(".")[0] in ("lib", "stages", "tools", "tests", "bench")]
    if path.parts[0] in ("stages", "tools"):
        assert {name[0] for name in own} <= {"lib"}, "stages and tools import only lib"
        return
    layer = path.parts[1].removesuffix(".py")
    if layer == "__init__":
        assert not own
        return
    assert {name[0] for name in own} <= {"lib"}, "lib imports only lib"
    assert {name[1] for name in own} - {layer} <= ALLOWED[layer]


def test_only_the_sweep_needs_dvc() -> None:
    """So that stages and report run on a machine without it."""
    users = {str(path) for path in SOURCES if any(name.split(".")[0] == "dvc" for name in imported_modules(path))}
    assert users == {"tools/sweep.py"}
    assert not any("tools.sweep" in imported_modules(path) for path in SOURCES)


def test_the_table_names_what_exists() -> None:
    existing = {path.parts[1].removesuffix(".py") for path in SOURCES if path.parts[0] == "lib"} - {"__init__"}
    assert set(ALLOWED) == existing


@pytest.mark.parametrize("path", [path for path in SOURCES if path.parts[0] == "stages"], ids=str)
def test_stages_are_short(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name.endswith("config.py")], ids=str)
def test_parameter_classes_need_no_torch(path: Path) -> None:
    """So that the whole parameter file can be checked in a fraction of a second."""
    assert not {name.split(".")[0] for name in imported_modules(path)} & {"torch", "numpy", "scipy", "sentencepiece"}
