"""What training wrote down: curves of the losses by source over steps, and how far student and teachers are apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.report.charts import Chart, Point, Series, line_chart
from kdpipe.pipeline.report.values import mapping, mappings, number, short
from kdpipe.stages.base import Context

_LAYERED = re.compile(r"(layer|acoustic)/(\d{1,6})")
_TERMS = {
    "top": "Textual teacher, last layer",
    "layer": "Textual teacher, inner layers",
    "acoustic": "Acoustic teacher, states at audio tokens",
    "acoustic_top": "Acoustic teacher, last layer",
    "sft": "Cross-entropy on the traces (sft)",
}
_MEASURES = ("divergence", "cross_entropy", "distance")


@dataclass(frozen=True)
class Apart:
    """How far the student is from one source of the teachers.

    Attributes:
        source: such as `top`, `layer/03`.
        measure: of the distance: `divergence`, `cross_entropy` or `distance`.
        first, last: it, at the first and last logged step, as texts.
        others: name and last value of what else is measured.
        held_out: the last held-out measurement, as a text.
    """

    source: str
    measure: str
    first: str
    last: str
    held_out: str
    others: Mapping[str, str]


def loss_charts(ctx: Context, lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Curves of the loss, of each term, of the layers, of learning rate and gradient.

    Args:
        ctx: the run, for the weights.
        lines: of metrics.jsonl.
    """
    steps = [line for line in lines if "validation" not in line and "skipped" not in line]
    held = _held_out(lines)
    charts = [_pair("Loss, all terms weighted", _along(steps, "loss"), _along(held, "loss"), "nats")]
    weights, sources = ctx.config.train.weights, _by_source(steps)
    for name in dict.fromkeys(name for line in [*steps, *held] for name in mapping(line.get("terms"))):
        weight = number(getattr(weights, name, None))
        note = "" if weight is None else f"Unweighted; its weight is {weight:g}."
        unit = _unit(name, sources)
        title = _TERMS.get(name, name)
        charts.append(_pair(title, _along(steps, "terms", name), _along(held, "terms", name), unit, note))
    for kind, title in (
        ("layer", "By student layer: textual teacher"),
        ("acoustic", "By student layer: acoustic teacher"),
    ):
        charts.append(_layers(kind, title, sources))
    charts.append(line_chart("Learning rate", [Series("learning rate", _along(steps, "learning_rate"))], "rate"))
    charts.append(line_chart("Gradient norm", [Series("gradient norm", _along(steps, "grad_norm"))], "norm"))
    return [chart for chart in charts if chart is not None]


def _unit(term: str, sources: Mapping[str, Mapping[str, Any]]) -> str:
    """Nats, but where the states of layers are compared."""
    is_distance = any(name.split("/")[0] == term and "distance" in seen for name, seen in sources.items())
    return "distance" if is_distance else "nats"


def _pair(title: str, trained: Sequence[Point], held: Sequence[Point], unit: str, note: str = "") -> Chart | None:
    series = [Series("training", trained, "c0"), Series("held out", held, "c1", is_dotted=True)]
    return line_chart(title, series, f"{unit} a token", note)


def _along(lines: Iterable[Mapping[str, Any]], *path: str) -> list[Point]:
    """The value at a path of names in each line that has one, by step."""
    found = []
    for line in lines:
        value: Any = line
        for name in path:
            value = mapping(value).get(name)
        known = number(value)
        if known is not None:
            found.append((float(line["step"]), known))
    return found


def _by_source(lines: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """What `sources` of the lines holds: source, name, and the values by step."""
    found: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        for source, seen in mappings(line.get("sources")).items():
            held = found.setdefault(source, {})
            for name, value in seen.items():
                known = number(value)
                if known is not None:
                    held.setdefault(name, []).append((float(line["step"]), known))
    return found


def _layers(kind: str, title: str, sources: Mapping[str, Mapping[str, Sequence[Point]]]) -> Chart | None:
    names = sorted(name for name in sources if (match := _LAYERED.fullmatch(name)) and match[1] == kind)
    series = []
    for place, name in enumerate(names):
        points = sources[name].get(_measure(sources[name]), ())
        strength = 0.3 + 0.7 * (place + 1) / len(names)
        series.append(Series(f"layer {int(name.rpartition('/')[2])}", points, "c2", strength))
    note = "Lower layers are fainter." if len(series) > 1 else ""
    return line_chart(title, series, f"{_unit(kind, sources)} a token", note)


def _measure(seen: Mapping[str, Any]) -> str:
    return next((name for name in _MEASURES if name in seen), _MEASURES[0])


def apart(lines: Sequence[Mapping[str, Any]]) -> list[Apart]:
    """How far the student is from each source of the teachers, as the metrics say."""
    sources = _by_source(line for line in lines if "validation" not in line)
    held_out = _by_source(_held_out(lines))
    found = []
    for source in sorted(sources, key=_order):
        seen = sources[source]
        measure = _measure(seen)
        points = seen.get(measure, [])
        validated = held_out.get(source, {}).get(measure, [])
        others = {name: short(known[-1][1]) for name, known in seen.items() if name not in _MEASURES}
        found.append(Apart(source, measure, _value(points, 0), _value(points, -1), _value(validated, -1), others))
    return found


def _value(points: Sequence[Point], place: int) -> str:
    return short(points[place][1]) if points else "–"


def _held_out(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The held-out measurements, each with its step."""
    return [{**mapping(line["validation"]), "step": line["step"]} for line in lines if "validation" in line]


def _order(source: str) -> tuple[int, str]:
    kinds = ("top", "layer", "acoustic_top", "acoustic")
    kind = source.split("/")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds), source)
