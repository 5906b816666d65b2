"""What a run has left on disk, file by file, so that one that is damaged does not hide the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger import Ledger
from kdpipe.data.manifest import Sample
from kdpipe.pipeline.report.values import text
from kdpipe.stages.base import Context

STAGE_NAMES = ("textualize", "cache-teachers", "train", "evaluate")
ROWS = Path("rows", "results.json")
"""Where `kdpipe rows` leaves its results in a run folder."""

_MOST_BYTES = 1 << 30  # of a file of text: more would be none of ours


class NotThere(KdpipeError):
    """Something is not there, which is no damage: the stage that makes it has not run."""


@dataclass(frozen=True)
class Prediction:
    """What a model answered to one sample.

    Attributes:
        id, source, task, answer: of the sample, and which model.
        prediction: the answer that was scored.
        output: all that the model wrote.
        correct: None where the manifest has no answer.
        finish_reason, tokens: of the output.
    """

    id: str
    source: str
    task: str
    answer: str | None
    prediction: str
    output: str
    correct: bool | None
    finish_reason: str
    tokens: int


def read_json(path: Path, made_by: str) -> Mapping[str, Any]:
    """A file that holds one JSON object.

    Raises:
        NotThere: it is not there.
        KdpipeError: it cannot be read, or holds something else.
    """
    content = _text_of(path, made_by)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise KdpipeError(f"{path}: is no JSON ({error}). {_remedy(path, made_by)}") from None
    if not isinstance(found, dict):
        raise KdpipeError(f"{path}: holds no JSON object. {_remedy(path, made_by)}")
    return found


def _text_of(path: Path, made_by: str) -> str:
    try:
        if not path.is_file():
            raise NotThere(f"{path.name} is not there; {made_by} writes it.")
        if path.stat().st_size > _MOST_BYTES:
            raise KdpipeError(f"{path}: is larger than 1 GiB, which no file of this kind is. {_remedy(path, made_by)}")
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise KdpipeError(f"{path}: cannot be read ({error.strerror}). {_remedy(path, made_by)}") from None


def _remedy(path: Path, made_by: str) -> str:
    return f"Remove it and run {made_by} again, or restore it from a copy."


def read_scores(ctx: Context) -> Mapping[str, Any]:
    """evaluate/scores.json.

    Raises:
        KdpipeError: as `read_json`.
    """
    return read_json(ctx.folder("evaluate") / "scores.json", "`kdpipe evaluate`")


def read_forgotten(ctx: Context) -> list[Mapping[str, Any]]:
    """evaluate/forgotten.jsonl: samples that the base answered rightly and the student does not.

    Raises:
        NotThere: it is not there.
        KdpipeError: it cannot be read.
    """
    path = ctx.folder("evaluate") / "forgotten.jsonl"
    found = []
    for place, line in enumerate(_text_of(path, "`kdpipe evaluate`").split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise KdpipeError(f"{path}:{place}: is no JSON object. {_remedy(path, '`kdpipe evaluate`')}")
            found.append(value)
    return found


def read_predictions(ctx: Context) -> list[Prediction]:
    """evaluate/predictions.parquet, in its order.

    Raises:
        NotThere: it is not there.
        KdpipeError: it cannot be read, or its columns are others.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = ctx.folder("evaluate") / "predictions.parquet"
    if not path.is_file():
        raise NotThere(f"{path.name} is not there; `kdpipe evaluate` writes it.")
    remedy = _remedy(path, "`kdpipe evaluate`")
    try:
        records = pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (OSError, ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        raise KdpipeError(f"{path}: cannot be read ({error}). {remedy}") from None
    return [_prediction(record, place, path, remedy) for place, record in enumerate(records, 1)]


def _prediction(record: Mapping[str, Any], place: int, path: Path, remedy: str) -> Prediction:
    texts = [record.get(name) for name in ("id", "source", "prediction", "output")]
    correct, tokens, answer = record.get("correct"), record.get("tokens"), record.get("answer")
    if not all(isinstance(one, str) for one in texts) or correct not in (None, True, False):
        raise KdpipeError(f"{path}: row {place} is no answer. {remedy}")
    return Prediction(
        id=record["id"],
        source=record["source"],
        task=text(record.get("task")),
        answer=answer if isinstance(answer, str) else None,
        prediction=record["prediction"],
        output=record["output"],
        correct=correct,
        finish_reason=text(record.get("finish_reason")),
        tokens=tokens if isinstance(tokens, int) else 0,
    )


def read_metrics_lines(ctx: Context) -> list[dict[str, Any]]:
    """The lines of train/metrics.jsonl.

    Raises:
        NotThere: it is not there.
        KdpipeError: it cannot be read, or its first line is none.
    """
    from kdpipe.stages.train.metrics import read_metrics

    path = ctx.folder("train") / "metrics.jsonl"
    if not path.is_file():
        raise NotThere(f"{path.name} is not there; `kdpipe train` writes it.")
    try:
        lines = read_metrics(path)
    except OSError as error:
        raise KdpipeError(f"{path}: cannot be read ({error.strerror}).") from None
    if not lines:
        what = "holds nothing" if path.stat().st_size == 0 else "its first line is no line of metrics"
        raise KdpipeError(f"{path}: {what}. {_remedy(path, '`kdpipe train`')}")
    return lines


def unread_metrics(ctx: Context, lines: Sequence[Mapping[str, Any]]) -> str:
    """What is to be said where the file goes on after the lines that could be read, or ends within one."""
    path = ctx.folder("train") / "metrics.jsonl"
    with path.open("rb") as file:
        written = sum(1 for line in file if line.strip())
    if written <= len(lines):
        return ""
    return f"{path}: line {len(lines) + 1} is no line of metrics; what was written from there on is not shown."


def read_ledger(ctx: Context, stage: str) -> Ledger:
    """What a stage has written down.

    Raises:
        NotThere: the stage has not run.
        StoreError: what it wrote down is damaged.
    """
    folder = ctx.folder(stage)
    if not (folder / "HEAD").exists() and not (folder / "rejects.parquet").exists():
        raise NotThere(f"{stage} has not run; `kdpipe {stage}` runs it.")
    return ctx.ledger(stage)


def samples_by_id(ctx: Context) -> tuple[Mapping[str, Sample], str]:
    """Samples of the manifest by id, and what is wrong where it cannot be read."""
    try:
        return ctx.manifest.by_id, ""
    except KdpipeError as error:
        return {}, str(error)
    except OSError as error:
        return {}, f"{ctx.base / ctx.config.data.manifest}: cannot be read ({error.strerror})."


def made_files(ctx: Context, rows: Path | None) -> Sequence[Path]:
    """The files of results that there are: what a page can be made from."""
    named = [ctx.folder(stage) / file for stage in STAGE_NAMES for file in ("HEAD", "rejects.parquet")]
    named += [ctx.folder("train") / "metrics.jsonl"]
    named += [ctx.folder("evaluate") / file for file in ("scores.json", "predictions.parquet", "forgotten.jsonl")]
    named += [rows] if rows is not None else []
    return [path for path in named if path.is_file()]
