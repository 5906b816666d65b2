"""The ledger of a stage: which sample lies where, under which key, and what was rejected.

A stage's folder holds `HEAD` (the digest of the current manifest and the digest of its file), immutable `parts/`,
`manifests/<digest>.parquet` (one row for each sample and source), and `rejects.parquet`. Committing a part means: the
part is built in `tmp/`, flushed and renamed into `parts/`; the new manifest is written; `HEAD` is swapped last. A
reader follows `HEAD` and so never sees anything half-written; a crash leaves at most parts that no row points to.

A folder has one committer at a time (the run's lock sees to that).
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import StoreError
from kdpipe.data.files import listing, move_into_place, remove, write_atomically
from kdpipe.data.hashing import digest, digest_file

if TYPE_CHECKING:
    import pyarrow as pa

_CHECKSUM = b"kdpipe.digest"
_WRITTEN_BY = b"kdpipe.written_by"
_BATCH_ROWS = 4096
_REST = 20  # times as long as writing a manifest took, before another is written for `commit(soon=True)`


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


class Ledger:
    """Reads and commits the state of one stage folder.

    Args:
        folder: the stage's folder, e.g. `run/textualize`.
        tmp: folder for unfinished files, on the same file system.

    Raises:
        StoreError: `HEAD` names a manifest that is missing or unreadable.
    """

    def __init__(self, folder: Path, tmp: Path):
        self.folder = folder
        self.tmp = tmp
        self.digest, self._rows = self._load_current_rows()
        self._rejects = self._load_rejects()
        self._rejects_digest = digest(sorted(self._rejects.values(), key=lambda reject: (reject.id, reject.source)))
        self._behind, self._written, self._cost = False, 0.0, 0.0

    @property
    def parts(self) -> Path:
        """The folder of the parts."""
        return self.folder / "parts"

    def rows(self) -> Iterable[Row]:
        """All rows, in no particular order."""
        return self._rows.values()

    def get(self, sample: str, source: str) -> Row | None:
        """The row of one source of one sample, or None."""
        return self._rows.get((sample, source))

    def rejects(self) -> Iterable[Reject]:
        """All recorded rejections."""
        return self._rejects.values()

    def rejected(self, sample: str, source: str) -> Reject | None:
        """The rejection of one source of one sample, or None."""
        return self._rejects.get((sample, source))

    def commit(
        self,
        rows: Iterable[Row] = (),
        *,
        rejects: Iterable[Reject] = (),
        built: Mapping[str, Path] | None = None,
        drop: Iterable[tuple[str, str]] = (),
        soon: bool = False,
    ) -> None:
        """Takes finished parts, their rows and rejections into the ledger, `HEAD` last.

        Args:
            rows: new rows; each replaces the one of the same sample and source.
            rejects: new rejections; each removes the row of the same sample and source.
            built: part name to the finished file or folder in `tmp`, moved to `parts/`.
            drop: (sample, source) pairs to forget.
            soon: parts are in place at once, but the manifest, which takes the longer the more samples there are, is
                only written when that takes a twentieth of the time at most, or by `flush`. After a crash before that,
                parts that were built so are still there, without rows: see `unreferenced_parts`.

        Raises:
            OSError: the disk is full or not writable; what was committed before is then as it was.
        """
        for name, path in (built or {}).items():
            move_into_place(path, self.parts / name)
        new_rows, new_rejects = (self._rows, self._rejects) if soon else (dict(self._rows), dict(self._rejects))
        for pair in drop:
            new_rows.pop(pair, None)
            new_rejects.pop(pair, None)
        for row in rows:
            new_rows[row.id, row.source] = row
            new_rejects.pop((row.id, row.source), None)
        for reject in rejects:
            new_rejects[reject.id, reject.source] = reject
            new_rows.pop((reject.id, reject.source), None)
        # Until it is written: what may wait is not forgotten where writing fails.
        self._behind = self._behind or soon
        if not soon or time.monotonic() - self._written >= _REST * self._cost:
            self._write(new_rows, new_rejects)

    def flush(self) -> None:
        """Writes what `commit(soon=True)` has left to be written.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self._behind:
            self._write(self._rows, self._rejects)

    def _write(self, rows: dict[tuple[str, str], Row], rejects: dict[tuple[str, str], Reject]) -> None:
        began = time.monotonic()
        new_digest = rows_digest(rows.values())
        manifest = self.folder / "manifests" / f"{new_digest}.parquet"
        moved = new_digest != self.digest or not manifest.exists()
        if moved:
            _write_table(manifest, _rows_table(rows.values()), self.tmp)
        found = digest(sorted(rejects.values(), key=lambda reject: (reject.id, reject.source)))
        if found != self._rejects_digest:
            _write_table(self.folder / "rejects.parquet", _rejects_table(rejects.values()), self.tmp)
        if moved:
            write_head(self.folder, manifest, self.tmp)
        self.digest, self._rows, self._rejects, self._rejects_digest = new_digest, rows, rejects, found
        self._prune_manifests()
        self._behind, self._written = False, time.monotonic()
        self._cost = self._written - began

    def lost_parts(self) -> set[str]:
        """Names of parts that rows point to and that are not on disk any more, wholly or in part.

        A part that stands in the stage's folder itself, like a student, lists its files in `Row.cover["files"]`.
        """
        files = {row.part: row.cover.get("files", ()) for row in self._rows.values()}
        return {name for name, expected in files.items() if not self._is_whole(name, expected)}

    def _is_whole(self, name: str, expected: Sequence[str]) -> bool:
        if (self.parts / name).is_dir() or (not name.endswith(".zarr") and (self.parts / name).exists()):
            return True
        return (self.folder / name).exists() and set(expected) <= set(listing(self.folder / name))

    def unreferenced_parts(self) -> list[Path]:
        """Parts on disk that no row points to (garbage that `kdpipe` may collect)."""
        used = {row.part for row in self._rows.values()}
        return sorted(path for path in self.parts.glob("*") if path.name not in used)

    def _damaged(self, path: Path, why: str) -> StoreError:
        mend = "run `kdpipe cache verify`, which mends it, or " if self.folder.name == "cache-teachers" else ""
        return StoreError(
            f"{path}: cannot be read ({why}). Remove {self.folder} to build this stage anew, "
            f"{mend}restore the file from a copy."
        )

    def _load_current_rows(self) -> tuple[str | None, dict[tuple[str, str], Row]]:
        """Reads what `HEAD` points to, again if a committer swaps it and prunes the manifest meanwhile."""
        head = self.folder / "HEAD"
        while True:
            before = head.read_bytes() if head.is_file() else None
            try:
                return self._load_rows()
            except StoreError:
                if (head.read_bytes() if head.is_file() else None) == before:
                    raise

    def _load_rows(self) -> tuple[str | None, dict[tuple[str, str], Row]]:
        head = self.folder / "HEAD"
        try:
            name, checksum = head.read_bytes().decode("ascii").split()
        except FileNotFoundError:
            return None, {}
        except (IsADirectoryError, ValueError):
            raise self._damaged(head, "it does not hold two digests") from None
        manifest = self.folder / "manifests" / f"{name}.parquet"
        try:
            found = digest_file(manifest)
        except (OSError, ValueError) as error:
            raise self._damaged(manifest, f"{error}; {head} points to it") from None
        if found != checksum:
            raise self._damaged(manifest, f"its content is not what {head} says")
        try:
            return name, {(row.id, row.source): row for row in read_rows(manifest)}
        except ValueError as error:
            raise self._damaged(manifest, str(error)) from None

    def _load_rejects(self) -> dict[tuple[str, str], Reject]:
        path = self.folder / "rejects.parquet"
        if not path.exists():
            return {}
        try:
            return {(reject.id, reject.source): reject for reject in read_rejects(path)}
        except ValueError as error:
            raise self._damaged(path, str(error)) from None

    def _prune_manifests(self) -> None:
        """Removes all manifests but the current one: nothing proves an old one whole."""
        for path in old_manifests(self.folder, self.digest):
            remove(path)


