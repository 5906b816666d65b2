"""Accuracy by task, base beside student, from evaluate/scores.json: tables, plots, and the result in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from kdpipe.pipeline.report.charts import Line, Mark, whiskers
from kdpipe.pipeline.report.values import (
    Interval,
    count,
    cut,
    interval,
    mapping,
    mappings,
    number,
    percent,
    percents,
    points,
    points_between,
    probability,
    text,
)

BASE, STUDENT = "base", "student"
_ALL = "all"


@dataclass(frozen=True)
class Count:
    """The score of one model on some samples; shares from 0 to 1."""

    accuracy: float | None
    interval: Interval | None
    n: int
    correct: int
    unanswered: int

    @staticmethod
    def of(value: Any) -> Count | None:
        """From what scores.json has; None where it has nothing."""
        found = mapping(value)
        if not found:
            return None
        return Count(
            number(found.get("accuracy")),
            interval(found.get("interval")),
            count(found.get("n")),
            count(found.get("correct")),
            count(found.get("unanswered")),
        )

    def __str__(self) -> str:
        return percent(self.accuracy)

    @property
    def span(self) -> str:
        """Its interval as a text."""
        return percents(self.interval)


@dataclass(frozen=True)
class Pair:
    """Student minus base over samples that both answered."""

    n: int
    difference: float | None
    interval: Interval | None
    gained: int
    forgotten: int
    p_value: float | None

    @staticmethod
    def of(value: Any) -> Pair | None:
        """From what scores.json has; None where it has nothing."""
        found = mapping(value)
        if not found:
            return None
        return Pair(
            count(found.get("n")),
            number(found.get("difference")),
            interval(found.get("interval")),
            count(found.get("gained")),
            count(found.get("forgotten")),
            number(found.get("p_value")),
        )

    def __str__(self) -> str:
        return points(self.difference)

    @property
    def span(self) -> str:
        """Its interval as a text."""
        return points_between(self.interval)

    @property
    def p(self) -> str:
        """Its p value as a text."""
        return probability(self.p_value)

    @property
    def p_said(self) -> str:
        """`p = 0.03` or `p < 0.001`."""
        return f"p {self.p}" if self.p.startswith("<") else f"p\u00a0=\u00a0{self.p}"


@dataclass(frozen=True)
class Comparison:
    """A row of a table: a task, or a category, and how the models do on it."""

    name: str
    base: Count | None
    student: Count | None
    pair: Pair | None = None

    @property
    def n(self) -> int:
        """Samples scored."""
        return max([found.n for found in (self.base, self.student) if found is not None], default=0)


@dataclass(frozen=True)
class Table:
    """Comparisons with their plot."""

    title: str
    rows: Sequence[Comparison]
    plot: Markup


@dataclass(frozen=True)
class Benchmark:
    """One model's score on a benchmark, over the official denominator and the strict one."""

    name: str
    model: str
    measure: str
    official: str
    official_n: int
    strict: str
    strict_n: int


def tables(scores: Mapping[str, Any]) -> list[Table]:
    """By task, and by each column of the manifest that scores.json tells of."""
    base, student = mapping(scores.get(BASE)), mapping(scores.get(STUDENT))
    base_by, student_by = mappings(base.get("by_task")), mappings(student.get("by_task"))
    paired = mapping(scores.get("paired"))
    pairs = mappings(paired.get("by_task"))
    tasks = sorted({*base_by, *student_by})
    rows = [Comparison(_ALL, Count.of(base), Count.of(student), Pair.of(paired.get("all")))]
    if tasks != [_ALL]:
        rows += [
            Comparison(task, Count.of(base_by.get(task)), Count.of(student_by.get(task)), Pair.of(pairs.get(task)))
            for task in tasks
        ]
    found = [_table("By task", rows)]
    for column, values in mappings(scores.get("by")).items():
        title = f"By {column.replace('_', ' ')}"
        found.append(
            _table(
                title,
                [
                    Comparison(value, Count.of(two.get(BASE)), Count.of(two.get(STUDENT)))
                    for value, two in mappings(values).items()
                ],
            )
        )
    return [table for table in found if any(row.base or row.student for row in table.rows)]


def _table(title: str, rows: Sequence[Comparison]) -> Table:
    lines = []
    for row in rows:
        marks = [
            Mark(found.accuracy, found.interval, style, style == "base")
            for found, style in ((row.base, "base"), (row.student, "student"))
            if found is not None and found.accuracy is not None
        ]
        lines.append(Line(f"{row.name} (n = {row.n})", marks))
    said = f"Accuracy {title[0].lower()}{title[1:]} with 95 % intervals; the same numbers stand in the table"
    return Table(title, rows, whiskers(said, lines, "accuracy (%)"))


def difference_plot(rows: Sequence[Comparison]) -> Markup | None:
    """Student minus base by task, with intervals; None where nothing is paired."""
    lines = [
        Line(f"{row.name} (n = {row.pair.n})", [Mark(row.pair.difference, row.pair.interval, "student")])
        for row in rows
        if row.pair is not None and row.pair.difference is not None
    ]
    said = "Student minus base by task with 95 % intervals; the same numbers stand in the table"
    return whiskers(said, lines, "student minus base (points)", zero=True) if lines else None


def benchmarks(scores: Mapping[str, Any]) -> list[Benchmark]:
    """Scores on benchmarks, a line a model."""
    found = []
    for name, models in mappings(scores.get("benchmarks")).items():
        for model, told in mappings(models).items():
            official, strict = mapping(told.get("official")), mapping(told.get("strict"))
            found.append(
                Benchmark(
                    name,
                    model,
                    text(told.get("measure")),
                    percent(number(official.get("score")), 2),
                    count(official.get("n")),
                    percent(number(strict.get("score")), 2),
                    count(strict.get("n")),
                )
            )
    return found


def sentence(scores: Mapping[str, Any]) -> str:
    """The result in words: the student against the base, or what there is of it."""
    base, student = Count.of(scores.get(BASE)), Count.of(scores.get(STUDENT))
    pair = Pair.of(mapping(scores.get("paired")).get("all"))
    split = text(scores.get("split"))
    where = f" of the split {cut(split)}" if split else ""
    if student is None or student.accuracy is None:
        return "No answer was scored." if base is None or base.accuracy is None else _alone(BASE, base, where, STUDENT)
    if base is None or base.accuracy is None:
        return _alone(STUDENT, student, where, BASE)
    both = f"The student answers {student} of {student.n} samples{where} rightly, the base {base} of {base.n}"
    if pair is None or pair.difference is None:
        return f"{both}."
    return (
        f"{_verdict(pair)} {both}: {pair} points on the {pair.n} that both answered (95 % interval {pair.span}, "
        f"{pair.p_said}); {pair.gained} gained, {pair.forgotten} forgotten."
    )


def _alone(model: str, found: Count, where: str, other: str) -> str:
    right = f"{found} of {found.n} samples{where} rightly (95 % interval {found.span})"
    return f"The {model} answers {right}; the {other} was not scored."


def _verdict(pair: Pair) -> str:
    if pair.interval is None or pair.interval[0] <= 0 <= pair.interval[1]:
        return "No clear difference."
    return "The student is better." if pair.interval[0] > 0 else "The student is worse."
