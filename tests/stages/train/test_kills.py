"""`kill -9` at random moments of training: what goes on afterwards ends as the run that was never stopped.

KDPIPE_KILLS says how many moments are tried; the tests of a change try a few.
"""

from __future__ import annotations

import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .conftest import Run, story

KILLS = int(os.environ.get("KDPIPE_KILLS", "3"))
SETTINGS = {
    "epochs": 10,
    "checkpoint_steps": 1,
    "validation_fraction": 0.2,
    "validate_steps": 2,
    "export": "best",
}
CODE = """
import pickle, sys
run = pickle.loads(sys.stdin.buffer.read())
run.train()
"""


def _start(run: Run) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(run))
    process.stdin.close()
    process.stdin = None
    return process


def _training_began(run: Run, process: subprocess.Popen[bytes]) -> float:
    while not run.metrics and process.poll() is None:
        time.sleep(0.005)
    return time.monotonic()


def _content(path: Path) -> bytes:
    """Without the header of a checkpoint's file, whose fields safetensors writes in no fixed order."""
    data = path.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :] if path.name.startswith("shard-") else data


def _state(run: Run) -> dict[str, Any]:
    """All that a run leaves behind, but for what clock and machine say."""
    folder = run.ctx.folder("train")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    kept = {name: _content(path) for name, path in files.items() if path.suffix in (".safetensors", ".json")}
    return {"files": sorted(files), "bytes": kept, "metrics": story(run.metrics)}


def test_killed_at_random_and_resumed_is_the_run_that_was_never_stopped(cached: Any) -> None:
    setting = "all + acoustic + SFT"
    whole = cached(setting).elsewhere("never-killed", **SETTINGS)
    process = _start(whole)
    began = _training_began(whole, process)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out.decode()
    span = time.monotonic() - began
    expected = _state(whole)
    chance = random.Random(5)
    steps = []
    for number in range(KILLS):
        run = cached(setting).elsewhere(f"killed-{number}", **SETTINGS)
        process = _start(run)
        began = _training_began(run, process)
        time.sleep(chance.random() * span)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append((len(run.metrics), round(time.monotonic() - began, 2), process.returncode))
        out, _ = (process := _start(run)).communicate(timeout=300)
        assert process.returncode == 0, out.decode()
        assert _state(run) == expected, f"kill {number} after {steps[-1]}"
        shutil.rmtree(run.base / run.config.run.folder)
    print("lines of metrics, seconds, and how the process ended:", steps)
    assert any(code == -signal.SIGKILL for *_, code in steps)
