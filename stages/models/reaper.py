"""Ends vLLM's processes with the process that started them, even when that one is killed outright.

vLLM's engine core outlives a parent that dies by SIGTERM or SIGKILL, and keeps the GPU's memory. So every process of
an engine carries a mark in its environment, and a watcher of its own session ends what carries it when its parent is
gone. Run as `python -m kdpipe.stages.models.reaper MARK PID`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time

import psutil

MARK = "KDPIPE_ENGINE"
"""Environment variable that marks the processes of an engine."""

_POLL_SECONDS = 0.5


def watch(mark: str) -> subprocess.Popen[bytes]:
    """Starts a watcher that ends all processes of `mark` once the calling process is gone."""
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    # The parent may be gone before the watcher could ask for its id.
    command = [sys.executable, "-P", "-m", __name__, mark, str(os.getpid())]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, env=environment)


def end(mark: str, *, seconds: float = 10.0) -> None:
    """Kills all processes that carry `mark`, except the calling one, and waits for them to be gone.

    Python's resource tracker is spared: it ends by itself, and removes the shared memory that the others leave.
    """
    deadline = time.monotonic() + seconds
    while marked := _marked(mark):
        for process in marked:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=1.0)
        if time.monotonic() > deadline:
            return


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(MARK) == mark and "resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
    return found


def main(mark: str, parent: int) -> None:
    """Waits until the parent is gone, then ends what it left."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    end(mark)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
