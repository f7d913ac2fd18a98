"""Figures of all seeds as rows and columns of text."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

NO_VALUE = "-"


class Row(NamedTuple):
    """One figure.

    Attributes:
        label: what it is.
        values: one for each seed; None where there is none.
        digits: after the decimal point.
        note: what to compare it with, or why a value is missing.
    """

    label: str
    values: tuple[float | None, ...]
    digits: int
    note: str = ""

    @property
    def mean(self) -> float | None:
        """Mean over the seeds, None unless every seed has a value."""
        values = [value for value in self.values if value is not None]
        return statistics.fmean(values) if len(values) == len(self.values) else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds, None unless there are at least two and every seed has a value."""
        values = [value for value in self.values if value is not None]
        return statistics.stdev(values) if len(values) == len(self.values) > 1 else None

    def cells(self) -> list[str]:
        """The values as text; with several seeds followed by mean and standard deviation."""
        values = self.values if len(self.values) == 1 else (*self.values, self.mean, self.std)
        return [NO_VALUE if value is None else f"{value:,.{self.digits}f}" for value in values]

    def statistics_cells(self) -> list[str]:
        """Mean and, with several seeds, standard deviation as text."""
        return self.cells()[-2:] if len(self.values) > 1 else self.cells()


def column_names(seeds: Sequence[int]) -> list[str]:
    """Names of the columns that `Row.cells` fills."""
    return [f"seed {seed}" for seed in seeds] + (["mean", "std"] if len(seeds) > 1 else [])


def statistics_names(seeds: Sequence[int]) -> list[str]:
    """Names of the columns that `Row.statistics_cells` fills."""
    return column_names(seeds)[-2:]


def difference(row: Row, reference: Row) -> str:
    """Difference of the means as text, empty where one is missing."""
    return f"{row.mean - reference.mean:+.4f}" if row.mean is not None and reference.mean is not None else ""


def ratio(row: Row, reference: Row, text: str) -> str:
    """Ratio of the means, put into `text`; empty where one is missing."""
    return text.format(row.mean / reference.mean) if row.mean is not None and reference.mean else ""


def align(lines: Sequence[Sequence[str]], sides: str) -> str:
    """Lines of cells as columns of text, two spaces between them.

    Args:
        lines: the same number of cells each.
        sides: one letter for each column: ``l`` to stand at its left side, ``r`` at its right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ([cell.ljust(width) if side == "l" else cell.rjust(width) for cell, width, side in zip(line, widths, sides, strict=True)]
              for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)
