"""`rows/results.json` and the table: each row's accuracy by group and task over questions and seeds, with intervals.

Legend: S seeds, N questions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import KdpipeError
from kdpipe.data.manifest import Sample
from kdpipe.pipeline.rows.definition import Row
from kdpipe.pipeline.terminal import printable

if TYPE_CHECKING:
    import numpy as np

FORMAT = 1
ALL = "all"
"""The group of all tasks."""

_AGAINST = ("base", "sft")


@dataclass(frozen=True)
class Answered:
    """What the students of one row said.

    Attributes:
        row: the row.
        correct: by seed, whether each question's answer is right, by sample id.
    """

    row: Row
    correct: Mapping[int, Mapping[str, bool]]


def read_correct(predictions: Path) -> dict[str, bool]:
    """By sample id, whether the student's answer is right; questions without a known answer are left out.

    Raises:
        KdpipeError: the file cannot be read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(predictions, columns=["id", "source", "correct"]).to_pylist()
    except (OSError, ValueError, LookupError, pa.ArrowException) as error:
        raise KdpipeError(
            f"{predictions}: cannot be read ({error}). Remove this file and run `kdpipe rows` again: it "
            "is made anew from the answers."
        ) from None
    return {row["id"]: row["correct"] for row in table if row["source"] == "student" and row["correct"] is not None}


def results(
    answered: Sequence[Answered], samples: Sequence[Sample], groups: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """What stands in `rows/results.json`.

    Args:
        answered: the rows, in order.
        samples: of the evaluated split.
        groups: tasks by the name of their group; the group of all tasks is added.

    Returns:
        `format` and `rows`: for each `name`, `title`, `seeds`, `n` (questions; one that a student did not answer counts
        as wrong), `groups` and `tasks` with `accuracy`, its 95 % `interval` over questions and seeds and `n`; `by_seed`
        with the accuracy in each group; and `against`, for `base` and `sft`, the `difference` in each group on the same
        questions and seeds, with its interval.
    """
    seen = {name for one in answered for correct in one.correct.values() for name in correct}
    tasks: dict[str, list[str]] = {}
    for sample in samples:
        if sample.id in seen:
            tasks.setdefault(sample.task or ALL, []).append(sample.id)
    parts = {name: [sample for task in of for sample in tasks.get(task, ())] for name, of in groups.items()}
    parts[ALL] = [sample for of in tasks.values() for sample in of]
    parts = {name: ids for name, ids in parts.items() if ids}
    others = {one.row.name: one for one in answered if one.row.name in _AGAINST}
    return {"format": FORMAT, "rows": [_entry(one, parts, tasks, others) for one in answered]}


def _entry(
    one: Answered, parts: Mapping[str, list[str]], tasks: Mapping[str, list[str]], others: Mapping[str, Answered]
) -> dict[str, Any]:
    seeds = sorted(one.correct)
    return {
        "name": one.row.name,
        "title": one.row.title,
        "seeds": seeds if one.row.trains else [],
        "n": len(parts.get(ALL, ())),
        "groups": {name: _accuracy(one, ids) for name, ids in parts.items()},
        "tasks": {name: _accuracy(one, ids) for name, ids in sorted(tasks.items())},
        "by_seed": {
            str(seed): {name: float(_values(one, [seed], ids).mean()) for name, ids in parts.items()} for seed in seeds
        },
        "against": {
            name: {group: _difference(one, other, ids) for group, ids in parts.items()}
            for name, other in others.items()
            if other is not one
        },
    }


def _values(one: Answered, seeds: Sequence[int], ids: Sequence[str]) -> np.ndarray:
    """1 where an answer is right, else 0, `[S, N]`."""
    import numpy as np

    return np.array([[one.correct[seed].get(name, False) for name in ids] for seed in seeds], float)


def _accuracy(one: Answered, ids: Sequence[str]) -> dict[str, Any]:
    from kdpipe.stages.evaluate.statistics import mean_interval

    estimate = mean_interval(_values(one, sorted(one.correct), ids))
    assert estimate is not None
    return estimate.as_json("accuracy")


def _difference(one: Answered, other: Answered, ids: Sequence[str]) -> dict[str, Any]:
    """One minus other on the same questions; seed beside seed where both have several, of those that both have."""
    from kdpipe.stages.evaluate.statistics import mean_interval

    if one.row.trains and other.row.trains:
        seeds = sorted(one.correct.keys() & other.correct.keys())
        if not seeds:
            return {"difference": None, "interval": None, "n": 0}
        values = _values(one, seeds, ids) - _values(other, seeds, ids)
    else:
        values = _values(one, sorted(one.correct), ids) - _values(other, sorted(other.correct), ids)
    estimate = mean_interval(values, lowest=-1.0)
    assert estimate is not None
    return estimate.as_json("difference")


def table(found: Mapping[str, Any]) -> list[str]:
    """The results as lines for a terminal: a row a row, accuracy in percent with intervals, and what it is over SFT."""
    rows = found["rows"]
    groups = list(rows[0]["groups"]) if rows else []
    if len(groups) == 2:  # the one group and all of it
        groups = groups[:1] if rows[0]["groups"][groups[0]]["n"] == rows[0]["n"] else groups
    width = max(len(row["title"]) for row in rows)
    cell = 19
    lines = [f"{'row':<{width}}  seeds" + "".join(f"  {printable(group)[:cell]:>{cell}}" for group in groups)]
    lines[0] += "".join(f"  {'over SFT: ' + printable(group):>21}" for group in groups)
    for row in rows:
        line = f"{row['title']:<{width}}  {len(row['seeds']) or '-':>5}"
        for group in groups:
            line += f"  {_share(row['groups'].get(group)):>{cell}}"
        for group in groups:
            line += f"  {_gain(row['against'].get('sft', {}).get(group)):>21}"
        lines.append(line)
    number = {group: rows[0]["groups"][group]["n"] for group in groups}
    asked = ", ".join(f"{count} {printable(group)}" for group, count in number.items())
    lines.append(f"Percent of questions ({asked}), with 95 % intervals over questions and seeds.")
    return lines


def markdown(found: Mapping[str, Any]) -> str:
    """The results in the paper's form, as Markdown: by group and task, then differences from base and SFT by group."""
    rows = found["rows"]
    groups, tasks = (list(rows[0][kind]) for kind in ("groups", "tasks"))
    lines = _head(["row", "seeds", *groups, *tasks])
    for row in rows:
        cells = [
            _share(row[kind].get(name)) for kind, names in (("groups", groups), ("tasks", tasks)) for name in names
        ]
        lines.append(_line([row["title"], str(len(row["seeds"]) or "-"), *cells]))
    for other, name in (("base", "the untouched student"), ("sft", "SFT only")):
        if any(other in row["against"] for row in rows):
            lines += ["", f"Difference from {name}, in percentage points:", "", *_head(["row", *groups])]
            against = [(row["title"], row["against"][other]) for row in rows if other in row["against"]]
            lines += [_line([title, *(_gain(one.get(group)) for group in groups)]) for title, one in against]
    return "\n".join([*lines, "", "Percent of questions, with 95 % intervals over questions and seeds."]) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(printable(cell).replace("|", "\\|") for cell in cells) + " |"


def _share(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _gain(found: Mapping[str, Any] | None) -> str:
    if found is None or found["difference"] is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
