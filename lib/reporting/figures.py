"""Figures as SVG text, the same bytes for the same numbers; text in them stays text, in the reader's own font."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, StrMethodFormatter

Points = Sequence[tuple[float, float]]

SIZE_INCHES = (7.2, 3.2)
ROW_INCHES = 0.24
COLORS = ("#1f5fa8", "#d9661f", "#3b8a4a", "#8a4f9e", "#c0284f", "#0e8f93", "#6b6b6b")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "albatross", "font.family": "sans-serif", "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "grid.linewidth": 0.7, "axes.edgecolor": "#888888",
    "axes.labelcolor": "#333333", "xtick.color": "#555555", "ytick.color": "#555555", "axes.axisbelow": True, "legend.frameon": False,
}
DARK = {
    "#ffffff": "#0d1117", "#e4e4e4": "#30363d", "#888888": "#8b949e", "#555555": "#b1bac4", "#333333": "#e6edf3",
    **dict(zip(COLORS, ("#6cb0ff", "#ff9a57", "#7fd08f", "#c99bdc", "#ff7b9c", "#5fd0d4", "#b0b0b0"), strict=True)),
}
"""Colours of a figure -> those for readers who prefer dark pages."""


def plot_curves(curves: Mapping[str, Points], x_label: str, y_label: str, *, unsettled: float = 0,
                dashes: Mapping[str, str] = MappingProxyType({}), octaves: bool = False) -> str:
    """Named curves in one figure.

    The names stand beside the figure in the order in which their curves end, top to bottom.

    Args:
        curves: name -> points (x, y).
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
        unsettled: first fraction of the points, which may leave the figure at the top or bottom, so that the rest can be told apart.
        dashes: name -> line style of matplotlib, where it is not a solid line.
        octaves: whether the horizontal axis is logarithmic, with a tick at each power of two; each point gets a mark.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _make_axes()
        settled: list[float] = []
        lines: dict[str, tuple[float, Line2D]] = {}
        for color, (name, curve) in zip(cycle(COLORS), curves.items(), strict=False):
            x, y = zip(*curve, strict=True)
            line, = axes.plot(x, y, color=color, linewidth=1.3, linestyle=dashes.get(name, "-"), marker="o" if octaves else None,
                              markersize=3)
            lines[name] = (y[-1], line)
            settled += y[round(unsettled * len(y)):]
        margin = 0.05 * (max(settled) - min(settled))
        axes.set(ylim=(min(settled) - margin, max(settled) + margin) if margin else None, xlabel=x_label, ylabel=y_label)
        if octaves:
            axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if not octaves else StrMethodFormatter("{x:,.0f}"))
        if len(curves) > 1:
            names = sorted(lines, key=lambda name: -lines[name][0])
            figure.legend([lines[name][1] for name in names], names, loc="outside right upper")
        return _render(figure)


def plot_panels(panels: Mapping[str, Mapping[str, Points]], x_label: str, *, log: Sequence[str] = ()) -> str:
    """Figures with a common horizontal axis, one below the other, points joined by lines.

    Args:
        panels: label of the vertical axis -> name -> points (x, y).
        x_label: label of the horizontal axis.
        log: labels of the vertical axes that are logarithmic.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE_INCHES[0], SIZE_INCHES[1] * len(panels)), layout="constrained")
        for axes, (y_label, curves) in zip(figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], panels.items(), strict=True):
            for color, (name, curve) in zip(cycle(COLORS), curves.items(), strict=False):
                axes.plot(*zip(*curve, strict=True), "o-", color=color, linewidth=1.3, markersize=4, label=name)
            axes.set(ylabel=y_label, yscale="log" if y_label in log else "linear")
            axes.legend()
        axes.set(xlabel=x_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        return _render(figure)


def plot_dots(panels: Mapping[str, Mapping[str, Mapping[str, float]]], rows: Sequence[str]) -> str:
    """Figures beside each other with common rows, one dot for each value, one colour for each kind of value; axes are logarithmic.

    Args:
        panels: label of the horizontal axis -> kind -> row -> value; what is not above 0 is left out.
        rows: top to bottom.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(SIZE_INCHES[0], 1.1 + ROW_INCHES * len(rows)), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (x_label, kinds) in zip(all_axes, panels.items(), strict=True):
            for color, (kind, values) in zip(cycle(COLORS), kinds.items(), strict=False):
                shown = {row: value for row, value in values.items() if value > 0}
                axes.plot(list(shown.values()), list(map(rows.index, shown)), "o", color=color, markersize=4.5, alpha=0.85, label=kind)
            axes.set(xscale="log", xlabel=x_label)
        all_axes[0].set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
        return _render(figure)


def plot_steps(ladders: Mapping[str, Mapping[str, float]], x_label: str) -> str:
    """Values that follow from each other, top to bottom, with the change from each to the next; each ladder has an axis of its own.

    Args:
        ladders: name of the ladder -> name of the value -> value.
        x_label: label of the axes of the values, after the name of the ladder.
    """
    with matplotlib.rc_context(STYLE):
        heights = [1 + len(values) for values in ladders.values()]
        figure = Figure(figsize=(SIZE_INCHES[0], 2 * ROW_INCHES * sum(heights)), layout="constrained")
        all_axes = figure.subplots(len(ladders), squeeze=False, height_ratios=heights)[:, 0]
        for axes, color, (ladder, values) in zip(all_axes, cycle(COLORS), ladders.items(), strict=False):
            previous = None
            for row, value in enumerate(values.values()):
                text = f"{value:.4f}" if previous is None else f"{value:.4f}  ({value - previous:+.4f})"
                if previous is not None:
                    axes.plot((previous, previous, value), (row - 1, row, row), color=color, linewidth=1, alpha=0.6)
                axes.plot(value, row, "o", color=color, markersize=6)
                to_left = previous is not None and value < previous  # away from the line that leads here
                axes.annotate(text, (value, row), xytext=(-8 if to_left else 8, 0), textcoords="offset points", va="center",
                              ha="right" if to_left else "left", color="#222222")
                previous = value
            axes.set(yticks=range(len(values)), yticklabels=list(values), xlabel=f"{ladder}: {x_label}", ylim=(len(values) - 0.5, -0.5))
            axes.margins(x=0.5)  # room for the numbers
            axes.grid(visible=False, axis="y")
        return _render(figure)


def plot_points(points: Points, x_label: str, y_label: str) -> str:
    """Single points (x, y); the horizontal axis is logarithmic, with a tick at each power of two."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _make_axes()
        axes.plot(*zip(*points, strict=True), "o", color=COLORS[0], markersize=4, alpha=0.6)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        return _render(figure)


def follow_color_scheme(figure: str) -> str:
    """The same figure, which a browser shows in the colours of `DARK` where its reader prefers dark pages.

    Args:
        figure: an SVG file from this module.
    """
    rules = [f'[style*="{name}: {light}"] {{ {name}: {dark} !important }}' for light, dark in DARK.items() for name in ("fill", "stroke")]
    style = "@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } " + " ".join(rules) + " }"
    return figure.replace("</style>", f"\n{style}</style>", 1)


def _make_axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    return figure, figure.add_subplot()


def _render(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()
