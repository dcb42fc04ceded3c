"""Charts: axes hold their data, marks lie where the values are, text is escaped."""

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.charts import (
    CHARACTER_WIDTH,
    HEIGHT,
    WIDTH,
    Bar,
    Series,
    bar_chart,
    format_tick,
    line_chart,
    linear_axis,
    log_axis,
    thin,
)

SVG = "{http://www.w3.org/2000/svg}"
values = st.floats(-1e9, 1e9, allow_nan=False).map(lambda v: round(v, 6))


def numbers(text: str) -> list[float]:
    return [float(v) for v in re.findall(r"-?\d+(?:\.\d+)?", text)]


@given(values, values)
def test_a_snapped_axis_covers_its_values_with_a_handful_of_ticks(a, b):
    low, high = min(a, b), max(a, b)
    axis = linear_axis(low, high, snap=True)
    slack = 1e-9 * max(abs(low), abs(high), 1e-6)
    assert axis.low <= low + slack and axis.high >= high - slack
    assert 2 <= len(axis.ticks) <= 9
    assert list(axis.ticks) == sorted(set(axis.ticks))


@given(st.floats(1e-6, 1e6), st.floats(1.0, 1e6))
def test_a_logarithmic_axis_covers_its_values(low, ratio):
    axis = log_axis(low, low * ratio)
    assert axis.low <= low and axis.high >= low * ratio
    assert axis.position(axis.low) == 0 and axis.position(axis.high) == pytest.approx(1)


@pytest.mark.parametrize(
    "value,text", [(0, "0"), (0.05, "0.05"), (1500, "1500"), (20_000, "20k"), (1.5e6, "1.5M"), (-30_000, "-30k")]
)
def test_tick_text_is_short(value, text):
    assert format_tick(value) == text


def test_ticks_are_round_numbers():
    assert linear_axis(0.0, 0.5, snap=True).ticks == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    assert linear_axis(3.2, 8.4, snap=True).ticks == (2.0, 4.0, 6.0, 8.0, 10.0)


def test_points_stand_at_their_values():
    svg = ElementTree.fromstring(line_chart([Series("loss", [0, 50, 100], [0, 5, 10])], title="t", x_label="step"))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter(f"{SVG}circle") if c.get("r") == "3"]
    assert dots[1] == pytest.approx(((dots[0][0] + dots[2][0]) / 2, (dots[0][1] + dots[2][1]) / 2), abs=0.1)
    assert dots[0][1] > dots[2][1], "larger values are drawn higher up"


def test_every_error_has_its_bar():
    errors = [1.0, None, 2.0]
    svg = ElementTree.fromstring(line_chart([Series("d", [1, 2, 3], [4, 5, 6], errors)], title="t", x_label="step"))
    bars = [path.get("d") for path in svg.iter(f"{SVG}path")]
    heights = [abs(numbers(bar)[1] - numbers(bar)[4]) for bar in bars]
    assert len(bars) == 2 and heights[1] == pytest.approx(2 * heights[0], rel=0.02)


def test_a_curve_of_many_points_has_its_errors_as_a_band():
    n = 60
    x, y, errors = list(range(n)), [5.0 + i % 3 for i in range(n)], [1.0 + i % 2 for i in range(n - 1)] + [None]
    svg = ElementTree.fromstring(line_chart([Series("d", x, y, errors, colour=2)], title="t", x_label="step"))
    assert not list(svg.iter(f"{SVG}path")) and len(list(svg.iter(f"{SVG}circle"))) == 1, "that of the legend"
    (band,), (line,) = ([numbers(mark.get("points")) for mark in svg.iter(f"{SVG}{kind}")] for kind in ("polygon", "polyline"))
    high, middle, low = band[1 : 2 * n : 2], line[1::2], band[: 2 * n : -2]
    assert band[: 2 * n : 2] == line[::2] == band[-2 : 2 * n - 1 : -2], "over the whole curve and back"
    heights = [bottom - top for top, bottom in zip(high, low)]
    assert heights == pytest.approx([(e or 0.0) * heights[0] for e in errors], abs=0.2)
    assert [(top + bottom) / 2 for top, bottom in zip(high, low)] == pytest.approx(middle, abs=0.11)
    without = line_chart([Series("d", x, y)], title="t", x_label="step")
    assert "polygon" not in without and "polyline" in without


@given(st.lists(st.tuples(values, values, st.floats(0, 1e6)), min_size=1, max_size=30))
def test_all_marks_lie_inside_the_chart(rows):
    x, y, error = zip(*rows)
    svg = ElementTree.fromstring(line_chart([Series("s", x, y, error)], title="t", x_label="x"))
    for circle in svg.iter(f"{SVG}circle"):
        assert -1 <= float(circle.get("cx")) <= WIDTH + 1 and float(circle.get("cy")) <= HEIGHT


def test_values_that_are_not_numbers_are_left_out():
    chart = line_chart([Series("s", [1, 2, 3], [1.0, math.nan, math.inf])], title="t", x_label="x")
    assert "nan" not in chart and "inf" not in chart
    assert "no values" in line_chart([Series("s", [], [])], title="t", x_label="x")


def test_bars_are_as_long_as_their_values():
    svg = ElementTree.fromstring(
        bar_chart([Bar("a", 10, 1, "10 ± 1"), Bar("b", 40, None, "40"), Bar("c", math.nan, None, "nan")], title="t")
    )
    widths = [float(rect.get("width")) for rect in svg.iter(f"{SVG}rect")]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.3) and widths[2] == 0
    assert len(list(svg.iter(f"{SVG}path"))) == 1
    assert bar_chart([], title="nothing").startswith("<svg")


def test_text_is_escaped():
    chart = line_chart([Series("<a>&", [1], [1])], title='"<script>', x_label="<x>")
    assert "<script>" not in chart and "<a>" not in chart
    ElementTree.fromstring(chart)


@given(st.lists(values, min_size=1, max_size=200), st.integers(1, 50))
def test_thinning_keeps_the_mean_of_whole_runs(y, most):
    x = list(range(len(y)))
    thin_x, thin_y, k = thin(x, y, most)
    assert len(thin_x) == len(thin_y) <= most
    assert thin_y[0] == pytest.approx(sum(y[:k]) / len(y[:k]))
    if k == 1:
        assert thin_y == y


@pytest.mark.parametrize("num_series", [1, 2, 6])
@pytest.mark.parametrize("label", ["a", "imagenet/run-651m", "cfg_scale 2, cfg_schedule power-cosine", "x" * 200])
def test_the_names_of_the_series_stay_on_the_chart(num_series, label):
    series = [Series(label, [0.0, 1.0], [1.0, 2.0], [], colour=i + 1) for i in range(num_series)]
    svg = ElementTree.fromstring(line_chart(series, title="t", x_label="step"))
    top = numbers(svg.get("viewBox"))[1]
    names = [text for text in svg.iter(f"{SVG}text") if text.text[0] == label[0] and text.get("text-anchor") == "start"]
    assert len(names) == num_series
    places = {(float(name.get("x")), float(name.get("y"))) for name in names}
    assert len(places) == num_series and all(top < y < 0 for _, y in places)
    assert all(float(name.get("x")) + CHARACTER_WIDTH * len(name.text) <= WIDTH for name in names)
