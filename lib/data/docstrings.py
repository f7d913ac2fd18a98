"""English prose that every installation has: the documentation strings of the standard library and of pinned packages.

Source files are parsed, never imported. Only what is the same wherever the same Python and the same package versions are
installed is read: no generated or platform-named modules, and none of the modules that some systems package apart.
"""

import ast
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, distribution
from multiprocessing import get_context
from pathlib import Path

from lib.errors import UserError
from lib.progress import track

SEPARATE_MODULES = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtle", "turtledemo"}
"""Standard-library modules that Linux distributions leave out of their main Python package."""

TEST_CODE = re.compile(r"(^|/)((tests?|testing|idle_test)/|(test_[^/]*|[^/]*_test|conftest)\.py$)")

PIN = re.compile(r"^\s*([\w.-]+)\s*(?:\[[^]]*\]\s*)?==\s*([^\s;#]+)", re.MULTILINE)

BLOCKS = ("body", "handlers", "orelse", "finalbody", "cases")
"""Fields of `ast` statements that hold statements; docstrings are nowhere else, and expressions are most of a tree."""


def check_pins(requirements: Path, packages: Iterable[str]) -> dict[str, str]:
    """Versions of installed distributions, each equal to its exact pin (``name==version``) in a requirements file.

    Raises:
        ValueError: no such file, a distribution without a pin, not installed, or installed in another version.
    """
    try:
        text = requirements.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"tokenize.path: expected a requirements file with exact pins, found no file {requirements}") from None
    pins = {_canonical(name): version for name, version in PIN.findall(text)}
    for package in packages:
        if _canonical(package) not in pins:
            raise UserError(f"{requirements}: expected an exact pin {package}==VERSION for tokenize.packages, found none; "
                            "without it the corpus would change with the installation")
        try:
            installed = distribution(package).version
        except PackageNotFoundError:
            installed = "none"
        if installed != pins[_canonical(package)]:
            raise UserError(f"{requirements}: expected {package}=={pins[_canonical(package)]} to be installed, found {installed}; "
                            f"run pip install -r {requirements}")
    return {package: pins[_canonical(package)] for package in packages}


def harvest(packages: Iterable[str]) -> Iterator[list[str]]:
    """The docstrings of each module of the standard library and of installed distributions, test code left out.

    Modules come in a fixed order: the standard library, then the distributions by name, each by path.

    Raises:
        ValueError: a module that this Python cannot parse.
    """
    files = [*_standard_library_files(), *(file for package in sorted(packages) for file in _distribution_files(package))]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # forking is unsafe beside the threads of numpy
        yield from track(pool.map(read_docstrings, files, chunksize=16), "harvest docstrings", len(files), "module")


def read_docstrings(file: Path) -> list[str]:
    """The docstrings of a module, its classes and its functions in source order, their common indentation removed.

    Raises:
        ValueError: a module that this Python cannot parse.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        try:
            module = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError) as error:
            raise UserError(f"{file}: expected Python source, found {error}; leave its package out of tokenize.packages") from None
    return list(_visit(module))


def _visit(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for block in BLOCKS:
        for child in getattr(node, block, ()):
            yield from _visit(child)


def _standard_library_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(sys.stdlib_module_names - SEPARATE_MODULES)  # the same on every platform, unlike the folder's content
    files = [file for module in modules for file in (root / f"{module}.py", *root.glob(f"{module}/**/*.py"))]
    return _sorted_sources({file.relative_to(root).as_posix(): file for file in files})


def _distribution_files(package: str) -> list[Path]:
    files = distribution(package).files
    if files is None:
        raise UserError(f"tokenize.packages: expected {package} to list its installed files, found no list; reinstall it with pip")
    return _sorted_sources({file.as_posix(): Path(str(file.locate())) for file in files})


def _sorted_sources(files: dict[str, Path]) -> list[Path]:
    return [files[name] for name in sorted(files) if name.endswith(".py") and not TEST_CODE.search(name) and files[name].is_file()]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
