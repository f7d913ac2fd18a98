"""Inspect: print what is inside a ``model.ptz`` or a published file: ``python -m tools.inspect FILE [--matrix blocks.3]``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from lib.compression.contents import describe_artifact, describe_matrices
from lib.errors import UserError
from lib.model.gpt import outline
from lib.model.parts import parts_of
from lib.published.description import describe_published
from lib.published.reader import is_published


def list_roles(model: dict[str, Any]) -> dict[str, str]:
    """Name of every parameter of a configuration -> its role."""
    return {name: part.role for name, part in parts_of(outline(model)).items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the description of one file, or say why there is none and exit with status 1."""
    parser = argparse.ArgumentParser(prog="python -m tools.inspect", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="a model.ptz, which the stage compress makes, or a published file")
    parser.add_argument("--matrix", metavar="NAME", help="of a model.ptz: what happened to a layer (blocks.3), a kind (mlp.up) or a matrix")
    options = parser.parse_args(arguments)
    path, matrix = options.file, options.matrix
    try:
        if matrix is not None:
            folder = path.absolute().parent  # compress/seed<seed>
            print(describe_matrices(path, matrix, folder.parent.parent / "quantize" / folder.name / "tensors.csv"))
        else:
            print(describe_published(path) if is_published(path) else describe_artifact(path, list_roles))
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