_ROW_COLUMNS = ("id", "source", "key", "fields", "part", "row", "tokens", "length", "content", "cover")


def rows_digest(rows: Iterable[Row]) -> str:
    """Digest of rows in any order: the name of their manifest."""
    return digest(
        sorted((r.id, r.source, r.key, r.part, r.row, r.tokens, r.length, dict(r.cover), r.content) for r in rows)
    )


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
    rows = []
    try:
        # Batch by batch, and the same digests, which stand in many rows, kept once: a table is much larger as objects.
        for batch in _read_table(manifest).select(list(_ROW_COLUMNS)).to_batches(max_chunksize=_BATCH_ROWS):
            for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                sample, source, key, text, part, place, tokens, length, content, cover = values
                if cover not in covers:
                    covers[cover] = json.loads(cover)
                fields = {sys.intern(name): sys.intern(value) for name, value in json.loads(text).items()}
                where = sys.intern(source), key, fields, sys.intern(part)
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
    return _table_bytes(table) == path.read_bytes()


def _table_bytes(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(table, file, write_page_checksum=True)
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
        return pq.read_table(path, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(str(error)) from None


def _rows_table(rows: Iterable[Row]) -> pa.Table:
    import pyarrow as pa

    ordered = sorted(rows, key=lambda row: (row.source, row.part, row.row, row.id))

    def text(value: Mapping[str, Any]) -> str:
        return json.dumps(dict(value), sort_keys=True)

    types = {"row": pa.int64(), "tokens": pa.int64(), "length": pa.int64()}
    return pa.table(
        {
            name: pa.array(
                [text(getattr(r, name)) if name in ("fields", "cover") else getattr(r, name) for r in ordered],
                types.get(name, pa.string()),
            )
            for name in _ROW_COLUMNS
        }
    )


def _rejects_table(rejects: Iterable[Reject]) -> pa.Table:
    import pyarrow as pa

    ordered = sorted(rejects, key=lambda reject: (reject.id, reject.source))
    names = ("id", "source", "key", "reason", "detail")
    table = pa.table({name: pa.array([getattr(r, name) for r in ordered], pa.string()) for name in names})
    return table.replace_schema_metadata({_CHECKSUM: digest(ordered).encode(), _WRITTEN_BY: _this_writer().encode()})
