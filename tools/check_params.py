"""Checks a whole parameter file before a pipeline starts, and the size of its artifact: ``python -m tools.check_params [FILE]``.

Torch is imported for grids of fixed bits alone.
"""

import sys
from pathlib import Path

from lib.errors import UserError
from lib.forecast.check import check_size
from lib.params import PARAMS_FILE, ParamsError, parse_params, read_params
from lib.schema import PipelineParams


def main() -> None:
    """Check one parameter file and print the size that its artifact will have; the exit status is 1, with every problem on a line of its
    own, if it cannot be used."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else PARAMS_FILE
    try:
        params = parse_params(read_params(path), PipelineParams, f"{path}: ")
        print(check_size(params.model.architecture, params.quantize, params.compress))
    except ParamsError as error:
        sys.exit(str(error))
    except UserError as error:  # of the forecast: the limit, or names of matrices
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
