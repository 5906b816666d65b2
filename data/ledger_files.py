"""The files of a ledger: rows and rejections as Parquet tables, and `HEAD`, which names the current one.

A manifest is named by the digest of its rows; `HEAD` holds that name and the digest of the file. `rejects.parquet` has
the digest of its rows in its metadata. Parquet's page checksums are written and verified besides.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.fields import Sharing
from kdpipe.data.files import write_atomically
from kdpipe.data.hashing import digest, digest_each, digest_file

if TYPE_CHECKING:
    import pyarrow as pa

_CHECKSUM = b"kdpipe.digest"
_WRITTEN_BY = b"kdpipe.written_by"
_BATCH_ROWS = 4096
_GROUP_ROWS = 8192  # of a manifest, written together; releases before this one wrote all rows in one group
_ROW_COLUMNS = ("id", "source", "key", "fields", "part", "row", "tokens", "length", "content", "cover")


@dataclass(frozen=True, slots=True)
class Row:
    """Where one source of one sample lies.

    Attributes:
        id: sample id.
        source: what of the sample this is: `trace`, `targets`, `textual`, `acoustic`, `student`, ...
        key: digest of everything that could change its bytes.
        fields: the named digests the key is made of, kept to be able to say why a sample is stale.
        cover: what is stored beyond the key, e.g. `{"k": 64}`; a request is served if it asks for no more.
        part: name of the part below `parts/`.
        row: its place within the part.
        tokens: response tokens (audio tokens for `acoustic`).
        length: tokens of the student's whole sequence, prompt and audio included; 0 where that means nothing.
        content: digest of what came out, for early cutoff downstream.
    """

    id: str
    source: str
    key: str
    fields: Mapping[str, str]
    part: str
    row: int = 0
    tokens: int = 0
    length: int = 0
    content: str = ""
    cover: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    """One sample that a stage could not process, under the key it was tried with."""

    id: str
    source: str
    key: str
    reason: str
    detail: str


def rows_digest(rows: Iterable[Row]) -> str:
    """Digest of rows in any order, one for each sample and source: the name of their manifest."""
    ordered = sorted(rows, key=attrgetter("id", "source"))
    return digest_each((r.id, r.source, r.key, r.part, r.row, r.tokens, r.length, r.cover, r.content) for r in ordered)


def rejects_digest(rejects: Iterable[Reject]) -> str:
    """Digest of rejections in any order."""
    return digest(_ordered(rejects))


def _ordered(rejects: Iterable[Reject]) -> list[Reject]:
    return sorted(rejects, key=lambda reject: (reject.id, reject.source))


def old_manifests(folder: Path, current: str | None) -> list[Path]:
    """Manifests of a stage folder other than the one named `current`."""
    return sorted(path for path in (folder / "manifests").glob("*.parquet") if path.stem != current)


def head_text(manifest: Path) -> str:
    """What `HEAD` holds where it points to a manifest."""
    return f"{manifest.stem} {digest_file(manifest)}\n"


def write_head(folder: Path, manifest: Path, tmp: Path) -> None:
    """Points `HEAD` of a stage folder to a manifest in it."""
    text = head_text(manifest)
    write_atomically(folder / "HEAD", lambda path: path.write_text(text), tmp)


def read_rows(manifest: Path) -> list[Row]:
    """The rows of a manifest file.

    Raises:
        ValueError: it cannot be read.
    """
    covers: dict[str, dict[str, Any]] = {}
    share = Sharing()
    rows = []
    try:
        # Batch by batch, and what stands in many rows kept once: a table is much larger as objects.
        for batch in _read_batches(manifest):
            for values in zip(*(batch.column(name).to_pylist() for name in _ROW_COLUMNS), strict=True):
                sample, source, key, text, part, place, tokens, length, content, cover = values
                if cover not in covers:
                    covers[cover] = json.loads(cover)
                where = sys.intern(source), key, share(json.loads(text)), sys.intern(part)
                rows.append(Row(sample, *where, place, tokens, length, content, covers[cover]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"not a manifest: {error!r}") from None
    return rows


def read_rejects(path: Path) -> list[Reject]:
    """The rows of `rejects.parquet`, proven by their digest.

    Raises:
        ValueError: it cannot be read, or its rows are not what was written.
    """
    table = _read_table(path)
    try:
        rejects = [Reject(**row) for row in table.to_pylist()]
        found = digest(rejects)
    except TypeError as error:
        raise ValueError(str(error)) from None
    if (table.schema.metadata or {}).get(_CHECKSUM) != found.encode():
        raise ValueError("its rows do not match their digest")
    return rejects


def write_rows(manifest: Path, rows: Iterable[Row], tmp: Path) -> None:
    """Writes a manifest of rows in any order.

    Raises:
        OSError: the disk is full or not writable; what was there before is then as it was.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    ordered = sorted(rows, key=attrgetter("source", "part", "row", "id"))

    def value(row: Row, name: str) -> str | int:
        found = getattr(row, name)
        return json.dumps(dict(found), sort_keys=True) if name in ("fields", "cover") else found

    kinds = {name: pa.int64() if name in ("row", "tokens", "length") else pa.string() for name in _ROW_COLUMNS}

    def write(path: Path) -> None:
        # Some rows at a time: a table is larger than the file, and larger still as Python's texts.
        with pq.ParquetWriter(path, pa.schema(kinds), write_page_checksum=True) as writer:
            for start in range(0, max(len(ordered), 1), _GROUP_ROWS):
                some = ordered[start : start + _GROUP_ROWS]
                columns = {name: pa.array([value(row, name) for row in some], kind) for name, kind in kinds.items()}
                writer.write_table(pa.table(columns))

    write_atomically(manifest, write, tmp)


