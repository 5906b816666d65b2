"""Scores from answers: accuracy with intervals, by task and by what else the manifest tells of a question, base
beside student, and what was gained and forgotten."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdpipe.data.answers import matches
from kdpipe.data.manifest import Sample
from kdpipe.stages.evaluate.stage import BASE, STUDENT

NO_TASK = "all"
"""Task under which samples are counted whose manifest row names none."""

COLUMNS = ("category", "sub_category", "difficulty")
"""Columns of the manifest by which answers are counted too, where it has them."""

Record = Mapping[str, Any]


def judge(sample: Sample, prediction: str) -> bool | None:
    """Whether a prediction is right: by the rule of the sample's `benchmark`, or of `kdpipe.data.answers.matches`.

    Returns:
        None where the manifest has no answer.
    """
    if sample.answer is None:
        return None
    if sample.extra and (name := sample.extra.get("benchmark")) is not None:
        from kdpipe.stages.evaluate.benchmarks import BENCHMARKS, item_of

        if str(name) in BENCHMARKS:
            item = item_of(sample.extra.get("item"), sample.id)
            return BENCHMARKS[str(name)].is_correct(sample.answer, prediction, list(sample.choices), item)
    return matches(sample.answer, prediction, sample.choices)


def score(records: Sequence[Record], rejected: int) -> dict[str, Any]:
    """One model's scores.

    Args:
        records: its answers, each with `task`, `prediction` and `correct`.
        rejected: samples without an answer.

    Returns:
        Of the scored answers `accuracy` (a share; None without any), its 95 % `interval`, `n`, `correct` and
        `unanswered` (empty predictions, counted as wrong); `unscored` (no answer in the manifest), `rejected` (not in
        `n`), and `by_task` with the first five for each task.
    """
    by_task: dict[str, list[Record]] = defaultdict(list)
    scored = [record for record in records if record["correct"] is not None]
    for record in scored:
        by_task[record["task"] or NO_TASK].append(record)
    return {
        **count(scored),
        "unscored": len(records) - len(scored),
        "rejected": rejected,
        "by_task": {task: count(of_task) for task, of_task in sorted(by_task.items())},
    }


def count(scored: Sequence[Record]) -> dict[str, Any]:
    """Accuracy and counts of answers that are scored; see `score`."""
    import numpy as np

    from kdpipe.stages.evaluate.statistics import mean_interval

    estimate = mean_interval(np.array([record["correct"] for record in scored], float))
    found = {"accuracy": None, "interval": None, "n": 0} if estimate is None else estimate.as_json("accuracy")
    return {
        **found,
        "correct": sum(record["correct"] for record in scored),
        "unanswered": sum(not record["prediction"] for record in scored),
    }


def pairs(records: Mapping[str, Sequence[Record]]) -> dict[str, Any] | None:
    """Student beside base on the questions that both answered: `all` and `by_task`.

    Args:
        records: the answers of each model.

    Returns:
        As `kdpipe.stages.evaluate.statistics.paired`; None where there is nothing to compare.
    """
    from kdpipe.stages.evaluate.statistics import paired

    found = {source: {r["id"]: r for r in records.get(source, ()) if r["correct"] is not None} for source in _BOTH}

    def compared(names: Iterable[str]) -> dict[str, Any] | None:
        names = list(names)
        one, other = ({n: found[source][n]["correct"] for n in names if n in found[source]} for source in _BOTH)
        return paired(one, other)

    by_task: dict[str, list[str]] = defaultdict(list)
    for name, record in found[BASE].items():
        by_task[record["task"] or NO_TASK].append(name)
    if (everything := compared(found[BASE])) is None:
        return None
    of_tasks = {task: compared(names) for task, names in sorted(by_task.items())}
    return {"all": everything, "by_task": {task: one for task, one in of_tasks.items() if one is not None}}


_BOTH = (BASE, STUDENT)


def by_columns(samples: Mapping[str, Sample], records: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    """Accuracy by the values of `COLUMNS`: column, value, model. A row with a list counts under each of its values."""
    parted: dict[str, dict[str, dict[str, list[Record]]]] = {}
    for source, answers in records.items():
        for record in answers:
            extra = samples[record["id"]].extra
            if record["correct"] is None or not extra:
                continue
            for column in COLUMNS:
                value = extra.get(column)
                values = value if isinstance(value, list) else [value]
                for one in dict.fromkeys(str(one) for one in values if one not in (None, "")):
                    by_value = parted.setdefault(column, {})
                    by_value.setdefault(one, {}).setdefault(source, []).append(record)
    return {
        column: {
            value: {source: count(answers) for source, answers in by_source.items()}
            for value, by_source in sorted(by_value.items())
        }
        for column, by_value in sorted(parted.items())
    }


def forgotten(samples: Mapping[str, Sample], records: Mapping[str, Sequence[Record]]) -> list[dict[str, Any]]:
    """Questions that base had right and the student has wrong, with both answers, in the manifest's order."""
    base = {record["id"]: record for record in records.get(BASE, ()) if record["correct"]}
    lost = [r for r in records.get(STUDENT, ()) if r["correct"] is False and r["id"] in base]
    return [
        {
            "id": record["id"],
            "task": record["task"],
            "question": samples[record["id"]].question,
            "choices": list(samples[record["id"]].choices),
            "answer": record["answer"],
            "base": base[record["id"]]["prediction"],
            "student": record["prediction"],
        }
        for record in lost
    ]


