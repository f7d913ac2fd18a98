"""Section ``report`` of params.yaml."""

from typing import Annotated

from pydantic import Field

from lib.params import Params


class ReportParams(Params):
    """Section ``report``."""

    title: Annotated[str, Field(min_length=1)]
    """Headline of report.html."""
