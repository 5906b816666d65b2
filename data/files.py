"""Writing that a crash cannot tear: build aside, fsync, rename into place, fsync the folder."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts `path` in an error of the system that does not say where it is, as those of writing and flushing do not."""
    try:
        yield
    except OSError as error:
        name = error.filename
        known = (isinstance(name, str) and os.path.isabs(name)) or str(path) in str(error)
        if error.errno is not None and not known:
            error.filename = str(path)
        raise


def fsync_path(path: Path) -> None:
    """Flushes one file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(path: Path) -> None:
    """Flushes a file, or a folder with everything below it, to the disk."""
    if path.is_dir():
        for folder, _, names in os.walk(path):
            for name in names:
                fsync_path(Path(folder, name))
            fsync_path(Path(folder))
    else:
        fsync_path(path)


def listing(folder: Path) -> list[str]:
    """Files below `folder` as sorted `name:bytes` texts."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(f"{path.relative_to(folder).as_posix()}:{path.stat().st_size}" for path in files)


def remove(path: Path) -> None:
    """Removes a file or folder; one that is not there is not an error."""
    with naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def retire(path: Path, tmp: Path) -> None:
    """Removes a file or folder of which half may never be seen: it goes to the folder `tmp` in one step first."""
    if os.path.lexists(path):
        tmp.mkdir(parents=True, exist_ok=True)
        aside = _aside(tmp)
        os.rename(path, aside)
        remove(aside)


def _aside(tmp: Path) -> Path:
    return tmp / f"old-{uuid.uuid4().hex}"


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, and flushes the entries of the new ones to the disk."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        fsync_path(folder.parent)


def move_into_place(built: Path, target: Path) -> None:
    """Flushes `built` and renames it to `target` on the same file system, replacing what stood there.

    A file is replaced in one step. What stands where a folder goes is moved aside first and removed after.
    """
    fsync_tree(built)
    make_folder(target.parent)
    aside = None
    if target.is_dir() or (built.is_dir() and os.path.lexists(target)):
        aside = _aside(built.parent)
        os.rename(target, aside)
    try:
        os.replace(built, target)
    except OSError:
        if aside is not None:
            os.rename(aside, target)
        raise
    fsync_path(target.parent)
    if aside is not None:
        remove(aside)


@contextmanager
def build_aside(tmp: Path, suffix: str = "") -> Iterator[Path]:
    """A fresh path in the folder `tmp` to build a file or folder at; removed at the end if still there."""
    tmp.mkdir(parents=True, exist_ok=True)
    path = tmp / f"{uuid.uuid4().hex}{suffix}"
    try:
        with naming(path):
            yield path
    finally:
        remove(path)


def write_atomically(target: Path, write: Callable[[Path], object], tmp: Path) -> None:
    """Calls `write(path)` on a path in `tmp`, then moves the result to `target`.

    Raises:
        OSError: the disk is full or the folder cannot be written; `target` is then as it was.
    """
    with build_aside(tmp, target.suffix) as path:
        write(path)
        move_into_place(path, target)


def write_json(target: Path, value: Any, tmp: Path) -> None:
    """Writes `value` as indented JSON with a final newline, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(target, lambda path: path.write_text(text, encoding="utf-8"), tmp)
