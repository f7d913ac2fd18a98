"""Make a preset the parameters: ``python -m tools.preset NAME`` (``make preset NAME=pr585``); without a name, list them."""

import argparse
import subprocess
import sys

from lib.artifacts.files import write_bytes
from lib.params import PARAMS_FILE, ParamsError, read_params
from lib.presets import compose_preset, describe_preset, list_presets, read_preset
from lib.reporting.runs import flatten

MAX_SHOWN = 4  # keys that are named


def apply_preset(name: str) -> None:
    """Make a preset the parameters of the workspace.

    Raises:
        ParamsError: no such preset, an invalid one, or parameters that would be lost: neither committed nor those of a preset.
    """
    text = compose_preset(name)
    if PARAMS_FILE.exists() and _is_changed() and PARAMS_FILE.read_text(encoding="utf-8") not in map(compose_preset, list_presets()):
        raise ParamsError(f"{PARAMS_FILE}: expected no changes that would be lost, found some that are not committed; commit them, "
                          f"or drop them with `git restore {PARAMS_FILE}`")
    write_bytes(PARAMS_FILE, text.encode())


def describe_parameters() -> str:
    """Which preset the parameters of the workspace are, or come nearest to, and the keys in which they differ from it.

    Raises:
        ParamsError: parameters, or a preset, that cannot be read.
    """
    values, differing = dict(flatten(read_params())), {}
    for name in list_presets():
        preset = dict(flatten(read_preset(name)))
        differing[name] = [key for key in values | preset if (key in values, values.get(key)) != (key in preset, preset.get(key))]
    name, keys = min(differing.items(), key=lambda item: len(item[1]))
    others = [f"{len(keys) - MAX_SHOWN} more"] if len(keys) > MAX_SHOWN else []
    return f"{PARAMS_FILE} is the preset {name}" + (f", but for {', '.join(keys[:MAX_SHOWN] + others)}" if keys else "")


def main() -> None:
    """Apply a preset; without a name, list them and exit with status 2."""
    parser = argparse.ArgumentParser(prog="make preset", usage="make preset NAME=pr585", description=__doc__.splitlines()[0])
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a file in presets/, without .yaml")
    name, presets = parser.parse_args().name, list_presets()
    listed = [f"  {each:12} {describe_preset(path)[0]}" for each, path in presets.items()]
    try:
        if name is None:
            print("\n".join(["usage: make preset NAME=pr585", *listed, describe_parameters()]), file=sys.stderr)
            sys.exit(2)
        apply_preset(name)
    except ParamsError as error:
        sys.exit("\n".join([str(error), *(listed if name not in presets else [])]))
    print("\n  ".join([f"{PARAMS_FILE} is now the preset {name}:", *describe_preset(presets[name])]))
    print(f"`git diff {PARAMS_FILE}` shows what has changed")


def _is_changed() -> bool:
    """Whether git does not have the parameters; where there is no git, it does not."""
    status = subprocess.run(["git", "status", "--porcelain", "--", str(PARAMS_FILE)], capture_output=True, text=True, check=False)
    return status.returncode != 0 or bool(status.stdout)


if __name__ == "__main__":
    main()
