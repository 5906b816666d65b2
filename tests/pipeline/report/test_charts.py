"""Axes, curves and whiskers as numbers."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from kdpipe.pipeline.report.charts import Line, Mark, Series, line_chart, ticks, whiskers
from kdpipe.pipeline.report.values import interval, number, percent, percents, points, probability, short


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.3, 0.31), (-5, 12), (1e-9, 3e-9), (7, 7), (0, 0), (1e6, 3e6), (-2, -1)]
)
def test_ticks_reach_around_the_values(low: float, high: float):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 8 and found == sorted(found) and found[0] <= low + 1e-12 and found[-1] >= high - 1e-12
    steps = {round((b - a) / (found[1] - found[0]), 6) for a, b in pairwise(found)}
    assert steps == {1.0}


def test_ticks_of_steps_are_whole():
    assert ticks(0, 600, 5, whole=True) == [0, 200, 400, 600]
    assert ticks(0, 1, 5, whole=True) == [0, 1] and ticks(0, 3, 5, whole=True) == [0, 1, 2, 3]


def places(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'<path class="c0"[^>]* d="M([^"]*)"', svg)
    assert path
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path[1].split("L"))]


def test_a_curve_lies_where_its_numbers_are():
    chart = line_chart("Loss", [Series("loss", [(0, 0.0), (50, 1.0), (100, 0.5)])], "nats")
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = places(chart.svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y1 < y2 < y0
    assert y2 - y1 == pytest.approx(y0 - y2, abs=0.2)
    assert chart.series[0].last == "0.5"


def test_a_long_curve_is_drawn_as_means():
    chart = line_chart("Loss", [Series("loss", [(step, float(step % 2)) for step in range(1000)])], "nats")
    assert chart is not None and len(places(chart.svg)) == 200 and "mean of 5 logged steps" in chart.note
    assert chart.series[0].last == "1", "the last value is that of the last step"


def test_curves_of_one_point_or_none():
    assert line_chart("x", [Series("a", [])], "y") is None
    chart = line_chart("x", [Series("a", [(3, 0.1)]), Series("b", [])], "y")
    assert chart is not None and "<circle" in chart.svg and len(chart.series) == 1


def test_whiskers_lie_where_their_numbers_are():
    svg = whiskers("t", [Line("a", [Mark(0.5, (0.25, 0.75), "student")]), Line("b", [])], "accuracy (%)")
    centre = float(re.findall(r'<circle class="student full" cx="([\d.]+)"', svg)[0])
    first, last = map(float, re.findall(r'd="M([\d.]+) [\d.]+H([\d.]+)', svg)[0])
    assert centre == pytest.approx((first + last) / 2, abs=0.1) and first < last
    assert whiskers("t", [], "x") and ">b<" in svg


def test_numbers_as_texts():
    assert (percent(0.617), percent(None)) == ("61.7\u00a0%", "–")
    assert percents((-0.0001, 0.5)) == "0.0 to 50.0\u00a0%"
    assert (points(0.031), points(-0.031), points(-0.0001)) == ("+3.1", "−3.1", "+0.0")
    assert (probability(0.0004), probability(0.0342), short(-0.00001234)) == ("< 0.001", "0.034", "−1.23e−05")


def test_what_is_no_number_is_none():
    assert [number(value) for value in (True, "1", None, float("nan"), 10**400, [])] == [None] * 6
    assert interval([0.1, 0.2]) == (0.1, 0.2)
    assert [interval(value) for value in ([0.2, 0.1], "ab", [1], None, [0, float("inf")])] == [None] * 5
