"""The strategies of a run beside each other: bits per byte, whether the score is legal, and what it took."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from lib.reporting.table import NO_VALUE, Row, align, difference

WITHOUT_ADAPTATION = ("plain", "sliding", "one_pass")
"""Strategies that score with the artifact's weights as they are."""
REFERENCE = "sliding"
"""The strategy that others are compared with."""
_LEGAL, _SECONDS = "_legal", "_seconds"

Metrics = Sequence[Mapping[str, Any]]
"""Figures of the stage evaluate, for each seed."""
Timings = Sequence[Mapping[str, float] | None]
"""What a clock measured in the stage evaluate, for each seed; None where the outputs came from the cache."""


class Strategy(NamedTuple):
    """One strategy's results.

    Attributes:
        name: as in ``evaluate.strategies``.
        bpb: bits per byte of each seed.
        change: difference of the mean bits per byte from that of `REFERENCE`, as text.
        legal: whether it may be reported as a score of the text.
        note: why it is not legal, or what was left out for want of time.
    """

    name: str
    bpb: Row
    change: str
    legal: bool
    note: str

    @property
    def label(self) -> str:
        """The name, marked where the score is not legal."""
        return self.name if self.legal else f"{self.name} (not legal)"

    @property
    def adapts(self) -> bool:
        """Whether it trains on the text."""
        return self.name not in WITHOUT_ADAPTATION


def find_strategies(metrics: Metrics) -> list[Strategy]:
    """The strategies that were run, in the order of the figures."""
    legal = {key.removesuffix(_LEGAL): value for key, value in metrics[0].items() if key.endswith(_LEGAL)}
    reference = _bpb(REFERENCE, metrics, legal=True)
    return [Strategy(name, row := _bpb(name, metrics, legal=is_legal), difference(row, reference) if name != REFERENCE else "", is_legal,
                     _note(name, metrics, legal=is_legal)) for name, is_legal in legal.items()]


def format_strategies(metrics: Metrics, timings: Timings | None = None) -> str:
    """The strategies as aligned lines of text.

    Args:
        metrics: figures of the stage evaluate.
        timings: adds columns on the right, mean seconds and those of the parts that were measured; what is left of them stays as it is.
    """
    several = len(metrics) > 1
    lines = [["strategy", "bpb", *(["std"] if several else []), f"to {REFERENCE}", "legal", *([] if timings is None else ["seconds", ""])]]
    for strategy in find_strategies(metrics):
        legal = ("yes" if strategy.legal else "no") + (f": {strategy.note}" if strategy.note else "")
        times = [] if timings is None else _time_cells(strategy.name, timings)
        lines.append([strategy.name, *strategy.bpb.statistics_cells(), strategy.change, legal, *times])
    return align(lines, "l" + "r" * (3 if several else 2) + "l" + ("" if timings is None else "rl"))


def _bpb(name: str, metrics: Metrics, *, legal: bool) -> Row:
    key = f"{name}_bpb" if legal else f"{name}_transductive_bpb"
    return Row(name, tuple(of_seed.get(key) for of_seed in metrics), 4)


def _note(name: str, metrics: Metrics, *, legal: bool) -> str:
    epochs = [of_seed[f"{name}_epochs"] for of_seed in metrics if f"{name}_epochs" in of_seed]
    reduced = [f"{fmean(epochs):.3g} epochs, as the time allowed"] if epochs else []
    return ", ".join(([] if legal else ["trains before scoring"]) + reduced)


def _time_cells(name: str, timings: Timings) -> list[str]:
    known = [timing for timing in timings if timing is not None]
    if len(known) < len(timings):
        return [NO_VALUE, "from cache"]
    prefix = f"{name}_"
    phases = {key: key.removeprefix(prefix).removesuffix(_SECONDS) for key in known[0] if key.startswith(prefix) and key.endswith(_SECONDS)}
    means = {phase: fmean(timing[key] for timing in known) for key, phase in phases.items() if key != prefix + "seconds"}
    parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in sorted(means.items(), reverse=True))
    return [f"{fmean(timing[prefix + 'seconds'] for timing in known):.1f}", parts]
