"""The strategies of a run beside each other: bits per byte, whether the score is legal, and what it took."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from lib.reporting.table import NO_VALUE, Row, align, difference

WITHOUT_ADAPTATION = ("plain", "sliding", "one_pass")
"""Strategies that score with the artifact's weights as they are."""
REFERENCE = "sliding"
"""The strategy that others are compared with."""
_BPB, _TRANSDUCTIVE, _SECONDS = "_bpb", "_transductive", "_seconds"
LEGAL = {True: "yes", False: "no", None: "not checked"}

Metrics = Sequence[Mapping[str, Any]]
"""Figures of the stage evaluate, for each seed."""
Timings = Sequence[Mapping[str, float] | None]
"""What a clock measured in the stage evaluate, for each seed; None where the outputs came from the cache."""


class StrategyRow(NamedTuple):
    """One strategy's results.

    Attributes:
        name: as in ``evaluate.strategies``.
        bpb: bits per byte of each seed.
        change: difference of the mean bits per byte from that of `REFERENCE`, as text.
        legal: whether it may be reported as a score of the text; None where that was not checked.
        note: what is declared of it that is not legal, what was left out for want of time, and what a tilt saves.
    """

    name: str
    bpb: Row
    change: str
    legal: bool | None
    note: str

    @property
    def label(self) -> str:
        """The name, marked where the score is not legal."""
        return f"{self.name} (not legal)" if self.legal is False else self.name

    @property
    def adapts(self) -> bool:
        """Whether it trains on the text."""
        return self.name not in WITHOUT_ADAPTATION


def find_strategies(metrics: Metrics, verdicts: Mapping[str, bool | None]) -> list[StrategyRow]:
    """The strategies that were run, in the order of the figures; arguments as of `format_strategies`.

    One that is declared to train on text before it, or what comes before it, is scored is not legal, whatever the audits found.
    """
    reference = _bpb(REFERENCE, metrics)
    keys = [key.removesuffix(_BPB) for key in metrics[0] if key.endswith(_BPB) and key != "val_bpb"]
    return [StrategyRow(name := key.removesuffix(_TRANSDUCTIVE), row := _bpb(key, metrics),
                     difference(row, reference) if key != REFERENCE else "", verdicts.get(name) if key == name else False,
                     _note(name, metrics, [] if key == name else ["trains before scoring"])) for key in keys]


def format_strategies(metrics: Metrics, verdicts: Mapping[str, bool | None], timings: Timings | None = None) -> str:
    """The strategies as aligned lines of text.

    Args:
        metrics: figures of the stage evaluate.
        verdicts: whether the score is legal, from audits, by strategy; None, or no entry, where that was not checked.
        timings: adds columns on the right, mean seconds and those of the parts that were measured; what is left of them stays as it is.
    """
    several = len(metrics) > 1
    lines = [["strategy", "bpb", *(["std"] if several else []), f"to {REFERENCE}", "legal", *([] if timings is None else ["seconds", ""])]]
    for strategy in find_strategies(metrics, verdicts):
        legal = LEGAL[strategy.legal] + (f": {strategy.note}" if strategy.note else "")
        times = [] if timings is None else _time_cells(strategy.name, timings)
        lines.append([strategy.name, *strategy.bpb.statistics_cells(), strategy.change, legal, *times])
    return align(lines, "l" + "r" * (3 if several else 2) + "l" + ("" if timings is None else "rl"))


def _bpb(key: str, metrics: Metrics) -> Row:
    return Row(key.removesuffix(_TRANSDUCTIVE), tuple(of_seed.get(key + _BPB) for of_seed in metrics), 4)


def _note(name: str, metrics: Metrics, declared: list[str]) -> str:
    epochs, gains = ([of_seed[key] for of_seed in metrics if key in of_seed] for key in (f"{name}_epochs", f"{name}_tilt_gain"))
    return ", ".join([*declared, *([f"{fmean(epochs):.3g} epochs, as the time allowed"] if epochs else []),
                      *([f"tilt {-fmean(gains):+.4f} nats"] if gains else [])])


def _time_cells(name: str, timings: Timings) -> list[str]:
    known = [timing for timing in timings if timing is not None]
    if len(known) < len(timings):
        return [NO_VALUE, "from cache"]
    prefix = f"{name}_"
    phases = {key: key.removeprefix(prefix).removesuffix(_SECONDS) for key in known[0] if key.startswith(prefix) and key.endswith(_SECONDS)}
    means = {phase: fmean(timing[key] for timing in known) for key, phase in phases.items() if key != prefix + "seconds"}
    parts = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in sorted(means.items(), reverse=True))
    return [f"{fmean(timing[prefix + 'seconds'] for timing in known):.1f}", parts]