def write_rejects(path: Path, rejects: Iterable[Reject], tmp: Path) -> None:
    """Writes `rejects.parquet`, with the digest of the rejections in its metadata.

    Raises:
        OSError: the disk is full or not writable; what was there before is then as it was.
    """
    import pyarrow as pa

    ordered = _ordered(rejects)
    names = ("id", "source", "key", "reason", "detail")
    table = pa.table({name: pa.array([getattr(r, name) for r in ordered], pa.string()) for name in names})
    said = {_CHECKSUM: digest(ordered).encode(), _WRITTEN_BY: _this_writer().encode()}
    _write_table(path, table.replace_schema_metadata(said), tmp)


def is_as_written(path: Path) -> bool:
    """Whether a manifest or `rejects.parquet` is, byte by byte, what its rows are written as.

    Finds what no checksum in a Parquet file covers. A file by another pyarrow than the installed one cannot be compared
    and counts as written so, provided it says the same of its writer in both places.

    Raises:
        ValueError: it cannot be read.
    """
    import pyarrow.parquet as pq

    table = _read_table(path)
    metadata = table.schema.metadata or {}
    try:
        by = pq.read_metadata(path).created_by
    except (OSError, ValueError) as error:
        raise ValueError(str(error)) from None
    if metadata.keys() - {_CHECKSUM, _WRITTEN_BY}:
        return False
    if by != _this_writer():
        return metadata.get(_WRITTEN_BY, by.encode()) == by.encode()
    groups = pq.read_metadata(path).num_row_groups
    return _table_bytes(table, _GROUP_ROWS if groups > 1 else None) == path.read_bytes()


def _table_bytes(table: pa.Table, group_rows: int | None = None) -> bytes:
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True, row_group_size=group_rows)
    return file.getvalue()


@lru_cache(maxsize=1)
def _this_writer() -> str:
    """What the installed pyarrow calls itself in the files it writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_metadata(io.BytesIO(_table_bytes(pa.table({})))).created_by


def _write_table(target: Path, table: pa.Table, tmp: Path) -> None:
    import pyarrow.parquet as pq

    write_atomically(target, lambda path: pq.write_table(table, path, write_page_checksum=True), tmp)


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The same as `_read_table`, some rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        raise ValueError("a folder, not a file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield from file.iter_batches(_BATCH_ROWS, columns=list(_ROW_COLUMNS), use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():  # which pyarrow would read as one table of many files
        raise ValueError("a folder, not a file")
    try:
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None
