"""Parquet parts: which samples are written together, their commit when the last of them is done, and reading them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import Rejected, StoreError
from kdpipe.data.files import build_aside
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.ledger_rows import Row
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.environment import environment
from kdpipe.stages.models.flight import ENGINE_DIED

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass
class _Part:
    wants: Sequence[Wanted]
    records: dict[tuple[str, str], tuple[Mapping[str, Any], int, str]] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)


class Parts:
    """Collects records and rejections of a run's samples and commits them, a fixed slice of `todo` at a time.

    Samples finish in any order; a part holds them in the order of `todo`, so that the same work gives the same parts.

    Args:
        ctx: the run.
        stage: name of the stage whose ledger takes the parts.
        todo: the wants of the run, in order.
        size: samples in a part.
        to_table: a part's table from its records.
    """

    def __init__(
        self,
        ctx: Context,
        stage: str,
        todo: Sequence[Wanted],
        *,
        size: int,
        to_table: Callable[[Sequence[Mapping[str, Any]]], pa.Table],
    ):
        self._ctx = ctx
        self._tmp = ctx.tmp(stage)
        self._made_with = environment(ctx, stage).text
        self._to_table = to_table
        self._part_of: dict[tuple[str, str], _Part] = {}
        for start in range(0, len(todo), size):
            part = _Part(todo[start : start + size])
            self._part_of |= {(want.id, want.source): part for want in part.wants}
        self.ledger = ctx.ledger(stage)

    def done(self, want: Wanted, record: Mapping[str, Any], *, tokens: int, content: str) -> None:
        """Takes a finished sample's record; see `kdpipe.data.ledger.Row` for `tokens` and `content`."""
        part = self._part_of[want.id, want.source]
        part.records[want.id, want.source] = (record, tokens, content)
        self._close(part)

    def reject(self, want: Wanted, rejected: Rejected) -> None:
        """Takes a rejection; one that was dear to find is committed at once, so that it is not looked for again."""
        part = self._part_of[want.id, want.source]
        reject = Reject(want.id, want.source, want.key, rejected.reason, rejected.detail)
        part.rejects.append(reject)
        if reject.reason == ENGINE_DIED:
            self._ctx.recheck([self._ctx.manifest.by_id[want.id]])
            self.ledger.commit(rejects=[reject])
        self._close(part)

    def _close(self, part: _Part) -> None:
        if len(part.records) + len(part.rejects) == len(part.wants):
            self._commit(part)
            part.records.clear()

    def _commit(self, part: _Part) -> None:
        import pyarrow.parquet as pq

        samples = self._ctx.manifest.by_id
        good = [want for want in part.wants if (want.id, want.source) in part.records]
        # With ids: two samples may well share a key, and their parts must not share a name.
        name = digest([(want.id, want.source, want.key) for want in good])[:16] + ".parquet"
        rows, records = [], []
        for place, want in enumerate(good):
            record, tokens, content = part.records[want.id, want.source]
            records.append(record)
            rows.append(
                Row(
                    want.id,
                    want.source,
                    want.key,
                    want.fields,
                    name,
                    place,
                    tokens,
                    content=content,
                    made_with=self._made_with,
                )
            )
        with build_aside(self._tmp, ".parquet") as path:
            built = {}
            if rows:
                pq.write_table(self._to_table(records), path, write_page_checksum=True)
                built[name] = path
            self._ctx.recheck(samples[want.id] for want in part.wants)
            self.ledger.commit(rows, rejects=part.rejects, built=built)


def read_records(ledger: Ledger, samples: Collection[str] | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Rows of a ledger whose parts are Parquet tables, each with its record; ordered by part and place.

    Args:
        ledger: of the stage.
        samples: ids of those that are wanted; None: all. Parts without any are not read.

    Raises:
        StoreError: a part is missing, damaged, or does not hold what the ledger says; names it.
    """
    name, records = None, []
    wanted = [row for row in ledger.rows() if samples is None or row.id in samples]
    for row in sorted(wanted, key=lambda row: (row.part, row.row)):
        path = ledger.parts / row.part
        if row.part != name:
            name, records = row.part, _read_part(path)
        found = records[row.row] if 0 <= row.row < len(records) else {}
        if (found.get("id"), found.get("key")) != (row.id, row.part_key):
            raise StoreError(f"{path}: row {row.row} is not sample {row.id!r} of the ledger. {remedy(path)}")
        yield row, found


def _read_part(path: Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, page_checksum_verification=True).to_pylist()
    except (OSError, ValueError, OverflowError, LookupError, pa.ArrowException) as error:
        raise StoreError(f"{path}: cannot be read ({error}). {remedy(path)}") from None


def remedy(path: Path) -> str:
    """What to do where a part is damaged."""
    return f"Remove {path.parents[1]} and run the stage again, or restore the file from a copy."
