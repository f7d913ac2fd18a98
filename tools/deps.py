"""Writes the code that every stage depends on into dvc.yaml: ``python -m tools.deps`` (``make deps``).

A stage depends on the files of this project that a fresh interpreter has loaded after importing it, but for those named here, whose
content does not change what a stage makes.
"""

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from lib.artifacts.files import write_bytes
from lib.submission.bundle import ENTRY
from lib.submission.closure import import_closure

PIPELINE_FILE = Path("dvc.yaml")
CODE_FOLDERS = ("lib/", "stages/")
PRINTING = {"lib/errors.py", "lib/problems.py", "lib/progress.py", "lib/startup.py", "stages/__init__.py"}
"""They print, or end a program, and nothing else."""
CONFINEMENT = {"lib/audit/isolation.py": ("train", "calibrate", "quantize")}
"""It takes files from the stages that make the artifact; their results are the same without it."""
WATCH = ("lib.forecast.watch", "lib.forecast.corpus")
"""These modules print or refuse, but need much code, and parameters of other stages, to do it; they are not imported."""
SUBMITTING = ("compress", "report")
"""Stages that count the bytes of the submitted code or write it out."""

_SCRIPT = """
import sys
from unittest.mock import MagicMock
sys.modules.update(dict.fromkeys({watch!r}, MagicMock()))
import stages.{stage}
for module in list(sys.modules.values()):
    if path := getattr(module, "__file__", None):
        print(path)
"""


def list_code(stage: str, root: Path) -> list[str]:
    """The files with code that a stage depends on, relative to `root`, the folder of the project; sorted."""
    command = [sys.executable, "-c", _SCRIPT.format(stage=stage, watch=WATCH)]
    output = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    loaded = [Path(path) for path in output.splitlines()]
    found = {path.relative_to(root.resolve()).as_posix() for path in loaded if path.is_relative_to(root.resolve())}
    found = {path for path in found if path.startswith(CODE_FOLDERS)} - PRINTING
    found -= {path for path, stages in CONFINEMENT.items() if stage in stages}
    if stage in SUBMITTING:
        found |= {path.as_posix() for path in import_closure(ENTRY, root)}
    return sorted(path for path in found if (root / path).stat().st_size)


def fill_in(pipeline: dict[str, Any], root: Path) -> None:
    """Put the lists of Python files into the data of a dvc.yaml; what else a stage depends on stays, before them."""
    for stage, settings in pipeline["stages"].items():
        others = [path for path in settings["deps"] if not (path.startswith(CODE_FOLDERS) and path.endswith(".py"))]
        settings["deps"][:] = [*others, *list_code(stage, root)]


def main() -> None:
    """Rewrite dvc.yaml, with its comments; say which stages have changed."""
    yaml = YAML()
    yaml.preserve_quotes, yaml.width = True, 1000
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(PIPELINE_FILE)
    before = {stage: list(settings["deps"]) for stage, settings in pipeline["stages"].items()}
    fill_in(pipeline, Path())
    changed = [stage for stage, settings in pipeline["stages"].items() if list(settings["deps"]) != before[stage]]
    content = BytesIO()
    yaml.dump(pipeline, content)
    write_bytes(PIPELINE_FILE, content.getvalue())
    print(f"{PIPELINE_FILE}: {', '.join(changed) or 'nothing'} has changed")


if __name__ == "__main__":
    main()
