"""Presets, complete parameter files: ``python -m tools.preset [NAME]`` (``make preset NAME=...``) makes one params.yaml, or lists them."""

import argparse
import subprocess
import sys
from pathlib import Path

from lib.artifacts.files import write_bytes
from lib.errors import report_errors
from lib.params import PARAMS_FILE, ParamsError, parse_params, read_params
from lib.schema import PipelineParams

PRESETS_FOLDER = Path("presets")


def list_presets() -> dict[str, Path]:
    """Name -> file, sorted by name."""
    return {path.stem: path for path in sorted(PRESETS_FOLDER.glob("*.yaml"))}


def describe_preset(path: Path) -> str:
    """The first line of the comment at the top of the file."""
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def apply_preset(name: str) -> None:
    """Make a preset the parameters of the workspace.

    Raises:
        ParamsError: no such preset, an invalid one, or parameters that would be lost: neither committed nor those of a preset.
    """
    presets = list_presets()
    if name not in presets:
        raise ParamsError(f"NAME: expected one of {', '.join(presets)}, found {name!r}")
    parse_params(read_params(presets[name]), PipelineParams, f"{presets[name]}: ")
    content = PARAMS_FILE.read_bytes() if PARAMS_FILE.exists() else None
    if content is not None and _is_changed(PARAMS_FILE) and all(path.read_bytes() != content for path in presets.values()):
        raise ParamsError(f"{PARAMS_FILE}: expected no changes that would be lost, found some that are not committed; commit them, "
                          f"or drop them with `git restore {PARAMS_FILE}`")
    write_bytes(PARAMS_FILE, presets[name].read_bytes())


def main() -> None:
    """Apply or list."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a file in presets/, without .yaml; none lists them")
    name = parser.parse_args().name
    if name is None:
        print("\n".join(f"{each}: {describe_preset(path)}" for each, path in list_presets().items()))
        return
    try:
        apply_preset(name)
    except ParamsError as error:
        sys.exit(str(error))
    print(f"{PARAMS_FILE} is now {PRESETS_FOLDER / name}.yaml; `make repro` runs it, `git diff {PARAMS_FILE}` shows what has changed")


def _is_changed(path: Path) -> bool:
    """Whether git does not have the content; where there is no git, it does not."""
    status = subprocess.run(["git", "status", "--porcelain", "--", str(path)], capture_output=True, text=True, check=False)
    return status.returncode != 0 or bool(status.stdout)


if __name__ == "__main__":
    report_errors()
    main()
