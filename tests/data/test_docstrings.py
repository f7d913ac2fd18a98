import sys
import sysconfig
from pathlib import Path

import pytest

from lib.data.docstrings import SEPARATE_MODULES, check_pins, harvest, read_docstrings

SOURCE = '''
"""Module.

    Indented.
"""
import nothing_that_exists
x = "not a docstring"
class A:
    """Class A."""
    def f(self):
        """Method f."""
        def inner():
            """Inner."""
    async def g(self): "Method g."
    def without(self): pass
if x:
    def h(): """In an if."""
elif x:
    def h(): """In an elif."""
else:
    def h(): """In an else."""
try:
    def t(): """In a try."""
except ValueError:
    def t(): """In a handler."""
else:
    def t(): """In a try's else."""
finally:
    def t(): """In a finally."""
with x:
    def w(): """In a with."""
for _ in x:
    def w(): """In a loop."""
match x:
    case 1:
        def m(): """In a case."""
def bad_escape(): "\\d"
'''


def test_docstrings_in_source_order(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text(SOURCE)
    assert read_docstrings(tmp_path / "module.py") == [
        "Module.\n\nIndented.", "Class A.", "Method f.", "Inner.", "Method g.", "In an if.", "In an elif.", "In an else.", "In a try.",
        "In a handler.", "In a try's else.", "In a finally.", "In a with.", "In a loop.", "In a case.", "\\d"]


@pytest.mark.parametrize("source", [b"print 'Python 2'", b"\x00", b"\xff\xfe"])
def test_source_that_does_not_parse_is_named(tmp_path: Path, source: bytes) -> None:
    (tmp_path / "module.py").write_bytes(source)
    with pytest.raises(ValueError, match=r"module\.py: expected Python source.*tokenize\.packages"):
        read_docstrings(tmp_path / "module.py")


def write_module(path: Path, docstring: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'"""{docstring}"""')


def install(root: Path, name: str, version: str, files: list[str]) -> None:
    for file in files:
        write_module(root / file, file)
    info = root / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small standard library and two installed packages, with files that must not be read."""
    library = tmp_path / "lib"
    read = ("heapq", "email/__init__", "email/mime/text", "unittest/mock")
    unread = ("email/mime/test_text", "email/test/helper", "ctypes/conftest", "test/test_heapq", "turtle", "lib2to3/main",
              "tkinter/__init__", "sitecustomize", "site-packages/stray", "_sysconfigdata_linux")
    for name in (*read, *unread):
        write_module(library / f"{name}.py", name)
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(library)}.__getitem__)
    packages = tmp_path / "site"
    install(packages, "zoo.keeper", "1.2", ["zoo/b.py", "zoo/a.py", "zoo/tests/c.py", "zoo/testing/d.py", "zoo/data.txt"])
    install(packages, "ark", "3.0", ["ark/boat.py", "ark/boat_test.py"])
    write_module(packages / "ark" / "generated_later.py", "not a file of the distribution")
    monkeypatch.syspath_prepend(packages)
    return packages


def test_harvest_reads_the_same_everywhere_in_a_fixed_order(site: Path) -> None:
    standard_library = [["email/__init__"], ["email/mime/text"], ["heapq"], ["unittest/mock"]]
    packages = [["ark/boat.py"], ["zoo/a.py"], ["zoo/b.py"]]
    assert list(harvest(["zoo.keeper", "ark"])) == list(harvest(["ark", "zoo.keeper"])) == standard_library + packages


def test_installed_standard_library_parses() -> None:
    documents = [docstrings for docstrings in harvest([]) if docstrings]
    assert len(documents) > 300
    assert sum(len(docstring) for docstrings in documents for docstring in docstrings) > 1_000_000
    assert SEPARATE_MODULES & sys.stdlib_module_names


def test_pins_of_installed_packages(site: Path, tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# comment\nark==3.0  # boat\nZoo_Keeper[all] == 1.2 ; python_version > '3'\nother>=1\n")
    assert check_pins(requirements, ["ark", "zoo.keeper"]) == {"ark": "3.0", "zoo.keeper": "1.2"}


@pytest.mark.parametrize(("pins", "package", "message"), [
    ("ark==3.1", "ark", r"expected ark==3\.1 to be installed, found 3\.0; run pip install -r"),
    ("ark>=3.0", "ark", r"expected an exact pin ark==VERSION for tokenize\.packages, found none"),
    ("noah==1", "noah", r"expected noah==1 to be installed, found none"),
])
def test_package_that_differs_from_its_pin_is_an_error(site: Path, tmp_path: Path, pins: str, package: str, message: str) -> None:
    (tmp_path / "requirements.txt").write_text(pins)
    with pytest.raises(ValueError, match=r"requirements\.txt: " + message):
        check_pins(tmp_path / "requirements.txt", [package])


def test_missing_requirements_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenize\.path: expected a requirements file.*none\.txt"):
        check_pins(tmp_path / "none.txt", ["numpy"])
