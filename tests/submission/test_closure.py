import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest

from lib.submission import closure
from lib.submission.closure import import_closure, imported_packages

ROOT = Path(__file__).resolve().parents[2]


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def make_project(root: Path) -> None:
    write(root, stages__run="import os\nimport numpy.linalg\nfrom lib.a import f\nimport lib.b.c\n",
          lib__a="from lib import d\nfrom .b import e\n", lib__b__c="def g():\n    from ..late import *\n", lib__b__e="import stages.run\n",
          lib__d="# é\n", lib__late="", lib__unused="")
    for package in ("stages", "lib", "lib/b"):
        (root / package / "__init__.py").write_text("")


def test_closure_follows_every_kind_of_import(tmp_path: Path) -> None:
    make_project(tmp_path)
    found = [path.as_posix() for path in import_closure(Path("stages/run.py"), tmp_path)]
    assert found == ["lib/__init__.py", "lib/a.py", "lib/b/__init__.py", "lib/b/c.py", "lib/b/e.py", "lib/d.py", "lib/late.py",
                     "stages/__init__.py", "stages/run.py"]


def test_imports_of_packages_count(tmp_path: Path) -> None:
    make_project(tmp_path)
    (tmp_path / "lib/b/__init__.py").write_text("from lib.unused import x\n")
    assert Path("lib/unused.py") in import_closure(Path("stages/run.py"), tmp_path)


def test_packages_are_those_that_are_imported_and_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(tmp_path)
    distributions = {**packages_distributions(), "lib": ["pytest"],  # as where this project itself is installed
                     "ruamel": ["ruamel.yaml", "pytest"]}  # two parts of a namespace, of which one is imported
    monkeypatch.setattr(closure, "packages_distributions", lambda: distributions)
    write(tmp_path, lib__a="import json, ruamel.yaml\nimport lib.d\n", lib__d="def f():\n    from tqdm import tqdm\n    import absent\n")
    paths = import_closure(Path("stages/run.py"), tmp_path)
    assert imported_packages(paths, tmp_path) == {name: version(name) for name in ("numpy", "ruamel.yaml", "tqdm")}


def test_missing_entry_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        import_closure(Path("stages/nothing.py"), tmp_path)


@pytest.mark.slow
def test_closure_is_what_python_loads() -> None:
    """Nothing that importing the submitted program loads is missing, and the audit, which computes no score, is no part of it."""
    script = ("import sys, lib.submission.program\n"
              "print(*(module.__file__ for name, module in sys.modules.items() if name.split('.')[0] in ('lib', 'stages')), sep='\\n')")
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    loaded = sorted(Path(file).relative_to(ROOT) for file in output)
    assert loaded == list(import_closure(Path("lib/submission/program.py"), ROOT))
    assert not any(path.is_relative_to("lib/audit") for path in loaded)
