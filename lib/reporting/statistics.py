"""Losses of several seeds against a stated record: a one-sample, one-sided t-test."""

from typing import Any, NamedTuple

from lib.reporting.config import RecordParams
from lib.reporting.table import Row


class RecordTest(NamedTuple):
    """Whether the seeds beat the record by the margin; None where that number does not exist.

    Attributes:
        verdict: the outcome in words.
        record: what was stated.
        mean: mean of the losses, in nats per token.
        std: sample standard deviation of the losses.
        t: Student's t of the mean against record - margin, with one degree of freedom less than there are seeds.
        p: probability of such a t, or one further below 0, if the true mean were record - margin.
        bound: upper confidence bound of the true mean, at the level 1 - ``report.record.p_value``.
    """

    verdict: str
    record: RecordParams
    mean: float | None = None
    std: float | None = None
    t: float | None = None
    p: float | None = None
    bound: float | None = None

    def figures(self) -> dict[str, Any]:
        """For metrics.json: what there is, with eight significant digits."""
        values = {"verdict": self.verdict, "record": self.record.loss, "mean": self.mean, "std": self.std, "t": self.t, "p": self.p,
                  "bound": self.bound}
        return {key: float(f"{value:.8g}") if isinstance(value, float) else value for key, value in values.items() if value is not None}

    @property
    def headline(self) -> str:
        """Record and verdict, as one line."""
        return self.verdict if self.record.loss is None else f"record of {self.record.loss:.4f} nats per token: {self.verdict}"

    @property
    def evidence(self) -> str:
        """The numbers behind the verdict, as one line; empty where nothing was tested."""
        if self.t is None:
            return ""
        return (f"mean {self.mean:.4f}, std {self.std:.4f}, t = {self.t:.2f}, p = {self.p:.2g}, "
                f"true mean below {self.bound:.4f} with {1 - self.record.p_value:.4g} confidence")


def compare_with_record(losses: Row, record: RecordParams) -> RecordTest:
    """Apply the rule of the challenge, better by at least 0.005 nats at p < 0.01, with the numbers of ``report.record``.

    Args:
        losses: one loss for each seed, in nats per token.
        record: loss, margin and largest p.
    """
    if record.loss is None:
        return RecordTest("no record stated", record)
    known = RecordTest("needs at least two seeds", record, losses.mean, losses.std)
    if known.std is None:
        return known
    if known.std == 0:  # seeds that change nothing are no independent runs
        return known._replace(verdict="cannot be tested, all seeds have the same loss")
    from scipy.stats import ttest_1samp  # noqa: PLC0415 (takes a second to load, for which most summaries need not wait)

    result = ttest_1samp(losses.values, record.loss - record.margin, alternative="less")
    outcome = "beats" if result.pvalue < record.p_value else "does not beat"
    margin = f" by at least {record.margin:g} nats" if record.margin else ""
    return known._replace(verdict=f"{outcome} the record{margin} at p < {record.p_value:g}", t=float(result.statistic),
                          p=float(result.pvalue), bound=float(result.confidence_interval(1 - record.p_value).high))
