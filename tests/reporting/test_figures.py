import xml.etree.ElementTree as ET

from lib.reporting.figures import plot_curves, plot_panels, plot_steps

GROUPS = {"sliding": [[(0.0, 3.0), (1e6, 2.0)], [(0.0, 3.1), (1e6, 2.1)]], "ttt": [[(0.0, 3.0), (1e6, 1.9)]]}


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_each_name_is_in_the_legend_once_and_axes_are_labelled() -> None:
    found = texts(plot_curves(GROUPS, "tokens", "bpb"))
    assert [found.count(text) for text in ("sliding", "ttt", "tokens", "bpb")] == [1, 1, 1, 1]
    assert "1M" in found


def test_steps_show_values_and_changes_within_their_group() -> None:
    found = texts(plot_steps({"held-out": {"float": 1.7, "quantized": 1.71}, "validation": {"plain": 1.72, "sliding": 1.68}}, "bpb"))
    assert {"1.7000", "1.7100  (+0.0100)", "1.7200", "1.6800  (-0.0400)", "held-out: quantized", "validation: plain"} <= set(found)


def test_panels_have_their_own_curves_and_a_common_axis() -> None:
    panels = {"nats": {"KL": [(1e5, 0.01), (2e5, 0.001)]}, "bpb": {"plain": [(1e5, 2.0), (2e5, 1.9)]}}
    found = ["".join(text.split()) for text in texts(plot_panels(panels, "bytes", log=("nats",)))]
    assert [found.count(text) for text in ("KL", "plain", "nats", "bpb", "bytes")] == [1, 1, 1, 1, 1]
    assert {"200k", "10−2", "10−3", "1.90"} <= set(found)


def test_the_unsettled_part_does_not_set_the_vertical_range() -> None:
    curve = [(0.0, 90.0), *((float(n), 2 + n / 100) for n in range(1, 10))]
    everything, settled = (texts(plot_curves({"a": [curve]}, "", "", unsettled=fraction)) for fraction in (0, 0.1))
    assert max(map(float, filter(None, everything))) >= 80
    assert max(map(float, filter(None, settled))) < 20


def test_a_figure_is_the_same_bytes_each_time_and_needs_no_other_file() -> None:
    first = plot_curves(GROUPS, "tokens", "bpb")
    assert first == plot_curves(GROUPS, "tokens", "bpb")
    assert "<dc:date>" not in first
    assert "Matplotlib" not in first  # no version that produced it
