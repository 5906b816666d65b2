"""The table of rows that `kdpipe rows` made: by group and task, with intervals and differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from kdpipe.data.errors import KdpipeError
from kdpipe.pipeline.report.accuracy import Count, Pair
from kdpipe.pipeline.report.charts import Line, Mark, whiskers
from kdpipe.pipeline.report.reading import read_json
from kdpipe.pipeline.report.values import mapping, mappings, number, text


@dataclass(frozen=True)
class RowResult:
    """One row: a configuration over its seeds.

    Attributes:
        name: short.
        title: for people.
        seeds: as a text.
        counts: by group or task.
        against: by other row, by group: the difference.
        by_seed: by group, the accuracy of each seed.
    """

    name: str
    title: str
    seeds: str
    groups: Mapping[str, Count]
    tasks: Mapping[str, Count]
    against: Mapping[str, Mapping[str, Pair]]
    by_seed: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class RowsPart:
    """The section.

    Attributes:
        rows: in the order of the file.
        groups, tasks: names of the columns.
        plots: a drawing for each group, by its name.
        references: rows that others are held against.
    """

    rows: Sequence[RowResult]
    groups: Sequence[str]
    tasks: Sequence[str]
    plots: Mapping[str, Markup]
    references: Sequence[str]


def read_rows(path: Path) -> RowsPart:
    """Reads results.json of `kdpipe rows`.

    Raises:
        NotThere: it is not there.
        KdpipeError: it cannot be read, or holds no rows.
    """
    found = read_json(path, "`kdpipe rows`")
    given = found.get("rows")
    rows = [_row(row) for row in given if isinstance(row, Mapping)] if isinstance(given, list) else []
    if not rows:
        raise KdpipeError(f"{path}: holds no rows. Name the results.json that `kdpipe rows` wrote.")
    groups = list(dict.fromkeys(name for row in rows for name in row.groups))
    tasks = list(dict.fromkeys(name for row in rows for name in row.tasks))
    references = list(dict.fromkeys(name for row in rows for name in row.against))
    return RowsPart(rows, groups, tasks, {group: _plot(rows, group) for group in groups}, references)


def _row(row: Mapping[str, Any]) -> RowResult:
    seeds = row.get("seeds")
    return RowResult(
        name=text(row.get("name")),
        title=text(row.get("title")) or text(row.get("name")),
        seeds=", ".join(str(seed) for seed in seeds if type(seed) is int) if isinstance(seeds, list) else "",
        groups=_counts(row.get("groups")),
        tasks=_counts(row.get("tasks")),
        against={
            other: {group: pair for group, value in mappings(held).items() if (pair := Pair.of(value)) is not None}
            for other, held in mappings(row.get("against")).items()
        },
        by_seed=_by_seed(row.get("by_seed")),
    )


def _counts(value: Any) -> dict[str, Count]:
    return {name: found for name, given in mapping(value).items() if (found := Count.of(given)) is not None}


def _by_seed(value: Any) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for groups in mappings(value).values():
        for group, share in groups.items():
            if (known := number(share)) is not None:
                found.setdefault(group, []).append(known)
    return found


def _plot(rows: Sequence[RowResult], group: str) -> Markup:
    lines = []
    for row in rows:
        found = row.groups.get(group)
        if found is not None and found.accuracy is not None:
            small = row.by_seed.get(group, ())
            mark = Mark(found.accuracy, found.interval, "student", small=small if len(small) > 1 else ())
            lines.append(Line(row.title, [mark]))
    said = f"Accuracy of each row on {group} with 95 % intervals; the same numbers stand in the table"
    return whiskers(said, lines, f"{group}: accuracy (%)")
