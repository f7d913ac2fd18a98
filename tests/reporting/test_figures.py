import re
import xml.etree.ElementTree as ET

import pytest

from lib.reporting.figures import COLORS, DARK, follow_color_scheme, plot_curves, plot_dots, plot_panels, plot_points, plot_steps

CURVES = {"sliding": [(0.0, 3.0), (1e6, 2.0)], "ttt": [(0.0, 3.0), (1e6, 1.9)]}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_each_name_is_in_the_legend_once_and_axes_are_labelled() -> None:
    found = texts(plot_curves(CURVES, "tokens", "bpb"))
    assert [found.count(text) for text in ("sliding", "ttt", "tokens", "bpb")] == [1, 1, 1, 1]
    assert "1M" in found


def test_names_stand_in_the_order_in_which_their_curves_end() -> None:
    curves = {"high": [(0.0, 1.0), (1.0, 3.0)], "low": [(0.0, 9.0), (1.0, 1.0)], "middle": [(0.0, 0.0), (1.0, 2.0)]}
    assert [text for text in texts(plot_curves(curves, "", "")) if text in curves] == ["high", "middle", "low"]


def test_octaves_are_powers_of_two() -> None:
    curves = {"a": [(8.0, 1.0), (64.0, 2.0), (2048.0, 3.0)]}
    assert {"8", "64", "512"} <= set(texts(plot_curves(curves, "", "", octaves=True)))
    assert "64" not in texts(plot_curves(curves, "", ""))


def test_every_curve_is_drawn_with_its_line_and_its_own_colour() -> None:
    curves = {f"curve {n}": [(0.0, float(n)), (1.0, float(n + 1))] for n in range(len(COLORS) + 1)}  # more than there are colours
    svg = plot_curves(curves, "", "", dashes={"curve 0": "--", "curve 1": ":"})
    lines = [element.get("style", "") for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}path")
             if any(color in element.get("style", "") for color in COLORS)]
    assert len(lines) == 2 * len(curves)  # in the figure and in its legend
    drawn, in_legend = lines[:len(curves)], lines[len(curves):]
    assert [("dasharray" in style) for style in drawn] == [True, True] + [False] * (len(curves) - 2)
    assert [next(color for color in COLORS if color in style) for style in drawn] == [*COLORS, COLORS[0]]
    assert sorted(in_legend) == sorted(drawn)


def test_steps_show_values_and_changes_within_their_group() -> None:
    found = texts(plot_steps({"held-out": {"float": 1.7, "quantized": 1.71}, "validation": {"plain": 1.72, "sliding": 1.68}}, "bpb"))
    assert {"1.7000", "1.7100  (+0.0100)", "1.7200", "1.6800  (-0.0400)", "quantized", "plain",
            "held-out: bpb", "validation: bpb"} <= set(found)


def test_each_ladder_has_an_axis_of_its_own() -> None:
    svg = plot_steps({"held-out": {"float": 1.5, "quantized": 1.6}, "validation": {"plain": 150.0, "sliding": 160.0}}, "bpb")
    marks = [float(element.get("x", "0")) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}use")
             if any(color in element.get("style", "") for color in COLORS)]
    assert len(marks) == 4
    assert marks[:2] == pytest.approx(marks[2:], abs=1e-3)


def test_points_stand_where_their_values_are() -> None:
    svg = plot_points([(64.0, 1.0), (256.0, 2.0), (1024.0, 3.0)], "tokens", "bpb")
    assert {"tokens", "bpb", "64", "1,024"} <= set(texts(svg))
    marks = [(float(element.get("x", "0")), float(element.get("y", "0"))) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}use")
             if COLORS[0] in element.get("style", "")]
    (x0, y0), (x1, y1), (x2, y2) = marks
    assert x0 < x1 < x2 and y0 > y1 > y2
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3)


def test_panels_have_their_own_curves_and_a_common_axis() -> None:
    panels = {"nats": {"KL": [(1e5, 0.01), (2e5, 0.001)]}, "bpb": {"plain": [(1e5, 2.0), (2e5, 1.9)]}}
    found = ["".join(text.split()) for text in texts(plot_panels(panels, "bytes", log=("nats",)))]
    assert [found.count(text) for text in ("KL", "plain", "nats", "bpb", "bytes")] == [1, 1, 1, 1, 1]
    assert {"200k", "10−2", "10−3", "1.90"} <= set(found)


def test_dots_stand_in_their_row_where_their_value_is() -> None:
    values = {"up": {"layer 0": 1e-3, "layer 1": 1e-1}, "table": {"first": 1e-2, "layer 1": 0.0}}
    svg = plot_dots({"loss": values}, ["first", "layer 0", "layer 1"])
    assert [text for text in texts(svg) if text and text[0].isalpha()] == ["loss", "first", "layer 0", "layer 1", "up", "table"]
    marks = [(element.get("style", ""), float(element.get("x", "0")), float(element.get("y", "0")))
             for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}use")
             if any(color in element.get("style", "") for color in COLORS)]
    (up, x0, y0), (_, x1, y1), (table, x2, y2) = marks[:3]  # 0 has no place on a logarithmic axis
    assert up != table
    assert len(marks) == 3 + 2  # and two in the legend
    assert y2 < y0 < y1
    assert x1 - x2 == pytest.approx(x2 - x0, abs=1e-3)
    assert x2 > x0


def test_every_colour_has_another_one_for_dark_pages() -> None:
    figure = plot_panels({"nats": {f"curve {n}": [(1.0, 1.0), (2.0, 2.0)] for n in range(len(COLORS))}}, "bytes")
    used = set(re.findall(r"#[0-9a-f]{6}(?=[;\"])", figure))
    assert used >= {"#ffffff", *COLORS}
    assert used <= DARK.keys()
    assert len(set(DARK.values())) == len(DARK)
    followed = follow_color_scheme(figure)
    ET.fromstring(followed)
    assert re.sub(r"\n@media.*(?=</style>)", "", followed) == figure
    assert all(f'[style*="fill: {light}"] {{ fill: {dark} !important }}' in followed for light, dark in DARK.items())


def test_the_unsettled_part_does_not_set_the_vertical_range() -> None:
    curve = [(0.0, 90.0), *((float(n), 2 + n / 100) for n in range(1, 10))]
    everything, settled = (texts(plot_curves({"a": curve}, "", "", unsettled=fraction)) for fraction in (0, 0.1))
    assert max(map(float, filter(None, everything))) >= 80
    assert max(map(float, filter(None, settled))) < 20


def test_a_figure_is_the_same_bytes_each_time_and_needs_no_other_file() -> None:
    first = plot_curves(CURVES, "tokens", "bpb")
    assert first == plot_curves(CURVES, "tokens", "bpb")
    assert "<dc:date>" not in first
    assert "Matplotlib" not in first  # no version that produced it
