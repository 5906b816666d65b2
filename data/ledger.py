"""The ledger of a stage: which sample lies where, under which key, and what was rejected.

A stage's folder holds `HEAD` (the digest of the current manifest and the digest of its file), immutable `parts/`,
`manifests/<digest>.parquet` (one row for each sample and source), and `rejects.parquet`. Committing a part means: the
part is built in `tmp/`, flushed and renamed into `parts/`; the new manifest is written; `HEAD` is swapped last. A
reader follows `HEAD` and so never sees anything half-written; a crash leaves at most parts that no row points to.

A folder has one committer at a time (the run's lock sees to that).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdpipe.data.errors import StoreError
from kdpipe.data.files import move_into_place, remove
from kdpipe.data.hashing import digest_file
from kdpipe.data.ledger_files import (
    Reject,
    old_manifests,
    read_rejects,
    rejects_digest,
    write_head,
    write_rejects,
    write_rows,
)
from kdpipe.data.ledger_rows import Row, Rows

_REST = 20  # times as long as writing a manifest took, before another is written for `commit(soon=True)`


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
        self.digest, self._written_rows = self._load_current_rows()
        self._new: dict[tuple[str, str], Row] = {}  # since then, and `_gone` what those were written without
        self._gone: set[tuple[str, str]] = set()
        self._rejects = self._load_rejects()
        self._rejects_digest = rejects_digest(self._rejects.values())
        self._behind, self._written, self._cost = False, 0.0, 0.0

    @property
    def parts(self) -> Path:
        """The folder of the parts."""
        return self.folder / "parts"

    def rows(self) -> Iterator[Row]:
        """All rows, in no particular order."""
        if not self._new and not self._gone:
            yield from self._written_rows
            return
        for row in self._written_rows:
            if self._stands((row.id, row.source)):
                yield row
        yield from self._new.values()

    def values(self, source: str, *names: str) -> Iterator[tuple[Any, ...]]:
        """Attributes of all rows of a source, in the order of `names`: many times faster than `rows`.

        Args:
            source: the source.
            names: of attributes of `Row`, without `fields`.
        """
        if not self._new and not self._gone:
            yield from self._written_rows.values(source, *names)
            return
        for sample, *values in self._written_rows.values(source, "id", *names):
            if self._stands((sample, source)):
                yield tuple(values)
        for row in self._new.values():
            if row.source == source:
                yield tuple(getattr(row, name) for name in names)

    @property
    def sources(self) -> list[str]:
        """Sources that there are rows of."""
        return sorted({*self._written_rows.sources, *(source for _, source in self._new)})

    def get(self, sample: str, source: str) -> Row | None:
        """The row of one source of one sample, or None."""
        pair = (sample, source)
        return self._new.get(pair) or (None if pair in self._gone else self._written_rows.get(sample, source))

    def _stands(self, pair: tuple[str, str]) -> bool:
        """Whether what is written is what is so."""
        return pair not in self._new and pair not in self._gone

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
        given = self._new, self._gone, self._rejects
        new, gone, new_rejects = given if soon else (dict(self._new), set(self._gone), dict(self._rejects))
        for pair in drop:
            new.pop(pair, None)
            gone.add(pair)
            new_rejects.pop(pair, None)
        for row in rows:
            new[row.id, row.source] = row
            new_rejects.pop((row.id, row.source), None)
        for reject in rejects:
            new_rejects[reject.id, reject.source] = reject
            new.pop((reject.id, reject.source), None)
            gone.add((reject.id, reject.source))
        # Until it is written: what may wait is not forgotten where writing fails.
        self._behind = self._behind or soon
        if not soon or time.monotonic() - self._written >= _REST * self._cost:
            self._write(new, gone, new_rejects)

    def flush(self) -> None:
        """Writes what `commit(soon=True)` has left to be written.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self._behind:
            self._write(self._new, self._gone, self._rejects)

    def _write(
        self, new: dict[tuple[str, str], Row], gone: set[tuple[str, str]], rejects: dict[tuple[str, str], Reject]
    ) -> None:
        began = time.monotonic()
        rows = self._written_rows.changed(new.values(), gone - new.keys())
        new_digest = rows.digest()
        manifest = self.folder / "manifests" / f"{new_digest}.parquet"
        moved = new_digest != self.digest or not manifest.exists()
        if moved:
            write_rows(manifest, rows, self.tmp)
            rows = Rows.read(manifest)  # which leaves on disk what is seldom needed
        found = rejects_digest(rejects.values())
        if found != self._rejects_digest:
            write_rejects(self.folder / "rejects.parquet", rejects.values(), self.tmp)
        if moved:
            write_head(self.folder, manifest, self.tmp)
        self.digest, self._written_rows, self._new, self._gone = new_digest, rows, {}, set()
        self._rejects, self._rejects_digest = rejects, found
        self._prune_manifests()
        self._behind, self._written = False, time.monotonic()
        self._cost = self._written - began

    def lost_parts(self) -> set[str]:
        """Names of parts that rows point to and that are not on disk any more, wholly or in part.

        A part that stands in the stage's folder itself, like a student, lists its files in `Row.cover["files"]`, and
        under `../` those that belong to it in folders beside it.
        """
        return {name for name, files in self._files().items() if not self._is_whole(name, files)}

    def expected(self) -> Iterator[tuple[str, int | None]]:
        """What must be there for no part to be lost: paths, with their sizes in bytes where these count."""
        for name, files in self._files().items():
            if self._is_in_parts(name):
                yield str(self.parts / name), None
            else:
                for path, size in map(_path_and_size, files):
                    yield str(self.folder / name / path), size

    def _files(self) -> dict[str, Sequence[str]]:
        """Parts that rows lie in, and the files they list where they stand in the stage's folder itself."""
        pairs: Iterable[tuple[str, Mapping[str, Any]]] = self._written_rows.parts()
        if self._new or self._gone:
            pairs = (pair for source in self.sources for pair in self.values(source, "part", "cover"))  # type: ignore[misc]
        return {name: cover.get("files", ()) for name, cover in pairs}

    def _is_whole(self, name: str, files: Sequence[str]) -> bool:
        if self._is_in_parts(name):
            return True
        folder = self.folder / name
        found = ((folder / path, size) for path, size in map(_path_and_size, files))
        return folder.exists() and all(path.is_file() and path.stat().st_size == size for path, size in found)

    def _is_in_parts(self, name: str) -> bool:
        path = self.parts / name
        return path.is_dir() or (not name.endswith(".zarr") and path.exists())

    def unreferenced_parts(self) -> list[Path]:
        """Parts on disk that no row points to (garbage that `kdpipe` may collect)."""
        used = self._files()
        return sorted(path for path in self.parts.glob("*") if path.name not in used)

    def _damaged(self, path: Path, why: str) -> StoreError:
        mend = "run `kdpipe cache verify`, which mends it, " if self.folder.name == "cache-teachers" else ""
        return StoreError(
            f"{path}: cannot be read ({why}). Remove {self.folder} to build this stage anew, "
            f"{mend}or restore the file from a copy."
        )

    def _load_current_rows(self) -> tuple[str | None, Rows]:
        """Reads what `HEAD` points to, again if a committer swaps it and prunes the manifest meanwhile."""
        head = self.folder / "HEAD"
        while True:
            before = head.read_bytes() if head.is_file() else None
            try:
                return self._load_rows()
            except StoreError:
                if (head.read_bytes() if head.is_file() else None) == before:
                    raise

    def _load_rows(self) -> tuple[str | None, Rows]:
        head = self.folder / "HEAD"
        try:
            name, checksum = head.read_bytes().decode("ascii").split()
        except FileNotFoundError:
            return None, Rows.of([])
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
            return name, Rows.read(manifest)
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


def _path_and_size(text: str) -> tuple[str, int]:
    """Of a file that a part lists as `name:bytes`."""
    name, _, size = text.rpartition(":")
    return name, int(size)
