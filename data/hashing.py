"""Digests of values and files, and a memory of file digests so that nothing is hashed twice.

A digest is 32 hexadecimal characters: the first half of a SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, is_dataclass
from itertools import islice
from json.encoder import encode_basestring_ascii as encode_text
from pathlib import Path
from typing import Any

from kdpipe.data.errors import KdpipeError

_DIGEST_CHARS = 32
_BLOCK_BYTES = 1 << 22
_TEXTS_AT_ONCE = 1024
RACY_NS = 2_000_000_000
"""A file younger than this may be written again without a change of its size and times; in nanoseconds."""

Stat = tuple[int, int, int, int]
"""Size (bytes), modification and change time (nanoseconds) and inode of a file."""

_Entry = tuple[int, int, int, int, str]  # of a `Stat`, and the digest
_UNKNOWN: Stat = (-1, -1, -1, -1)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return _plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(_plain(item) for item in value)
    return value


def _atom(value: Any) -> str | None:
    """What JSON writes for a text, whole number or None; None for anything else."""
    if type(value) is str:
        return encode_text(value)
    if value is None:
        return "null"
    return repr(value) if type(value) is int else None


def digest(value: Any) -> str:
    """Digest of a value made of dataclasses, mappings, sequences, strings, numbers, booleans and None.

    Mappings are hashed whatever their order; `1` and `1.0` differ.
    """
    return digest_bytes(_text(value).encode())


def _text(value: Any) -> str:
    # Texts and short lists of them are hashed by the million, and the general way is long.
    if (atom := _atom(value)) is not None:
        return atom
    if type(value) is list or type(value) is tuple:
        atoms = [_atom(item) for item in value]
        if None not in atoms:
            return f"[{','.join(atoms)}]"  # type: ignore[arg-type]
    return json.dumps(_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def digest_texts(texts: Iterable[str]) -> str:
    """What `digest` gives for a list of items whose JSON, as it writes it, is known; the list is not held."""
    state = hashlib.sha256()
    texts = iter(texts)
    before = "["
    while some := list(islice(texts, _TEXTS_AT_ONCE)):
        state.update((before + ",".join(some)).encode())
        before = ","
    state.update(("[]" if before == "[" else "]").encode())
    return state.hexdigest()[:_DIGEST_CHARS]


def digest_bytes(data: bytes) -> str:
    """Digest of raw bytes."""
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARS]


def digest_file(path: Path) -> str:
    """Digest of a file's content, read in blocks of 4 MiB.

    Raises:
        OSError: the file cannot be read.
    """
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()[:_DIGEST_CHARS]


def stat_of(path: Path | str) -> Stat:
    """What tells two contents of one file apart without reading them.

    Raises:
        OSError: there is no such file.
    """
    info = os.stat(path)
    return info.st_size, info.st_mtime_ns, info.st_ctime_ns, info.st_ino


class Fingerprints:
    """File digests remembered by path, size, modification and change time, and inode.

    A file modified within two seconds of being hashed is hashed again next time, as git does with its index:
    a later write could leave the same size and time stamp.

    Args:
        memory: SQLite file that keeps the digests between runs; None, or a folder that cannot be written,
            remembers them for this process only. Paths are kept relative to its folder's parent, so that a
            run that moves with its data keeps them.
    """

    def __init__(self, memory: Path | None = None):
        self._memory = memory
        self._base = str(memory.parent.parent) if memory is not None else "/"
        self._known: dict[str, _Entry] = {}
        self._fresh: dict[str, _Entry] = {}
        self._seen: dict[str, _Entry] = {}
        self._unreadable: set[str] = set()
        self._folders: dict[str, str] = {}
        self._listed: dict[tuple[Path, tuple[str, ...]], list[str]] = {}
        if memory is not None and memory.exists():
            try:
                with closing(
                    sqlite3.connect(f"{memory.absolute().as_uri()}?mode=ro", uri=True, timeout=10)
                ) as connection:
                    rows = connection.execute("SELECT path, size, mtime, ctime, inode, digest FROM prints")
                    self._known = {row[0]: tuple(row[1:]) for row in rows}  # type: ignore[misc]
            except sqlite3.Error:
                self._known = {}

    def file(self, path: Path) -> str:
        """Digest of a file's content; read only if size, times or inode differ from what is remembered.

        Raises:
            OSError: the file is missing or cannot be read.
        """
        full = str(path)
        try:
            stat = stat_of(full)
            if not os.path.isfile(full):
                raise OSError(errno.EINVAL, "not a regular file", full)
        except OSError:
            self._unreadable.add(full)
            raise
        name = self._name(full)
        known = self._fresh.get(name) or self._known.get(name)
        if known is not None and known[:4] == stat:
            self._seen[full] = known
            return known[4]
        value = digest_file(path)
        if stat_of(full) != stat:
            raise KdpipeError(f"{path}: changed while it was being read. Run again when it is complete.")
        if time.time_ns() - max(stat[1], stat[2]) > RACY_NS:
            self._seen[full] = self._fresh[name] = (*stat, value)
        else:
            self._seen[full] = (*_UNKNOWN, value)
        return value

    def _name(self, full: str) -> str:
        """A path from the base; that of its folder is found once, since finding it takes longer than all else."""
        parent, cut, last = full.rpartition("/")
        if not cut or last in ("", ".", ".."):
            return os.path.relpath(full, self._base)
        if parent not in self._folders:
            self._folders[parent] = os.path.relpath(parent + cut, self._base)
        folder = self._folders[parent]
        return last if folder == "." else f"{folder}/{last}"

    def seen(self) -> dict[str, Stat | None] | None:
        """What each file was that this object was asked for, when it was hashed; None for those that could not be read.

        None altogether where a file was written so shortly before that this would not tell it from a later one.
        """
        seen: dict[str, Stat | None] = dict.fromkeys(self._unreadable)
        for path, entry in self._seen.items():
            if entry[:4] == _UNKNOWN:
                return None
            seen[path] = entry[:4]
        return seen

    def folder(self, folder: Path, suffixes: Sequence[str]) -> str:
        """Digest of the files directly in `folder` whose names end in one of `suffixes`, names included.

        Raises:
            OSError: the folder is missing or cannot be read.
        """
        names = self._listed[folder, tuple(suffixes)] = _names_in(folder, tuple(suffixes))
        return digest({name: self.file(folder / name) for name in names})

    def changed_in(self, folder: Path) -> list[Path]:
        """Files of a folder that its digest, where this object gave one, would not be of any more: changed, gone or
        new."""
        moved: set[str] = set()
        for (listed, suffixes), names in self._listed.items():
            if listed == folder:
                now = _names_in(folder, suffixes) if folder.is_dir() else []
                moved |= set(names) ^ set(now)
                moved |= {path.name for path in self.changed(folder / name for name in names)}
        return [folder / name for name in sorted(moved)]

    def changed(self, paths: Iterable[Path]) -> list[Path]:
        """Those of `paths` that this object saw and whose content is another now, or that are gone since.

        A file is read again only where its size, times or inode leave it open.
        """
        moved = []
        for path in paths:
            seen = self._seen.get(str(path))
            try:
                if seen is None or stat_of(path) == seen[:4]:
                    continue
                # A named pipe that took the file's place would be waited for, for ever.
                if not os.path.isfile(path) or digest_file(path) != seen[4]:
                    moved.append(path)
            except OSError:
                moved.append(path)
        return moved

    def save(self) -> None:
        """Writes what was learnt to the memory file; a folder that cannot be written is not an error."""
        if self._memory is None or not self._fresh:
            return
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._memory, timeout=30)) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS prints"
                    " (path TEXT PRIMARY KEY, size INT, mtime INT, ctime INT, inode INT, digest TEXT)"
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO prints VALUES (?, ?, ?, ?, ?, ?)",
                    [(name, *entry) for name, entry in self._fresh.items()],
                )
        except sqlite3.OperationalError:
            return
        except sqlite3.DatabaseError:
            self._memory.unlink(missing_ok=True)
            return
        except (OSError, UnicodeError):
            return
        self._known.update(self._fresh)
        self._fresh.clear()


def _names_in(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files directly in a folder that end in one of `suffixes`, in order."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_file() and entry.name.endswith(suffixes))
