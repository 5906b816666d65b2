"""The Parquet table of traces: one row a sample, and how other stages read it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.stages.base import Context
from kdpipe.stages.textualize.parts import read_records, remedy

if TYPE_CHECKING:
    import pyarrow as pa

SOURCE = "trace"
"""The one source of this stage's rows."""


@dataclass(frozen=True, slots=True)
class TraceRow:
    """What textualize knows of one sample.

    Attributes:
        id: sample id.
        key: the key it was made under.
        description: the clip in words.
        trace: reasoning and response in canonical form (`TraceSchema.render`): what the student learns to write.
        sections: the trace's sections by name.
        response: its response.
        answer_match: whether the response matches the manifest's answer; None when there is none.
        audio_samples: length of each clip in samples at `audio_rate`.
        audio_rate: sample rate of the describer (Hz).
    """

    id: str
    key: str
    description: str
    trace: str
    sections: Mapping[str, str]
    response: str
    answer_match: bool | None
    audio_samples: tuple[int, ...]
    audio_rate: int

    @property
    def audio_seconds(self) -> float:
        """Length of all clips together (seconds)."""
        return sum(self.audio_samples) / self.audio_rate


def section_column(name: str) -> str:
    """`PLANNING` to `section_planning`."""
    return f"section_{name.lower()}"


def schema(sections: Sequence[str]) -> pa.Schema:
    """The columns of a part.

    `describe_*` are null where the manifest brought the description; `trace_*`, `candidate`, and `finish_reason`
    where it brought the trace. Token counts are those of the one call; `trace_completion_tokens` is that of the kept
    candidate. `sampling` holds both calls' settings as JSON.
    """
    import pyarrow as pa

    text, count = pa.string(), pa.int64()
    columns = {
        "id": text,
        "key": text,
        "description": text,
        "trace": text,
        **{section_column(name): text for name in sections},
        "response": text,
        "answer_match": pa.bool_(),
        "finish_reason": text,
        "candidate": count,
        "describe_prompt_tokens": count,
        "describe_completion_tokens": count,
        "describe_finish_reason": text,
        "trace_prompt_tokens": count,
        "trace_completion_tokens": count,
        "audio_seconds": pa.float64(),
        "audio_samples": pa.list_(count),
        "audio_rate": count,
        "describe_model": text,
        "trace_model": text,
        "sampling": text,
    }
    return pa.schema(list(columns.items()))


def to_table(records: Sequence[Mapping[str, Any]], sections: Sequence[str]) -> pa.Table:
    """A part's table from one mapping a sample; columns that a record lacks are null."""
    import pyarrow as pa

    return pa.Table.from_pylist([dict(record) for record in records], schema=schema(sections))


def read_traces(source: Context | Ledger, samples: Collection[str] | None = None) -> dict[str, TraceRow]:
    """Traces that the ledger of textualize holds, by sample id.

    Args:
        source: the context of a run, or the ledger itself.
        samples: ids of those that are wanted; None: all.

    Raises:
        StoreError: a part is missing or damaged; names it.
    """
    ledger = source.ledger("textualize") if isinstance(source, Context) else source
    return {row.id: _trace_row(record) for row, record in _records(ledger, samples)}


def read_descriptions(ledger: Ledger, samples: Collection[str]) -> dict[str, str]:
    """Descriptions alone, by sample id; otherwise like `read_traces`."""
    return {row.id: record["description"] for row, record in _records(ledger, samples)}


def _records(ledger: Ledger, samples: Collection[str] | None) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The records of a ledger, their types proven: no checksum covers the schema of a Parquet file.

    Raises:
        StoreError: a part is missing or damaged, or its columns are others; names it.
    """
    for row, record in read_records(ledger, samples):
        texts = [record.get(name) for name in ("description", "trace")]
        texts.append(record.get("response") or "")
        texts += [text or "" for name, text in record.items() if name.startswith(section_column(""))]
        lengths, rate = record.get("audio_samples"), record.get("audio_rate")
        if not (
            all(isinstance(text, str) for text in texts)
            and isinstance(lengths, list)
            and all(type(length) is int and length >= 0 for length in lengths)
            and type(rate) is int
            and rate > 0
            and record.get("answer_match", "") in (None, True, False)
        ):
            path = ledger.parts / row.part
            raise StoreError(f"{path}: row {row.row} is no trace of sample {row.id!r}. {remedy(path)}")
        yield row, record


def _trace_row(record: Mapping[str, Any]) -> TraceRow:
    prefix = section_column("")
    return TraceRow(
        id=record["id"],
        key=record["key"],
        description=record["description"],
        trace=record["trace"],
        sections={name.removeprefix(prefix).upper(): text for name, text in record.items() if name.startswith(prefix)},
        response=record["response"],
        answer_match=record["answer_match"],
        audio_samples=tuple(record["audio_samples"]),
        audio_rate=record["audio_rate"],
    )
