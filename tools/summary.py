"""Prints the tables that end ``make repro``, from the figures of all seeds: ``python -m tools.summary``."""

import sys

from lib.artifacts.files import ArtifactError
from lib.params import ParamsError, load_params, read_params
from lib.reporting.config import ReportParams
from lib.reporting.runs import check_runs
from lib.reporting.summary import format_summary


def main() -> None:
    """Print the figures of all seeds of params.yaml."""
    try:
        params, recorded = read_params(), False
        try:
            recorded = check_runs(params)
        except ArtifactError:
            if len(params["seeds"]) > 1:  # no mean is of runs that differ; one seed's figures are shown as they are
                raise
        print(format_summary(params, load_params("report", ReportParams).record, recorded=recorded))
    except (ArtifactError, ParamsError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
