"""Numbers out of files that may hold anything: what is not of the right kind counts as not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Interval = tuple[float, float]

_HUGE = 1e300


def number(value: Any) -> float | None:
    """A finite number that can be multiplied a little, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if abs(found) < _HUGE else None


def count(value: Any) -> int:
    """A number of things; 0 where there is none."""
    return value if type(value) is int and value >= 0 else 0


def interval(value: Any) -> Interval | None:
    """Two numbers in order, or None."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None or low > high else (low, high)


def mapping(value: Any) -> Mapping[str, Any]:
    """A mapping; an empty one where there is none."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: Any) -> dict[str, Mapping[str, Any]]:
    """The entries of a mapping that are mappings themselves."""
    return {name: found for name, found in mapping(value).items() if isinstance(found, Mapping)}


def text(value: Any) -> str:
    """A text; an empty one where there is none."""
    return value if isinstance(value, str) else ""


def percent(value: float | None, digits: int = 1) -> str:
    """A share: `61.7 %`, or `–`."""
    return "–" if value is None else f"{_rounded(100 * value, digits)}\u00a0%"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of shares: `+3.2`, in percentage points."""
    return "–" if value is None else f"{round(100 * value, digits) + 0.0:+.{digits}f}".replace("-", "−")


def percents(value: Interval | None) -> str:
    """An interval of shares: `54.1 to 68.9 %`."""
    return "–" if value is None else f"{_rounded(100 * value[0], 1)} to {_rounded(100 * value[1], 1)}\u00a0%"


def _rounded(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # no −0.0


def points_between(value: Interval | None) -> str:
    """An interval of differences: `−1.0 to +7.4`."""
    return "–" if value is None else f"{points(value[0])} to {points(value[1])}"


def probability(value: float | None) -> str:
    """A p value: `0.034`, `< 0.001`, or `–`."""
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def short(value: float | None) -> str:
    """A number in about four characters: `0.0123`, `12.3`, `1.2e-05`."""
    if value is None:
        return "–"
    return f"{value:.3g}".replace("-", "−")


def cut(text: str, most: int = 80) -> str:
    """The beginning of a text that is too long, and how much more there is."""
    if len(text) <= most:
        return text
    return f"{text[: most - 1]}…" if most < 1000 else f"{text[:most]} … ({len(text) - most:,} more characters)"


def visible(text: str) -> str:
    """The text with what does not print, or would turn the direction of writing, escaped.

    Line ends, tabs and no-break spaces stay.
    """
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in "\n\t\u00a0"
        else char.encode("unicode_escape", "surrogatepass").decode("ascii")
        for char in text
    )
