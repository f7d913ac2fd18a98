"""A confined process, tried in processes of their own: it cannot be undone."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lib.audit import isolation

ROOT = Path(isolation.__file__).parents[2]
FOLDERS = ("inputs", "outputs", "training", "beside")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for folder in FOLDERS:
        (tmp_path / "project" / folder).mkdir(parents=True)
        (tmp_path / "project" / folder / "file").write_text(folder)
    (tmp_path / "sibling").write_text("sibling")
    return tmp_path / "project"


def run(project: Path, script: str, **environment: str) -> Any:
    """What a script prints as JSON after it was confined to `inputs` and `outputs`, or skip where the kernel cannot."""
    confined = """
        import json, os, socket, subprocess, sys, tempfile
        from pathlib import Path
        from lib.audit.isolation import confine
        def error(action):
            try:
                action()
            except OSError as error:
                return type(error).__name__
        checks = confine(read=[Path("inputs")], write=[Path("outputs"), Path("new/folder")],
                         forbidden=[Path("training/file"), Path("training/none"), Path("beside/file")])
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(confined) + textwrap.dedent(script)], cwd=project, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment, capture_output=True)
    output = json.loads(result.stdout)
    if isinstance(output, dict) and "Landlock" in (why := str(output.get("training_data", {}).get("why"))):
        pytest.skip(why)
    return output


@pytest.fixture
def _possible(project: Path) -> None:
    run(project, "print(json.dumps(checks))")


@pytest.mark.usefixtures("_possible")
def test_what_must_not_be_read_and_the_network_are_refused(project: Path) -> None:
    checks = run(project, "print(json.dumps(checks))")
    assert checks["training_data"] == {"passed": True, "files_tried": 2, "files_refused": 2}
    assert checks["network"] in ({"passed": True, "connections_tried": 1, "connections_refused": 1},
                                 {"passed": None, "why": checks["network"].get("why")})


@pytest.mark.usefixtures("_possible")
def test_inputs_are_read_outputs_replaced_and_nothing_else_is_touched(project: Path) -> None:
    assert run(project, """
        from lib.artifacts.files import write_bytes
        import shutil
        write_bytes(Path("outputs/part/result"), b"1")
        write_bytes(Path("outputs/part/result"), b"2")
        shutil.rmtree("outputs/part")
        write_bytes(Path("outputs/file"), b"3")
        write_bytes(Path("new/folder/file"), b"4")
        print(json.dumps([Path("inputs/file").read_text(), Path("outputs/file").read_text(), Path("new/folder/file").read_text(),
            *(error(action) for action in (
                lambda: Path("inputs/file").write_text(""), lambda: Path("inputs/other").touch(), lambda: Path("training/file").read_text(),
                lambda: os.listdir("training"), lambda: os.listdir("."), lambda: Path("file").touch(),
                lambda: Path("outputs/link").symlink_to("../training/file"), lambda: Path("outputs/link").read_text(),
                lambda: os.truncate("training/file", 0), lambda: os.rename("training/file", "outputs/moved")))]))
    """) == ["inputs", "3", "4", "PermissionError", "PermissionError", "PermissionError", "PermissionError", "PermissionError",
             "PermissionError", None, "PermissionError", "PermissionError", "PermissionError"]
    assert (project / "training/file").read_text() == "training"


@pytest.mark.usefixtures("_possible")
def test_children_and_threads_are_confined_too_and_still_run_programs(project: Path) -> None:
    assert run(project, """
        from concurrent.futures import ThreadPoolExecutor
        def read(name):
            return subprocess.run(["cat", name], capture_output=True, text=True)
        with ThreadPoolExecutor() as pool:
            in_thread = pool.submit(error, lambda: Path("training/file").read_text()).result()
        print(json.dumps([read("inputs/file").stdout, read("training/file").returncode, in_thread]))
    """) == ["inputs", 1, "PermissionError"]


