"""Section ``report`` of params.yaml."""

from typing import Annotated

from pydantic import Field

from lib.params import Params, PositiveFloat


class RecordParams(Params):
    """``report.record``: the score that the seeds are tested against."""

    loss: PositiveFloat | None
    """The record, in nats per token (val_loss); null = none is stated, nothing is tested."""
    margin: Annotated[float, Field(ge=0)]
    """Nats per token by which it must be beaten."""
    p_value: Annotated[float, Field(gt=0, lt=1)]
    """Largest probability of the seeds' losses, or lower ones, if the true mean were no better than record - margin."""


class SubmissionParams(Params):
    """``report.submission``: what ``submission.json`` says of its author; null = left open."""

    author: str | None
    github_id: str | None
    blurb: str | None


class ReportParams(Params):
    """Section ``report``."""

    title: Annotated[str, Field(min_length=1)]
    """Headline of report.html, name of the submission."""
    record: RecordParams
    submission: SubmissionParams
