"""What of this project's own code a program needs, and which packages.

The closure follows every import statement, also those inside functions, without importing anything.
"""

import ast
from collections.abc import Iterable
from importlib.metadata import files, packages_distributions, version
from pathlib import Path


def import_closure(entry: Path, root: Path) -> tuple[Path, ...]:
    """The project's source files that running `entry` may import, `entry` and the packages on the way included.

    Args:
        entry: a Python file, relative to `root`.
        root: the folder that imports start from.

    Returns:
        Paths relative to `root`, sorted. What is no file below `root` belongs to an installed package and is left out.

    Raises:
        FileNotFoundError: no such `entry`.
    """
    found: set[Path] = set()
    waiting = [entry, *_files_of(".".join(entry.with_suffix("").parts), root)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            for name in _imported_names(path, root):
                waiting += _files_of(name, root)
    return tuple(sorted(found))


def imported_packages(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """Installed distributions that source files below `root` import from, name -> version, sorted.

    Versions are without the suffix of a build for one kind of device (``+cpu``), which no package index but torch's own has.
    """
    distributions = packages_distributions()
    found = set()
    for name in {name for path in paths for name in _imported_names(path, root)}:
        module = name.split(".")[0]
        claiming = set() if _files_of(module, root) else set(distributions.get(module, ()))
        if len(claiming) > 1:  # a namespace, such as ruamel
            claiming = {each for each in claiming if {Path(path) for path in files(each) or ()}.intersection(_candidates(name))}
        found |= claiming
    return {name: version(name).partition("+")[0] for name in sorted(found, key=str.lower)}


def _files_of(name: str, root: Path) -> list[Path]:
    """Files below `root` that run when the dotted `name` is imported: packages and a module, as far as `name` goes through them."""
    return [path for path in _candidates(name) if (root / path).is_file()]


def _candidates(name: str) -> list[Path]:
    """Where these files would be."""
    parts = name.split(".")
    modules = [Path(*parts[:n]) for n in range(1, len(parts) + 1)]
    return [path for module in modules for path in (module / "__init__.py", module.with_suffix(".py"))]


def _imported_names(path: Path, root: Path) -> list[str]:
    """Dotted names of the modules that the import statements of a file may refer to."""
    names = []
    for node in ast.walk(ast.parse((root / path).read_bytes(), str(path))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            base = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            names += [f"{base}.{alias.name}" for alias in node.names]  # a module, or a name in one
    return names
