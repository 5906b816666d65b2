"""Small drawings as inline SVG: curves over steps, and dots with whiskers. Colours are classes of the page's style.

Sizes are in units of a view box that is about as wide as a phone, so that text stays as large as the page's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from kdpipe.pipeline.report.values import cut, short, visible

Point = tuple[float, float]

_WIDTH, _HEIGHT = 340, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 12, 40
_MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        name: for the legend.
        points: (step, value), in order.
        style: class of its colour: `c0`, `c1`, ...
        strength: of its ink, 0 to 1.
        is_dotted: whether its points are marked, as of few measurements.
    """

    name: str
    points: Sequence[Point]
    style: str = "c0"
    strength: float = 1.0
    is_dotted: bool = False

    @property
    def last(self) -> str:
        """Its last value."""
        return short(self.points[-1][1]) if self.points else "–"


@dataclass(frozen=True)
class Chart:
    """A drawing with its legend.

    Attributes:
        title: what it shows.
        svg: the drawing.
        series: of the legend.
        note: a sentence below, or empty.
    """

    title: str
    svg: Markup
    series: Sequence[Series]
    note: str = ""


def line_chart(title: str, series: Sequence[Series], y_label: str, note: str = "") -> Chart | None:
    """Curves over training steps; None where there is no point at all.

    Long curves are drawn as means of equal stretches of steps, 240 at most, which the note then says.
    """
    drawn = [one for one in series if one.points]
    if not drawn:
        return None
    longest = max(len(one.points) for one in drawn)
    if longest > _MOST_POINTS:
        note = f"{note} Each point is a mean of {-(-longest // _MOST_POINTS)} logged steps.".strip()
    thinned = [_thin(one.points) for one in drawn]
    ys = [y for points in thinned for _, y in points]
    x_high = max(x for one in drawn for x, _ in one.points)
    x_ticks, y_ticks = ticks(0.0, x_high, 5, whole=True), ticks(min(ys), max(ys), 4)
    x_low, x_high = 0.0, max(x_high, x_ticks[-1])
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        wide, high = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return round(_LEFT + across * wide, 1), round(_TOP + (1 - up) * high, 1)

    parts = []
    for y in y_ticks:
        at = place(x_low, y)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4}" text-anchor="end">{_tick(y, y_ticks)}</text>')
    for x in x_ticks:
        at = place(x, y_low)[0]
        parts.append(f'<text x="{at}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{_tick(x, x_ticks)}</text>')
    for one, points in zip(drawn, thinned, strict=True):
        places = [place(*point) for point in points]
        ink = f'class="{escape(one.style)}" stroke-opacity="{one.strength:.2f}"'
        if len(places) > 1:
            path = "M" + "L".join(f"{x} {y}" for x, y in places)
            parts.append(f'<path {ink} d="{path}"/>')
        if one.is_dotted or len(places) == 1:
            parts += [f'<circle {ink} cx="{x}" cy="{y}" r="2.5"/>' for x, y in places]
    middle = _TOP + (_HEIGHT - _TOP - _BOTTOM) / 2
    parts.append(
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">step</text>'
    )
    parts.append(
        f'<text class="label" x="11" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 11 {middle})">{escape(visible(cut(y_label, 28)))}</text>'
    )
    said = "; ".join(f"{one.name}: last {one.last}" for one in drawn[:6])
    return Chart(title, _svg(_WIDTH, _HEIGHT, f"{title} over steps. {said}", parts), drawn, note)


def _thin(points: Sequence[Point]) -> list[Point]:
    stretch = -(-len(points) // _MOST_POINTS)
    if stretch <= 1:
        return list(points)
    groups = [points[at : at + stretch] for at in range(0, len(points), stretch)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers, at least two, that reach from below `low` to above `high` (with `whole`: lie between them)."""
    if not high - low > 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = (low, high + 1) if whole else (low - pad, high + pad)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, float(round(step)))
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    found = [number * step for number in range(first, last + 1)]
    return found if len(found) > 1 else [low, high]


def _tick(value: float, among: Sequence[float]) -> str:
    step = abs(among[1] - among[0])
    largest = max(map(abs, among))
    if largest >= 1e5 or largest < 0.01:
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}".replace("-", "−") if value else "0"
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != round(step, digits + 1):
        digits += 1
    return f"{value:,.{digits}f}".replace("-", "−")


@dataclass(frozen=True)
class Mark:
    """A dot with its whiskers: value, interval or None, class of its colour, whether it is hollow, and small dots."""

    value: float
    interval: tuple[float, float] | None
    style: str
    is_hollow: bool = False
    small: Sequence[float] = ()


@dataclass(frozen=True)
class Line:
    """A label with the marks below it."""

    label: str
    marks: Sequence[Mark]


_ROW, _LABEL, _SIDE = 13, 18, 14


def whiskers(title: str, lines: Sequence[Line], x_label: str, *, scale: float = 100.0, zero: bool = False) -> Markup:
    """Dots with whiskers, a label above each group of them.

    Args:
        title: what it shows, for those who do not see it.
        lines: from top to bottom.
        x_label: of the axis.
        scale: numbers are shown times this (shares as percents).
        zero: draw a line at zero, and let the axis reach it.
    """
    marks = [mark for line in lines for mark in line.marks]
    numbers = [n * scale for mark in marks for n in (mark.value, *(mark.interval or ()), *mark.small)]
    numbers += [0.0] if zero else []
    across = ticks(min(numbers, default=0.0), max(numbers, default=1.0), 4)
    low, high = across[0], across[-1]
    height = _TOP + sum(_LABEL + _ROW * max(1, len(line.marks)) + 4 for line in lines) + 38

    def at(x: float) -> float:
        return round(_SIDE + (x * scale - low) / (high - low) * (_WIDTH - 2 * _SIDE), 1)

    foot = height - 34
    parts = []
    for tick in across:
        x = at(tick / scale)
        kind = "axis" if zero and abs(tick) < 1e-9 else "grid"
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{_TOP}" y2="{foot}"/>')
        parts.append(f'<text x="{x}" y="{foot + 14}" text-anchor="middle">{_tick(tick, across)}</text>')
    y = float(_TOP)
    for line in lines:
        parts.append(f'<text class="name" x="{_SIDE - 8}" y="{y + 12}">{escape(visible(cut(line.label, 48)))}</text>')
        y += _LABEL
        for mark in line.marks:
            middle = y + _ROW / 2
            ink = f'class="{escape(mark.style)}{" hollow" if mark.is_hollow else " full"}"'
            if mark.interval is not None:
                first, last = at(mark.interval[0]), at(mark.interval[1])
                ends = "".join(f"M{x} {middle - 3}v6" for x in (first, last))
                parts.append(f'<path {ink} d="M{first} {middle}H{last}{ends}"/>')
            parts += [f'<circle class="small" cx="{at(value)}" cy="{middle}" r="2"/>' for value in mark.small]
            parts.append(f'<circle {ink} cx="{at(mark.value)}" cy="{middle}" r="4"/>')
            y += _ROW
        y += 4 + _ROW * (not line.marks)
    below = escape(visible(cut(x_label, 48)))
    parts.append(f'<text class="label" x="{_WIDTH / 2}" y="{height - 4}" text-anchor="middle">{below}</text>')
    return _svg(_WIDTH, round(height), title, parts)


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> Markup:
    inner = "".join(parts)
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(visible(cut(title, 240)))}">{inner}</svg>'
    )
