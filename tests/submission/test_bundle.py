import ast
import json
import random
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lib.errors import UserError
from lib.presets import list_presets, read_preset
from lib.submission.bundle import SECTIONS, SETTINGS_BYTES, bundle_sources, code_bytes, list_packages, make_bundle, minify
from lib.submission.closure import import_closure
from lib.submission.program import ProgramParams

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = '''"""What is submitted."""
import inspect, json, pickle, sys
from lib.deep import module  # a comment


def main(settings, program, description):
    """Print what it is given, and what it is."""
    print(json.dumps([settings, str(program), description.splitlines()[0], inspect.getsource(module.fail), module.__file__, sys.argv[1:]]))
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
MINIFIED = "def fail():raise ValueError('é')from None"
ERRORS = '''import sys
import traceback


def report_errors():
    sys.excepthook = traceback.print_exception
'''
SETTINGS: dict[str, Any] = {key: {} for key in SECTIONS} | {"evaluate": {
    "strategy": "lora", "names": ['"', '\\"', "'''", "\\", "", "é\n"], "lr": 1e-4, "nested": {"on": True, "off": None}}}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose submitted program fails in an imported module, beside a folder with nothing but this program."""
    root = tmp_path / "project"
    files = {"lib/__init__.py": "", "lib/submission/__init__.py": "", "lib/submission/program.py": PROGRAM, "lib/errors.py": ERRORS,
             "lib/deep/__init__.py": "", "lib/deep/module.py": f"import lib.errors\n{MODULE}", "lib/unused.py": ""}
    for path, text in files.items():
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
    settings, program, description, source, file, arguments = json.loads(run(folder, "--score", "x").stdout)
    assert (settings, program, arguments) == (SETTINGS, str(folder / "train_gpt.py"), ["--score", "x"])
    assert description.startswith("Trains a language model, packs it into model.ptz and scores it")
    assert (source.strip(), file) == (MINIFIED, str(folder / "train_gpt.py/lib/deep/module.py"))
    assert [path.name for path in folder.iterdir()] == ["train_gpt.py"]


def test_tracebacks_show_the_line_of_the_minified_source(project: Path) -> None:
    result = run(project.parent / "empty")
    assert result.returncode == 1
    assert re.search(r'train_gpt\.py/lib/deep/module\.py", line \d+, in fail\n', result.stderr)
    assert f"\n    {MINIFIED}\n" in result.stderr and result.stderr.endswith("\nValueError: é\n")


def test_what_is_called_when_the_program_ends_can_import(project: Path) -> None:
    """As torch does, whose functions of atexit import optional packages."""
    (project / "lib/late.py").write_text("print('late')\n")
    (project / "lib/submission/program.py").write_text(
        "import atexit\nimport lib.errors\ndef late():\n    import lib.late\n    import wave\ndef main(*_):\n    atexit.register(late)\n")
    (project.parent / "empty/train_gpt.py").write_bytes(make_bundle(SETTINGS, project))
    result = run(project.parent / "empty")
    assert (result.returncode, result.stdout, result.stderr) == (0, "late\n", "")


