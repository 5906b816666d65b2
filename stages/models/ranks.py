"""Rank 0's hold on the other ranks of a tensor-parallel model: their processes, their inputs, and a watcher."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from kdpipe.data.errors import KdpipeError, ModelError
from kdpipe.stages.models.folder import ModelFolder

REFUSED = 3
"""Exit status of a rank that refused the model; what it says is for the user, as what rank 0 says would be."""
_POLL_SECONDS = 0.2


class Ranks:
    """Starts the other ranks, tells them of forward passes, notices their end, and ends them.

    Args:
        folder: the model they load.
        size: ranks, rank 0 included.
        kind: `cpu` or `cuda`.
        meeting: private folder for rendezvous and logs.
        timeout: seconds that all may take to load, and for one forward pass.
        grace: seconds between the end of a rank and the end of this process, if it hangs for it.

    Attributes:
        processes: of rank 1 and following.
    """

    def __init__(self, folder: ModelFolder, size: int, kind: str, meeting: Path, timeout: float, grace: float):
        self._folder, self._kind, self._meeting = folder, kind, meeting
        self._timeout, self._grace = timeout, grace
        self._busy_since: float | None = None
        self._in_step = True
        self._closing = threading.Event()
        self.processes: list[subprocess.Popen[bytes]] = []
        model = asdict(replace(folder.settings, path=str(folder.path), revision=None))
        for rank in range(1, size):
            task = {"rank": rank, "size": size, "kind": kind, "meeting": str(meeting), "parent": os.getpid()}
            task |= {
                "timeout": timeout,
                "threads": max(1, torch.get_num_threads() // size),
                "model": model,
                "name": folder.name,
            }
            with open(self._log(rank), "wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "kdpipe.stages.models.parallel"],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                )
            self.processes.append(process)
            with contextlib.suppress(BrokenPipeError):
                self._tell(process, task)
        threading.Thread(target=self._watch, daemon=True).start()

    def _log(self, rank: int) -> Path:
        return self._meeting / f"rank{rank}.log"

    @staticmethod
    def _tell(process: subprocess.Popen[bytes], message: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()

    def await_start(self) -> None:
        """Waits until all ranks are about to join; what can go wrong before is found without a process group.

        Raises:
            ModelError: a rank ended, or did not start in time.
        """
        deadline = time.monotonic() + self._timeout
        while not all((self._meeting / f"up{rank + 1}").exists() for rank in range(len(self.processes))):
            self._refuse_gone()
            if time.monotonic() > deadline:
                raise ModelError(f"{self._folder.name}: {self._too_slow()}")
            time.sleep(0.02)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A stretch in which rank 0 waits for the others.

        Raises:
            ModelError: a rank ended or did not answer.
        """
        self._refuse_gone()
        began = self._busy_since = time.monotonic()
        self._in_step = False
        try:
            yield
            if self._kind == "cuda":
                torch.cuda.synchronize()
            self._in_step = True
        except Exception as error:
            self._refuse_gone(wait=2.0)
            if time.monotonic() - began >= self._timeout and not isinstance(error, KdpipeError):
                raise ModelError(f"{self._folder.name}: {self._too_slow()} ({error})") from None
            raise
        finally:
            self._busy_since = None

    @contextmanager
    def around(self, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Has the other ranks run the forward pass that rank 0 runs inside; see `LoadedModel.around`."""
        assert not torch.is_grad_enabled()
        header = {name: [list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in inputs.items()}
        with self.together():
            for process in self.processes:
                self._tell(process, header)
            for value in inputs.values():
                dist.broadcast(value.contiguous(), src=0)
            yield

    def close(self) -> None:
        """Ends all ranks: by the end of their input, or by force where a pass was broken off."""
        self._closing.set()
        for process in self.processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if not self._in_step:
            self._kill()
        if dist.is_initialized():
            dist.destroy_process_group()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(self._grace)
        self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _gone(self) -> str | None:
        """What is to be said of a rank that ended, if one did."""
        for rank, process in enumerate(self.processes, start=1):
            if (status := process.poll()) is not None:
                why = self._why(rank)
                if status == REFUSED:
                    return why
                how = f"by signal {-status}" if status < 0 else f"with status {status}"
                return (
                    f"{self._folder.name}: the process of rank {rank} (teachers.tensor_parallel_size "
                    f"{len(self.processes) + 1}) ended {how}{': ' if why else ''}{why.removesuffix('.')}. Free memory "
                    "if it had too little, and run the command again; what was committed is kept."
                )
        return None

    def _why(self, rank: int) -> str:
        """The error that ended a rank, or else the last line of what it wrote."""
        for file in (self._meeting / f"why{rank}", self._log(rank)):
            with contextlib.suppress(OSError):
                if text := file.read_text(errors="replace").strip():
                    return text if file.name.startswith("why") else text.splitlines()[-1]
        return ""

    def _refuse_gone(self, *, wait: float = 0.0) -> None:
        """Raises ModelError if a rank ended, or ends within `wait` seconds."""
        deadline = time.monotonic() + wait
        while (gone := self._gone()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        if gone is not None:
            raise ModelError(gone)

    def _too_slow(self) -> str:
        return (
            f"a process of tensor parallelism did not answer within {self._timeout:g} s. "
            "Look whether one is stopped or out of memory, and run the command again; what was committed is kept."
        )

    def _watch(self) -> None:
        """Ends this process where it hangs in a collective that a rank will never join."""
        gone_since: float | None = None
        while not self._closing.wait(_POLL_SECONDS):
            now, began, gone = time.monotonic(), self._busy_since, self._gone()
            gone_since = None if gone is None else gone_since or now
            if began is None:
                continue
            if gone is not None and gone_since is not None and now - max(began, gone_since) > self._grace:
                self._give_up(gone)
            if now - began > self._timeout + self._grace:
                self._give_up(f"{self._folder.name}: {self._too_slow()}")

    def _give_up(self, message: str) -> None:
        for process in self.processes:
            process.kill()
        shutil.rmtree(self._meeting, ignore_errors=True)
        print(f"Error: {message}", file=sys.stderr, flush=True)
        os._exit(2)
