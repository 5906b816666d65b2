"""From stored answers to `predictions.parquet` and `scores.json`: accuracy by task, base beside student."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import StoreError
from kdpipe.data.files import write_atomically, write_json
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.stages.base import Context
from kdpipe.stages.evaluate.stage import BASE, STAGE, STUDENT
from kdpipe.stages.textualize.parts import read_records, remedy

if TYPE_CHECKING:
    import pyarrow as pa

NO_TASK = "all"
"""Task under which samples are counted whose manifest row names none."""


def schema() -> pa.Schema:
    """The columns of a part and of `predictions.parquet`; `correct` is null where the manifest has no answer."""
    import pyarrow as pa

    text = pa.string()
    columns = {
        "id": text,
        "source": text,
        "key": text,
        "task": text,
        "answer": text,
        "prediction": text,
        "output": text,
        "correct": pa.bool_(),
        "finish_reason": text,
        "tokens": pa.int64(),
    }
    return pa.schema(list(columns.items()))


def to_table(records: Sequence[Mapping[str, Any]]) -> pa.Table:
    """A table from one mapping an answer."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(record) for record in records], schema=schema())


def assembled(ctx: Context) -> bool:
    """Whether both result files are there and were made from what the ledger and the manifest hold now."""
    folder = ctx.folder(STAGE.name)
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    made_from = scores.get("made_from") if isinstance(scores, dict) else None
    return (folder / "predictions.parquet").exists() and made_from == _made_from(ctx, ctx.ledger(STAGE.name))


def _made_from(ctx: Context, ledger: Ledger) -> str:
    """Digest of everything that decides the result files."""
    samples = [(sample.id, sample.task) for sample in ctx.samples(ctx.config.data.eval_split)]
    rejects = sorted((reject.id, reject.source, reject.key) for reject in ledger.rejects())
    return digest([ledger.digest, rejects, samples, ctx.config.data.eval_split, ctx.config.evaluate.base])


def assemble(ctx: Context) -> dict[str, Any]:
    """Writes `predictions.parquet` and `scores.json` from what the ledger holds, and prints the scores by task.

    Returns:
        What stands in `scores.json`: `split`, `samples`, `made_from` (a digest of what decided it), and
        for each model `accuracy` (share of the scored answers,
        None without any), `n` (answers scored), `correct`, `unanswered` (empty predictions, counted as wrong),
        `unscored` (no answer in the manifest), `rejected` (samples without a prediction, which are not in `n`), and
        `by_task` with the first four for each task.

    Raises:
        StoreError: a part is missing or damaged.
    """
    import pyarrow.parquet as pq

    ledger = ctx.ledger(STAGE.name)
    samples = ctx.samples(ctx.config.data.eval_split)
    places = {sample.id: place for place, sample in enumerate(samples)}
    sources = (BASE, STUDENT) if ctx.config.evaluate.base else (STUDENT,)
    records = []
    for row, record in read_records(ledger):
        if not _is_answer(record):  # no checksum covers the schema of a Parquet file
            path = ledger.parts / row.part
            raise StoreError(f"{path}: row {row.row} is no answer to sample {row.id!r}. {remedy(path)}")
        if record["id"] in places and record["source"] in sources:
            records.append(record)
    records.sort(key=lambda record: (sources.index(record["source"]), places[record["id"]]))
    tmp = ctx.tmp(STAGE.name)
    scores: dict[str, Any] = {
        "split": ctx.config.data.eval_split,
        "samples": len(samples),
        "made_from": _made_from(ctx, ledger),
    }
    for source in sources:
        rejected = sum(1 for reject in ledger.rejects() if reject.source == source and reject.id in places)
        scores[source] = score([record for record in records if record["source"] == source], rejected)
    table = to_table(records)
    write_atomically(
        ledger.folder / "predictions.parquet",
        lambda path: pq.write_table(table, path, write_page_checksum=True),
        tmp,
    )
    write_json(ledger.folder / "scores.json", scores, tmp)
    for line in report(scores):
        ctx.say(line)
    return scores


def _is_answer(record: Mapping[str, Any]) -> bool:
    texts = record.get("source"), record.get("prediction"), record.get("task", 0) or ""
    return all(isinstance(text, str) for text in texts) and record.get("correct", 0) in (None, True, False)


def score(records: Sequence[Mapping[str, Any]], rejected: int) -> dict[str, Any]:
    """One model's scores from its records; see `assemble`."""
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    scored = [record for record in records if record["correct"] is not None]
    for record in scored:
        by_task[record["task"] or NO_TASK].append(record)
    return {
        **_count(scored),
        "unscored": len(records) - len(scored),
        "rejected": rejected,
        "by_task": {task: _count(of_task) for task, of_task in sorted(by_task.items())},
    }


def _count(scored: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    correct = sum(record["correct"] for record in scored)
    return {
        "accuracy": correct / len(scored) if scored else None,
        "n": len(scored),
        "correct": correct,
        "unanswered": sum(not record["prediction"] for record in scored),
    }


def report(scores: Mapping[str, Any]) -> list[str]:
    """The scores as lines of a table: a row a task, base beside student."""
    sources = [source for source in (BASE, STUDENT) if source in scores]
    tasks = sorted({task for source in sources for task in scores[source]["by_task"]})
    rows = [(_shown(task), [scores[source]["by_task"].get(task, {}) for source in sources]) for task in tasks]
    if tasks != [NO_TASK]:
        rows.append((NO_TASK, [scores[source] for source in sources]))
    width = max(len("task"), *(len(task) for task, _ in rows))
    lines = [f"{'task':<{width}}  {'n':>6}  " + "  ".join(f"{source:>8}" for source in sources)]
    for task, cells in rows:
        number = max(cell.get("n", 0) for cell in cells)
        lines.append(f"{task:<{width}}  {number:>6}  " + "  ".join(_percent(cell) for cell in cells))
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
    accuracy = cell.get("accuracy")
    return f"{'-':>8}" if accuracy is None else f"{100 * accuracy:>7.2f}%"