def test_extract_writes_the_sources_and_the_settings(project: Path) -> None:
    assert not run(project.parent / "empty", "--extract", "out/put").stderr
    folder = project.parent / "empty/out/put"
    written = {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(written.pop("settings.json")) == SETTINGS
    assert written == bundle_sources(project)
    assert written["lib/deep/module.py"].endswith(MINIFIED)
    assert "lib/unused.py" not in written


def test_any_byte_of_the_archive_comes_back(project: Path) -> None:
    """What does not compress has all bytes, those that need an escape too, before digits and letters."""
    content = random.Random(0).choices(string.ascii_letters + string.digits, k=20_000)
    (project / "lib/errors.py").write_text(ERRORS + f"LONG = '{''.join(content)}'\n")
    (project.parent / "empty/train_gpt.py").write_bytes(bundle := make_bundle(SETTINGS, project))
    assert all(bytes([value]) in bundle for value in {*range(256)} - {0, 13})
    assert not run(project.parent / "empty", "--extract", "out").stderr
    assert (project.parent / "empty/out/lib/errors.py").read_text() == bundle_sources(project)["lib/errors.py"]


def test_the_same_sources_give_the_same_bytes_whenever_and_wherever(project: Path) -> None:
    bundle = make_bundle(SETTINGS, project)
    copy = shutil.copytree(project, project.parent / "copy", copy_function=shutil.copyfile)
    content = (copy / "lib/deep/module.py").read_text(encoding="utf-8").replace("why", "an edited comment")
    (copy / "lib/deep/module.py").write_text(content, newline="\r\n", encoding="utf-8")
    assert make_bundle(SETTINGS, copy) == bundle
    (copy / "lib/submission/program.py").write_text(PROGRAM.replace("print(", "print(0, "))
    assert make_bundle(SETTINGS, copy) != bundle


@pytest.mark.slow
@pytest.mark.parametrize("preset", list_presets(ROOT / "presets"))
def test_the_size_is_the_same_for_all_settings(preset: str) -> None:
    params = read_preset(preset, ROOT / "presets")
    bundle = make_bundle(params, ROOT)
    assert len(bundle) == code_bytes(ROOT) <= params["compress"]["code_bytes"]
    compile(bundle, "train_gpt.py", "exec")


def test_settings_fit_into_their_room_or_are_refused(project: Path) -> None:
    letters = random.Random(0).choices(string.ascii_letters, k=5000)  # 0.73 bytes each, compressed
    settings = SETTINGS | {"model": {"name": "".join(letters[:1500])}}
    bundle = make_bundle(settings, project)
    assert len(bundle) == code_bytes(project)
    (project.parent / "empty/train_gpt.py").write_bytes(bundle)
    assert json.loads(run(project.parent / "empty").stdout)[0] == settings
    with pytest.raises(UserError, match=rf"evaluate: expected settings that take at most {SETTINGS_BYTES:,} bytes .* found [34],"):
        make_bundle(SETTINGS | {"model": {"name": "".join(letters)}}, project)


def test_the_settings_are_those_that_the_program_reads() -> None:
    assert tuple(ProgramParams.model_fields) == SECTIONS


def test_everything_that_the_real_program_imports_is_bundled() -> None:
    sources = bundle_sources(ROOT)
    assert list(sources) == [path.as_posix() for path in import_closure(Path("lib/submission/program.py"), ROOT)]
    assert sum(map(len, sources.values())) > 3 * code_bytes(ROOT) > 90_000
    assert set(list_packages(ROOT)) == {"brotli", "constriction", "numpy", "pydantic", "pydantic_core", "ruamel.yaml", "safetensors",
                                        "sentencepiece", "torch", "tqdm", "zstandard"}


def interface(body: list[ast.stmt], *, in_class: bool = False) -> list[tuple[object, ...]]:
    """Of a module or a class: what other modules can see, and what pydantic, dataclasses and arguments by name need."""
    found: list[tuple[object, ...]] = []
    for node in body:
        match node:
            case ast.ClassDef():
                found.append((node.name, interface(node.body, in_class=True)))
            case ast.FunctionDef():
                arguments = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
                found.append((node.name, arguments[in_class:]))  # self is renamed
            case ast.AnnAssign() if in_class:
                found.append((ast.unparse(node.target), ast.unparse(node.annotation)))
            case ast.Assign() | ast.AnnAssign():
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found += [(name.id,) for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return [each for each in found if not re.match("_(?!_)", str(each[0]))]


def test_minified_modules_have_the_same_names_fields_and_arguments() -> None:
    for path in import_closure(Path("lib/submission/program.py"), ROOT):
        source = (ROOT / path).read_text(encoding="utf-8")
        original, minified = (interface(ast.parse(text).body) for text in (source, minify(source)))
        assert [each for each in minified if each in original] == original, path
