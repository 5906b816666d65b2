"""One run at a time in a folder.

The lock is an `flock` on an open file: the kernel releases it when the last process that holds the file is
gone, however it died. Stage processes inherit the file, so a stage that outlives a killed parent still holds it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from kdpipe.data.errors import KdpipeError

_INTRODUCTION_SECONDS = 1.0


@contextmanager
def hold(folders: Sequence[Path]) -> Iterator[list[int]]:
    """Locks run folders and yields the file descriptors that stage processes must inherit.

    Raises:
        KdpipeError: another process works there (says which), or the folder cannot be written.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(_hold(folder)) for folder in sorted(set(folders))]


@contextmanager
def _hold(folder: Path) -> Iterator[int]:
    path = folder / "locks" / "run.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise KdpipeError(
            f"{folder}: the run folder cannot be written ({error.strerror}: {error.filename}). Mend its permissions "
            "(is it another user's?), or set run.folder."
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KdpipeError(
                f"{folder}: another kdpipe works here ({_holder(handle)}). Wait for it or stop it."
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield handle
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    """Who holds the lock. Who just took it has not written its number yet: until then nobody's, or a dead one's, is
    there."""
    deadline = time.monotonic() + _INTRODUCTION_SECONDS
    while True:
        try:
            entry = json.loads(os.pread(handle, 4096, 0))
            text = f"process {entry['pid']} on {entry['host']}"
            if entry["host"] != socket.gethostname() or psutil.pid_exists(entry["pid"]):
                return text
        except (ValueError, LookupError, TypeError, OverflowError):
            text = "its process number is not known"
        if time.monotonic() > deadline:
            return text
        time.sleep(0.01)
