"""The files of a ledger: rows and rejections as Parquet tables, and `HEAD`, which names the current one.

A manifest is named by the digest of its rows; `HEAD` holds that name and the digest of the file. `rejects.parquet` has
the digest of its rows in its metadata. Parquet's page checksums are written and verified besides.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from kdpipe.data.files import write_atomically
from kdpipe.data.hashing import digest, digest_file
from kdpipe.data.ledger_rows import Rows

if TYPE_CHECKING:
    import pyarrow as pa

_CHECKSUM = b"kdpipe.digest"
_WRITTEN_BY = b"kdpipe.written_by"
_GROUP_ROWS = 8192  # of a manifest, written together; releases before this one wrote all rows in one group


@dataclass(frozen=True, slots=True)
class Reject:
    """One sample that a stage could not process, under the key it was tried with."""

    id: str
    source: str
    key: str
    reason: str
    detail: str


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


def read_rejects(path: Path) -> list[Reject]:
    """The rows of `rejects.parquet`, proven by their digest.

    Raises:
        ValueError: it cannot be read, or its rows are not what was written.
    """
    table = _read_table(path)
    try:
        rejects = [Reject(**row) for row in table.to_pylist()]
        found = digest(rejects)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(str(error)) from None
    if (table.schema.metadata or {}).get(_CHECKSUM) != found.encode():
        raise ValueError("its rows do not match their digest")
    return rejects


def write_rows(manifest: Path, rows: Rows, tmp: Path) -> None:
    """Writes a manifest.

    Raises:
        OSError: the disk is full or not writable; what was there before is then as it was.
    """
    import pyarrow.parquet as pq

    def write(path: Path) -> None:
        tables = rows.tables(_GROUP_ROWS)
        first = next(tables)
        with pq.ParquetWriter(path, first.schema, write_page_checksum=True) as writer:
            for table in chain([first], tables):
                writer.write_table(table)

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


def _read_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():  # which pyarrow would read as one table of many files
        raise ValueError("a folder, not a file")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:  # `read_table` imports pandas
            return file.read(use_threads=False)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None