@pytest.mark.usefixtures("_possible")
def test_temporary_files_work_also_where_the_project_is_below_the_temporary_folder(project: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, project, Path("/tmp")):
        assert run(project, """
            import mmap
            with tempfile.NamedTemporaryFile() as file:
                file.write(b"x")
            with tempfile.TemporaryDirectory() as folder:
                (Path(folder) / "file").write_text("y")
            child = subprocess.run([sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"], capture_output=True, text=True)
            os.rmdir(child.stdout.strip())
            print(json.dumps([error(lambda: Path("training/file").read_text()), error(lambda: Path("beside/file").read_text())]))
        """, TMPDIR=str(folder)) == ["PermissionError", "PermissionError"]


@pytest.mark.usefixtures("_possible")
def test_a_folder_above_the_project_that_may_be_read_shows_only_what_is_beside_it(project: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(project / "training")
    assert run(project, """
        print(json.dumps([Path("../sibling").read_text(), error(lambda: Path("training/file").read_text()),
                          error(lambda: Path("../link/file").read_text())]))
    """, PATH=os.pathsep.join([os.environ["PATH"], str(tmp_path)])) == ["sibling", "PermissionError", "PermissionError"]


@pytest.mark.usefixtures("_possible")
def test_inputs_that_are_links_into_a_cache_can_be_read(project: Path) -> None:
    (project / "inputs" / "linked").symlink_to(project / "beside" / "file")
    assert run(project, """
        print(json.dumps([Path("inputs/linked").read_text(), error(lambda: Path("training/file").read_text())]))
    """) == ["beside", "PermissionError"]


@pytest.mark.usefixtures("_possible")
def test_caches_of_compilers_are_made_before_they_could_no_longer_be(project: Path, tmp_path: Path) -> None:
    home, named = tmp_path / "home", {name: str(tmp_path / "named" / name) for name in isolation.CACHE_VARIABLES}
    home.mkdir()
    assert run(project, """
        folders = [*(Path.home() / name for name in (".triton", ".nv", ".cache/torch")),
                   *(Path(os.environ[name]) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH"))]
        for folder in folders:
            (folder / "below").mkdir()
            (folder / "below" / "file").write_text("cached")
        print(json.dumps([len(folders), error(lambda: (Path.home() / "other").mkdir())]))
    """, HOME=str(home), **named) == [6, "PermissionError"]


@pytest.mark.usefixtures("_possible")
@pytest.mark.parametrize("home", ["/proc/none", "/dev/null"])
def test_a_home_that_cannot_be_written_is_no_error(project: Path, home: str) -> None:
    assert run(project, "print(json.dumps([error(lambda: Path('training/file').read_text())]))", HOME=home) == ["PermissionError"]


@pytest.mark.slow
@pytest.mark.usefixtures("_possible")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_the_first_compilation_of_a_machine_works_in_confinement(project: Path, tmp_path: Path) -> None:
    home, temporary = (tmp_path / name for name in ("home", "temporary"))
    home.mkdir()
    temporary.mkdir()
    assert run(project, """
        import torch
        x = torch.randn(64)
        y = torch.compile(lambda x: x.sin() * x.exp(), fullgraph=True)(x)
        cache = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        print(json.dumps([torch.allclose(y, x.sin() * x.exp()), any(cache.rglob("*.so"))]))
    """, HOME=str(home), TMPDIR=str(temporary)) == [True, True]


@pytest.mark.usefixtures("_possible")
def test_network_is_left_alone_where_it_is_needed(project: Path) -> None:
    checks, outcome = run(project, """
        checks = confine(read=[], write=[], forbidden=[], network=True)
        print(json.dumps([checks, None]))
    """)
    assert outcome is None
    assert checks["network"]["passed"] is None
    assert "connections" in checks["network"]["why"]
    assert checks["training_data"]["passed"] is None


def test_a_kernel_without_landlock_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(isolation, "CREATE_RULESET", 9999)  # no such system call
    checks = isolation.confine(read=[], write=[], forbidden=[tmp_path])
    assert checks.keys() == {"training_data", "network"}
    for check in checks.values():
        assert check["passed"] is None
        assert "Function not implemented" in str(check["why"])
