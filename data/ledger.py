"""The ledger of a stage: which sample lies where, under which key, and what was rejected.

A stage's folder holds `HEAD` (the digest of the current manifest and the digest of its file), immutable `parts/`,
`manifests/<digest>.parquet` (one row for each sample and source), and `rejects.parquet`. Committing a part means: the
part is built in `tmp/`, flushed and renamed into `parts/`; the new manifest is written; `HEAD` is swapped last. A
reader follows `HEAD` and so never sees anything half-written; a crash leaves at most an unreferenced part.

A folder has one committer at a time (the run's lock sees to that).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdpipe.data.errors import StoreError
from kdpipe.data.files import listing, move_into_place, remove, write_atomically
from kdpipe.data.hashing import digest, digest_file

if TYPE_CHECKING:
    import pyarrow as pa

_KEPT_MANIFESTS = 2
_CHECKSUM = b"kdpipe.digest"


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
    ) -> None:
        """Takes finished parts, their rows and rejections into the ledger, `HEAD` last.

        Args:
            rows: new rows; each replaces the one of the same sample and source.
            rejects: new rejections; each removes the row of the same sample and source.
            built: part name to the finished file or folder in `tmp`, moved to `parts/`.
            drop: (sample, source) pairs to forget.

        Raises:
            OSError: the disk is full or not writable; what was committed before is then as it was.
        """
        new_rows, new_rejects = dict(self._rows), dict(self._rejects)
        for pair in drop:
            new_rows.pop(pair, None)
            new_rejects.pop(pair, None)
        for row in rows:
            new_rows[row.id, row.source] = row
            new_rejects.pop((row.id, row.source), None)
        for reject in rejects:
            new_rejects[reject.id, reject.source] = reject
            new_rows.pop((reject.id, reject.source), None)
        for name, path in (built or {}).items():
            move_into_place(path, self.parts / name)
        new_digest = digest(
            sorted(
                (r.id, r.source, r.key, r.part, r.row, r.tokens, r.length, dict(r.cover), r.content)
                for r in new_rows.values()
            )
        )
        manifest = self.folder / "manifests" / f"{new_digest}.parquet"
        moved = new_digest != self.digest or not manifest.exists()
        if moved:
            self._write_table(manifest, _rows_table(new_rows.values()))
        if new_rejects != self._rejects:
            self._write_table(self.folder / "rejects.parquet", _rejects_table(new_rejects.values()))
        if moved:
            head = f"{new_digest} {digest_file(manifest)}\n"
            write_atomically(self.folder / "HEAD", lambda path: path.write_text(head), self.tmp)
        self.digest, self._rows, self._rejects = new_digest, new_rows, new_rejects
        self._prune_manifests()

    def lost_parts(self) -> set[str]:
        """Names of parts that rows point to and that are not on disk any more, wholly or in part.

        A part that stands in the stage's folder itself, like a student, lists its files in `Row.cover["files"]`.
        """
        files = {row.part: row.cover.get("files", ()) for row in self._rows.values()}
        return {name for name, expected in files.items() if not self._is_whole(name, expected)}

    def _is_whole(self, name: str, expected: Sequence[str]) -> bool:
        if (self.parts / name).exists():
            return True
        return (self.folder / name).exists() and set(expected) <= set(listing(self.folder / name))

    def unreferenced_parts(self) -> list[Path]:
        """Parts on disk that no row points to (garbage that `kdpipe` may collect)."""
        used = {row.part for row in self._rows.values()}
        return sorted(path for path in self.parts.glob("*") if path.name not in used)

    def _write_table(self, target: Path, table: pa.Table) -> None:
        import pyarrow.parquet as pq

        write_atomically(target, lambda path: pq.write_table(table, path, write_page_checksum=True), self.tmp)

    def _read_table(self, path: Path) -> pa.Table:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.read_table(path, page_checksum_verification=True)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(path, str(error)) from None

    def _damaged(self, path: Path, why: str) -> StoreError:
        return StoreError(
            f"{path}: cannot be read ({why}). Remove {self.folder} to build this stage anew, "
            "or restore the file from a copy."
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
        except ValueError:
            raise self._damaged(head, "it does not hold two digests") from None
        manifest = self.folder / "manifests" / f"{name}.parquet"
        try:
            found = digest_file(manifest)
        except (OSError, ValueError) as error:
            raise self._damaged(manifest, f"{error}; {head} points to it") from None
        if found != checksum:
            raise self._damaged(manifest, f"its content is not what {head} says")
        columns = self._read_table(manifest).to_pydict()
        parsed: dict[str, dict[str, str]] = {}
        rows = {}
        for values in zip(*(columns[name] for name in _ROW_COLUMNS), strict=True):
            sample, source, key, fields, part, place, tokens, length, content, cover = values
            for text in (fields, cover):
                if text not in parsed:
                    parsed[text] = json.loads(text)
            rows[sample, source] = Row(
                sample, source, key, parsed[fields], part, place, tokens, length, content, parsed[cover]
            )
        return name, rows

    def _load_rejects(self) -> dict[tuple[str, str], Reject]:
        path = self.folder / "rejects.parquet"
        if not path.exists():
            return {}
        table = self._read_table(path)
        try:
            rejects = [Reject(**row) for row in table.to_pylist()]
            found = digest(rejects)
        except (TypeError, ValueError) as error:
            raise self._damaged(path, str(error)) from None
        if (table.schema.metadata or {}).get(_CHECKSUM) != found.encode():
            raise self._damaged(path, "its rows do not match their digest")
        return {(reject.id, reject.source): reject for reject in rejects}

    def _prune_manifests(self) -> None:
        manifests = sorted((self.folder / "manifests").glob("*.parquet"), key=lambda path: path.stat().st_mtime_ns)
        for path in manifests[:-_KEPT_MANIFESTS]:
            if path.stem != self.digest:
                remove(path)


_ROW_COLUMNS = ("id", "source", "key", "fields", "part", "row", "tokens", "length", "content", "cover")


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
    return table.replace_schema_metadata({_CHECKSUM: digest(ordered).encode()})
