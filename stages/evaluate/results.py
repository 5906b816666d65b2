"""The result files of evaluate, made from the answers in its ledger: predictions, scores, what was forgotten, and the
benchmarks' own prediction files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import StoreError
from kdpipe.data.files import remove, write_atomically, write_json
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.manifest import Sample
from kdpipe.stages.base import Context
from kdpipe.stages.evaluate.scores import COLUMNS, by_columns, forgotten, judge, pairs, report, score
from kdpipe.stages.evaluate.stage import BASE, STAGE, STUDENT
from kdpipe.stages.textualize.parts import read_records, remedy

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2
"""Of `scores.json`."""

_OF_MANIFEST = ("benchmark", "item", *COLUMNS)


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
    """Whether the result files are there and were made from what the ledger and the manifest hold now."""
    folder = ctx.folder(STAGE.name)
    try:
        scores = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(scores, dict) or scores.get("files") != _sizes(folder):
        return False
    return scores.get("made_from") == _made_from(ctx, ctx.ledger(STAGE.name))


def _sizes(folder: Path) -> dict[str, int] | None:
    """Bytes of the files beside `scores.json`; None where one is missing."""
    try:
        return {name: (folder / name).stat().st_size for name in ("predictions.parquet", "forgotten.jsonl")}
    except OSError:
        return None


def _made_from(ctx: Context, ledger: Ledger) -> str:
    """Digest of everything that decides the result files."""
    samples = [
        (sample.id, sample.task, [str(sample.extra.get(name)) for name in _OF_MANIFEST] if sample.extra else None)
        for sample in ctx.samples(ctx.config.data.eval_split)
    ]
    rejects = sorted((reject.id, reject.source, reject.key) for reject in ledger.rejects())
    return digest([FORMAT, ledger.digest, rejects, samples, ctx.config.data.eval_split, ctx.config.evaluate.base])


def assemble(ctx: Context) -> dict[str, Any]:
    """Writes the result files from what the ledger holds, and prints the scores by task.

    Answers are judged anew, by the manifest as it is now. `predictions.parquet` has them all; `forgotten.jsonl` those
    that base had right and the student has wrong; `official/BENCHMARK/MODEL/` a benchmark's own file.

    Returns:
        What stands in `scores.json`: `format`, `split`, `samples`, `made_from` (a digest of what decided it), `files`
        (bytes of those beside it), for each model what `kdpipe.stages.evaluate.scores.score` gives, `paired` (see
        `pairs` there), `by` (see `by_columns`) and `benchmarks`: by benchmark and model its `measure` with the
        `official` and the `strict` denominator.

    Raises:
        StoreError: a part is missing or damaged.
    """
    import pyarrow.parquet as pq

    ledger = ctx.ledger(STAGE.name)
    samples = {sample.id: sample for sample in ctx.samples(ctx.config.data.eval_split)}
    sources = (BASE, STUDENT) if ctx.config.evaluate.base else (STUDENT,)
    records = _records(ledger, samples, sources)
    tmp = ctx.tmp(STAGE.name)
    scores: dict[str, Any] = {
        "format": FORMAT,
        "split": ctx.config.data.eval_split,
        "samples": len(samples),
        "made_from": _made_from(ctx, ledger),
    }
    for source in sources:
        rejected = sum(1 for reject in ledger.rejects() if reject.source == source and reject.id in samples)
        scores[source] = score(records[source], rejected)
    if (compared := pairs(records)) is not None:
        scores["paired"] = compared
    if by := by_columns(samples, records):
        scores["by"] = by
    if benchmarks := _benchmarks(ledger.folder / "official", samples.values(), records, tmp):
        scores["benchmarks"] = benchmarks
    table = to_table([record for source in sources for record in records[source]])
    write_atomically(
        ledger.folder / "predictions.parquet",
        lambda path: pq.write_table(table, path, write_page_checksum=True),
        tmp,
    )
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in forgotten(samples, records))
    write_atomically(
        ledger.folder / "forgotten.jsonl",
        lambda path: path.write_text(lines, encoding="utf-8", errors="backslashreplace"),
        tmp,
    )
    scores["files"] = _sizes(ledger.folder)
    write_json(ledger.folder / "scores.json", scores, tmp)
    for line in report(scores):
        ctx.say(line)
    ctx.say(f"Wrote scores.json, predictions.parquet and forgotten.jsonl in {ledger.folder}")
    return scores


def _records(ledger: Ledger, samples: Mapping[str, Sample], sources: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The answers to the samples by model, in the order of the samples, judged by the manifest as it is now."""
    records: dict[str, list[dict[str, Any]]] = {source: [] for source in sources}
    for row, record in read_records(ledger, samples.keys()):
        if not _is_answer(record):  # no checksum covers the schema of a Parquet file
            path = ledger.parts / row.part
            raise StoreError(f"{path}: row {row.row} is no answer to sample {row.id!r}. {remedy(path)}")
        if record["source"] in records:
            sample = samples[record["id"]]
            now = {"task": sample.task, "answer": sample.answer, "correct": judge(sample, record["prediction"])}
            records[record["source"]].append(record | now)
    places = {name: place for place, name in enumerate(samples)}
    for answers in records.values():
        answers.sort(key=lambda record: places[record["id"]])
    return records


def _is_answer(record: Mapping[str, Any]) -> bool:
    texts = record.get("source"), record.get("prediction"), record.get("task", 0) or ""
    return all(isinstance(text, str) for text in texts) and record.get("correct", 0) in (None, True, False)


def _benchmarks(
    folder: Path, samples: Iterable[Sample], records: Mapping[str, Sequence[Mapping[str, Any]]], tmp: Path
) -> dict[str, Any]:
    """Scores each benchmark of the manifest by its own rules and writes its own prediction files into `folder`."""
    of_benchmark: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.extra and (name := sample.extra.get("benchmark")) is not None:
            of_benchmark.setdefault(str(name), []).append(sample)
    from kdpipe.stages.evaluate.benchmarks import BENCHMARKS, item_of

    for earlier in folder.glob("*"):
        if earlier.name in BENCHMARKS and earlier.name not in of_benchmark:
            remove(earlier)
    if not of_benchmark:
        return {}
    found: dict[str, Any] = {}
    for name, its in of_benchmark.items():
        if (benchmark := BENCHMARKS.get(name)) is None:
            continue
        for source, answers in records.items():
            said = {record["id"]: record["prediction"] for record in answers}
            asked = [(item_of(one.extra.get("item"), one.id), said.get(one.id)) for one in its]
            found.setdefault(name, {})[source] = benchmark.score(asked)
            file, content = benchmark.official(asked)
            target = folder / name / source / file
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, lambda path, content=content: path.write_bytes(content), tmp)
    return found
