"""What training wrote down: curves of the losses by source over steps, and how far student and teachers are apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.pipeline.report.charts import Chart, Point, Series, line_chart
from kdpipe.pipeline.report.values import mapping, mappings, number, short
from kdpipe.stages.base import Context

_LAYERED = re.compile(r"(layer|acoustic)/(\d+)")
_TERMS = {
    "top": "Textual teacher, last layer",
    "layer": "Textual teacher, inner layers",
    "acoustic": "Acoustic teacher, states at audio tokens",
    "acoustic_top": "Acoustic teacher, last layer",
    "sft": "Cross-entropy on the traces (sft)",
}
_MEASURES = ("divergence", "cross_entropy", "distance")
_SHOWN = (*_MEASURES, "agreement", "teacher_entropy", "student_entropy", "teacher_kept", "student_kept")


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
    held = [{**mapping(line["validation"]), "step": line["step"]} for line in lines if "validation" in line]
    charts = [_pair("Loss, all terms weighted", _along(steps, "loss"), _along(held, "loss"), "nats")]
    weights = ctx.config.train.weights
    for name in dict.fromkeys(name for line in [*steps, *held] for name in mapping(line.get("terms"))):
        weight = number(getattr(weights, name, None))
        note = "" if weight is None else f"Unweighted; its weight is {weight:g}."
        found = _pair(
            _TERMS.get(name, name), _along(steps, "terms", name), _along(held, "terms", name), _unit(name), note
        )
        charts.append(found)
    for kind, title in (
        ("layer", "By student layer: textual teacher"),
        ("acoustic", "By student layer: acoustic teacher"),
    ):
        charts.append(_layers(kind, title, steps))
    charts.append(line_chart("Learning rate", [Series("learning rate", _along(steps, "learning_rate"))], "rate"))
    charts.append(line_chart("Gradient norm", [Series("gradient norm", _along(steps, "grad_norm"))], "norm"))
    return [chart for chart in charts if chart is not None]


def _unit(term: str) -> str:
    return "distance" if term == "acoustic" else "nats"


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


def _layers(kind: str, title: str, steps: Sequence[Mapping[str, Any]]) -> Chart | None:
    names = sorted(
        {
            name
            for line in steps
            for name in mappings(line.get("sources"))
            if (m := _LAYERED.fullmatch(name)) and m[1] == kind
        }
    )
    series = []
    for place, name in enumerate(names):
        measure = _measure(steps, name)
        strength = 0.3 + 0.7 * (place + 1) / len(names)
        series.append(
            Series(f"layer {int(name.rpartition('/')[2])}", _along(steps, "sources", name, measure), "c2", strength)
        )
    note = "Lower layers are fainter." if len(series) > 1 else ""
    return line_chart(title, series, f"{_measure(steps, names[0])} a token" if names else "", note)


def _measure(lines: Iterable[Mapping[str, Any]], source: str) -> str:
    for line in lines:
        seen = mapping(mapping(line.get("sources")).get(source))
        for name in _MEASURES:
            if name in seen:
                return name
    return _MEASURES[0]


def apart(lines: Sequence[Mapping[str, Any]]) -> list[Apart]:
    """How far the student is from each source of the teachers, as the metrics say."""
    steps = [line for line in lines if "validation" not in line]
    held = [{**mapping(line["validation"]), "step": line["step"]} for line in lines if "validation" in line]
    found = []
    for source in sorted({name for line in steps for name in mappings(line.get("sources"))}, key=_order):
        measure = _measure(steps, source)
        points, validated = _along(steps, "sources", source, measure), _along(held, "sources", source, measure)
        others = {
            name: short(known[-1][1])
            for name in _SHOWN
            if name not in _MEASURES and (known := _along(steps, "sources", source, name))
        }
        found.append(
            Apart(
                source,
                measure,
                short(points[0][1] if points else None),
                short(points[-1][1] if points else None),
                short(validated[-1][1] if validated else None),
                others,
            )
        )
    return found


def _order(source: str) -> tuple[int, str]:
    kinds = ("top", "layer", "acoustic_top", "acoustic")
    kind = source.split("/")[0]
    return (kinds.index(kind) if kind in kinds else len(kinds), source)
