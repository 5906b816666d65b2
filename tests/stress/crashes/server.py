"""Runs `kdpipe` commands in forks of a process that has imported everything once; `commands.py` talks to it.

Reads one JSON object a line, gives one back. The command line is the real one; only two things stand in for others. A
stage's process is forked, not started anew. And vLLM, which takes a minute to start, is replaced by an engine whose
answer is a function of the request; `test_real_kills.py` has the real one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pandas  # noqa: F401  (here and below: what commands would import in every try)
import peft.utils.transformers_weight_conversion  # noqa: F401
import pyarrow.dataset
import pyarrow.parquet  # noqa: F401
import soundfile  # noqa: F401
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni  # noqa: F401
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401

from kdpipe.data.hashing import digest, digest_bytes
from kdpipe.pipeline import runner, worker
from kdpipe.pipeline.cli import main
from kdpipe.stages.cache_teachers import run as cache_teachers  # noqa: F401
from kdpipe.stages.cache_teachers import teach
from kdpipe.stages.evaluate import run as evaluate
from kdpipe.stages.models.engine import Completion, Output
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.textualize import run as textualize
from kdpipe.stages.train import loop
from kdpipe.stages.train import run as train  # noqa: F401

MODES = ("count", "kill", "tear", "fail", "do")
_PR_SET_CHILD_SUBREAPER = 36
_TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>{n} tones.</CAPTION><REASONING>{n} tones</REASONING>"
    "<SUMMARY>{n}</SUMMARY></THINK><RESPONSE>{n}</RESPONSE>"
)


class ForkedStage:
    """What the runner takes for a `subprocess.Popen` of a stage."""

    def __init__(self, command: list[str], **options: Any):
        words = command[command.index("kdpipe.pipeline.worker") + 1 :]
        self.pid = os.fork()
        if not self.pid:
            _end_with(lambda: worker.main(words))

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class StandIn:
    """An engine that answers its requests in order, two at a time, and takes a note of each."""

    capacity = 4

    def __init__(self, encoder: Encoder):
        self.encoder = encoder
        self._asked: list[tuple[str, Any]] = []
        self._number = 0

    def submit(self, request: Any) -> str:
        self._number += 1
        self._asked.append((str(self._number), request))
        return str(self._number)

    def step(self) -> list[tuple[str, Completion]]:
        done, self._asked = self._asked[:2], self._asked[2:]
        return [(name, self._answer(request)) for name, request in done]

    def _answer(self, request: Any) -> Completion:
        note("asked")
        said = digest([request.prompt, request.sampling, [digest_bytes(clip.tobytes()) for clip in request.clips]])
        is_trace = "describe" not in request.prompt.lower()
        text = _TRACE.format(n=2 + int(said[0], 16) % 2) if is_trace else f"tones {said}"
        return Completion(7, tuple(Output(text, "stop", 9) for _ in range(request.sampling.n)))


@contextlib.contextmanager
def open_stand_in(folder: Any, config: Any, **options: Any) -> Iterator[StandIn]:
    yield StandIn(Encoder(folder))


def note(what: str) -> None:
    """A line in the log of steps, without a number: work that was done, to see how much of it is done twice."""
    os.write(_log, f"0 work {what}\n".encode())


class NotedScribe(teach.Scribe):
    """A scribe that takes a note of each unit it asks a teacher about."""

    def __call__(self, batch: Any) -> Any:
        for name in batch.ids:
            note(f"{'+'.join(self._shape.cover)} {name}")
        return super().__call__(batch)


def noted_step(*arguments: Any) -> Any:
    """A training step that is taken a note of."""
    note(f"step {arguments[4]}")
    return _train_step(*arguments)


_train_step = loop.train_step
_log = 2


def _end_with(run: Callable[[], int]) -> None:
    code = 1
    try:
        code = run()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    global _log
    child = os.fork()
    if not child:
        os.setsid()
        _log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        out = os.open(asked["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(asked["folder"])
        if asked["first"]:
            exec(asked["first"], {})
        ctypes.CDLL(None).steps_arm(
            asked["folder"].encode(),
            _log,
            MODES.index(asked["mode"]),
            ctypes.c_long(asked["at"]),
            int(asked["group"]),
            asked["error"],
            asked["when"].encode(),
            f" {asked['what']} ".encode(),
        )
        _end_with(lambda: main(asked["words"], prog_name="kdpipe"))
    code = None
    with contextlib.suppress(ChildProcessError):
        while True:  # also for those that lost their parent
            pid, status = os.waitpid(-1, 0)
            if pid == child:
                code = os.waitstatus_to_exitcode(status)
    return {"code": code}


def _serve() -> None:
    "".encode("unicode-escape")  # jinja's, which somebody else may not be allowed to load
    gc.freeze()  # collecting what was imported would take longer than a try
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    for name, value in worker.DEFAULTS.items():
        os.environ.setdefault(name, value)
    runner.subprocess = SimpleNamespace(Popen=ForkedStage, DEVNULL=None)
    textualize.open_engine = evaluate.open_engine = open_stand_in
    teach.Scribe, loop.train_step = NotedScribe, noted_step
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        replies.write(json.dumps(_run(json.loads(line))) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