def report(scores: Mapping[str, Any]) -> list[str]:
    """The scores as lines of a table: a row a task, base beside student with 95 % intervals, and what differs."""
    sources = [source for source in _BOTH if source in scores]
    tasks = sorted({task for source in sources for task in scores[source]["by_task"]})
    paired = scores.get("paired") or {}
    of_tasks = paired.get("by_task", {})
    rows = [
        (_shown(task), [scores[source]["by_task"].get(task, {}) for source in sources], of_tasks.get(task))
        for task in tasks
    ]
    if tasks != [NO_TASK]:
        rows.append((NO_TASK, [scores[source] for source in sources], paired.get("all")))
    width = max(len("task"), *(len(task) for task, _, _ in rows))
    heads = [f"{source + ' %':>19}" for source in sources] + ([f"{'student - base':>24} {'p':>6}"] if paired else [])
    lines = [f"{'task':<{width}}  {'n':>6}  " + "  ".join(heads)]
    for task, cells, pair in rows:
        number = max(cell.get("n", 0) for cell in cells)
        shown = [_percent(cell) for cell in cells] + ([_difference(pair)] if pair else [])
        lines.append(f"{task:<{width}}  {number:>6}  " + "  ".join(shown))
    if pair := paired.get("all"):
        lines.append(f"{pair['gained']} gained, {pair['forgotten']} forgotten")
    for name, by_source in scores.get("benchmarks", {}).items():
        for source, found in by_source.items():
            parts = [f"{kind} {_score(found[kind])}" for kind in ("official", "strict")]
            lines.append(f"{name}, {source}: {found['measure'].replace('_', ' ')}: {', '.join(parts)}")
    for source in sources:
        notes = [
            f"{scores[source][name]} {name}" for name in ("unanswered", "unscored", "rejected") if scores[source][name]
        ]
        if notes:
            lines.append(f"{source}: {', '.join(notes)}")
    return lines


def _shown(task: str) -> str:
    """A task's name that cannot disturb a terminal."""
    return task if task.isprintable() else ascii(task)


def _percent(cell: Mapping[str, Any]) -> str:
    if cell.get("accuracy") is None:
        return f"{'-':>19}"
    low, high = cell["interval"]
    return f"{100 * cell['accuracy']:>5.1f} [{100 * low:>4.1f}, {100 * high:>5.1f}]"


def _difference(pair: Mapping[str, Any]) -> str:
    low, high = pair["interval"]
    p = "<0.001" if pair["p_value"] < 0.001 else f"{pair['p_value']:.3f}"
    return f"{100 * pair['difference']:>+6.1f} [{100 * low:>+6.1f}, {100 * high:>+6.1f}] {p:>6}"


def _score(found: Mapping[str, Any]) -> str:
    return f"{'-' if found['score'] is None else format(100 * found['score'], '.2f') + ' %'} of {found['n']}"
