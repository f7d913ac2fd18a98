import ast
import io
import json
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Any

import pytest

from lib.presets import list_presets, read_preset
from lib.submission.bundle import SETTINGS_BYTES, bundle_sources, code_bytes, list_packages, make_bundle, strip_source
from lib.submission.closure import import_closure

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("lib", "stages") for path in (ROOT / folder).rglob("*.py"))
SCORE = '''"""What is submitted."""
import inspect, json, pickle, sys
from lib.deep import module  # a comment


def main(settings, folder, description):
    """Print what it is given, and what it is."""
    print(json.dumps([settings, str(folder), description.splitlines()[0], inspect.getsource(module.fail), module.__file__, sys.argv[1:]]))
    module.fail()
'''
MODULE = '''"""A module."""


def fail():
    """Raise.

    Raises:
        ValueError: always.
    """
    # why
    raise ValueError("é") from None  # also why
'''
SETTINGS: dict[str, Any] = {
    "strategy": "lora", "names": ['"', '\\"', "'''", "\\", "", "é\n"], "lr": 1e-4, "nested": {"on": True, "off": None}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose submitted program fails in an imported module, beside a folder with nothing but this program."""
    root = tmp_path / "project"
    for path, text in {"stages/__init__.py": "", "lib/submission/program.py": SCORE, "lib/__init__.py": "", "lib/deep/__init__.py": "",
                       "lib/deep/module.py": MODULE, "lib/unused.py": "x = 1\n"}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/train_gpt.py").write_bytes(make_bundle(SETTINGS, root))
    return root


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "train_gpt.py", *arguments], cwd=folder, capture_output=True, text=True, check=False)


def test_the_program_runs_without_its_project_and_leaves_nothing_behind(project: Path) -> None:
    folder = project.parent / "empty"
    shutil.rmtree(project)
    settings, where, description, source, file, arguments = json.loads(run(folder, "--data", "x").stdout)
    assert (settings, where, arguments) == (SETTINGS, str(folder), ["--data", "x"])
    assert description == "Scores the language model in model.ptz, in bits per byte of a validation text."
    assert source.startswith("def fail():\n") and source.endswith('    raise ValueError("é") from None\n')
    assert file == str(folder / "train_gpt.py/lib/deep/module.py")
    assert [path.name for path in folder.iterdir()] == ["train_gpt.py"]


def test_tracebacks_show_the_line_and_its_number_in_the_project(project: Path) -> None:
    result = run(project.parent / "empty", "--data", "x")
    line = 1 + MODULE.split("\n").index('    raise ValueError("é") from None  # also why')
    assert result.returncode == 1
    assert f'train_gpt.py/lib/deep/module.py", line {line}, in fail\n    raise ValueError("é") from None\nValueError: é\n' in result.stderr


def test_what_is_called_when_the_program_ends_can_import(project: Path) -> None:
    """As torch does, whose functions of atexit import optional packages."""
    (project / "lib/late.py").write_text("print('late')\n")
    (project / "lib/submission/program.py").write_text(
        "import atexit\n\n\ndef late():\n    import lib.late\n    import wave\n\n\ndef main(*_):\n    atexit.register(late)\n")
    (project.parent / "empty/train_gpt.py").write_bytes(make_bundle(SETTINGS, project))
    result = run(project.parent / "empty")
    assert (result.returncode, result.stdout, result.stderr) == (0, "late\n", "")


def test_extract_writes_the_sources(project: Path) -> None:
    assert not run(project.parent / "empty", "--extract", "out/put").stderr
    folder = project.parent / "empty/out/put"
    written = {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in folder.rglob("*.py")}
    assert written == bundle_sources(project)
    assert written["lib/deep/module.py"] == '\n\n\ndef fail():\n\n\n\n\n\n\n    raise ValueError("é") from None\n'
    assert "lib/unused.py" not in written


def test_the_same_sources_give_the_same_bytes_whenever_and_wherever(project: Path) -> None:
    bundle = make_bundle(SETTINGS, project)
    copy = shutil.copytree(project, project.parent / "copy", copy_function=shutil.copyfile)
    (copy / "lib/deep/module.py").write_text(MODULE.replace("why", "an edited comment"), newline="\r\n", encoding="utf-8")
    assert make_bundle(SETTINGS, copy) == bundle
    (copy / "lib/submission/program.py").write_text(SCORE.replace("print(", "print( "))
    assert make_bundle(SETTINGS, copy) != bundle


@pytest.mark.parametrize("preset", list_presets(ROOT / "presets"))
def test_the_size_is_the_same_for_all_settings(project: Path, preset: str) -> None:
    bundle = make_bundle(read_preset(preset, ROOT / "presets")["evaluate"], project)
    assert len(bundle) == len(make_bundle(SETTINGS, project)) == code_bytes(project)
    compile(bundle, "train_gpt.py", "exec")


def test_settings_fit_into_their_room_or_are_refused(project: Path) -> None:
    room = SETTINGS_BYTES - len('{"name": ""}')
    bundle = make_bundle({"name": "x" * room}, project)
    assert len(bundle) == code_bytes(project)
    (project.parent / "empty/train_gpt.py").write_bytes(bundle)
    assert json.loads(run(project.parent / "empty").stdout)[0] == {"name": "x" * room}
    with pytest.raises(ValueError, match=r"evaluate: expected settings of at most 2,048 bytes .* found 2,049"):
        make_bundle({"name": "x" * (room + 1)}, project)


def test_everything_that_the_real_program_imports_is_bundled() -> None:
    sources = bundle_sources(ROOT)
    assert list(sources) == [path.as_posix() for path in import_closure(Path("lib/submission/program.py"), ROOT)]
    assert sum(map(len, sources.values())) > 3 * code_bytes(ROOT) > 60_000
    assert set(list_packages(ROOT)) == {"brotli", "constriction", "numpy", "pydantic", "pydantic_core", "ruamel.yaml", "safetensors",
                                        "sentencepiece", "torch", "tqdm", "zstandard"}


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            kept = [statement for statement in node.body if not (
                isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str))]
            node.body = kept or [ast.Pass(lineno=first.lineno, col_offset=first.col_offset) for first in node.body[:1]]
    return tree


def places(tree: ast.Module) -> list[tuple[str, object, object]]:
    return [(type(node).__name__, getattr(node, "lineno", None), getattr(node, "col_offset", None)) for node in ast.walk(tree)]


def test_stripping_leaves_the_code_where_it_was_and_nothing_else() -> None:
    for path in SOURCES:
        source = path.read_text(encoding="utf-8")
        stripped = strip_source(source)
        expected, found = without_docstrings(ast.parse(source)), ast.parse(stripped)
        assert ast.dump(found) == ast.dump(expected), path
        assert places(found) == places(expected), path
        assert not any(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(io.StringIO(stripped).readline)), path
