"""Commands that are ended, or fail, at a chosen step; and what lies in a run folder before and after.

A step is a call that changes a file below the run folder or asks for it to be on the disk, in whatever library:
`steps.c` counts them. `Commands` runs `kdpipe` in forks of a warm process (`server.py`), so that a try takes a second
and not fifteen.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
NEVER_COMPARED = re.compile(r"locks/|tmp/(fingerprints\.sqlite|look\.npz|speed\.json|descriptions\.jsonl)$")
"""Files that are kept between runs and say how fast, not what; descriptions wait there for the next `textualize`."""


@dataclass(frozen=True)
class Step:
    """One step of a command.

    Attributes:
        number: counted from 1.
        kind: `create`, `write`, `truncate`, `fsync`, `rename`, `link`, `remove`, `mkdir`.
        path: below the run folder; after a rename.
        before: path before a rename.
    """

    number: int
    kind: str
    path: str
    before: str = ""

    @property
    def place(self) -> tuple[str, str]:
        """Kind and place, the same for steps that differ in ids and numbers alone."""
        path = re.sub(r"\.tmp\w{6}", ".tmp", self.path)
        path = re.sub(r"(?<=\.zarr/)[^c].*?(?=c/|zarr.json|$)", "ARRAY/", path)  # arrays of a part are all alike
        return self.kind, re.sub(r"[0-9a-f]{16,}|\d+", "#", path)


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: exit status; -9: killed.
        text: what it printed.
        steps: those it took.
        work: what was computed, one line for each unit.
    """

    code: int
    text: str
    steps: tuple[Step, ...]
    work: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """What happens at a step.

    Attributes:
        at: number of the step; 0: never.
        mode: `kill` before it, `tear` in the middle of it (a write is done by half), `fail` it and those after it, or
            `do` something first.
        group: end all processes of the command, not only the one that takes the step.
        error: of `fail`, an errno.
        when: of `do`, how "kind path" of the step begins, the first such; empty: it is number `at`.
        what: of `fail`, which kinds of steps; of `do`, words for a shell.
        first: Python code that the command's process runs before anything else.
    """

    at: int = 0
    mode: str = "count"
    group: bool = True
    error: int = 0
    when: str = ""
    what: str = "create write mkdir"
    first: str = ""


NONE = Fault()


class Commands:
    """Runs commands; a context manager.

    Args:
        folder: for the compiled counter and the log.
    """

    def __init__(self, folder: Path):
        library = folder / "steps.so"
        if not library.exists():
            command = ["cc", "-O1", "-shared", "-fPIC", "-o", str(library), str(HERE / "steps.c"), "-ldl"]
            subprocess.run(command, check=True)
        self._log, self._out = folder / "log", folder / "out"
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(HERE / "server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, run: Path, *words: str, fault: Fault = NONE) -> Ended:
        """Runs `kdpipe *words` in the folder `run`, which holds `kdpipe.yaml`."""
        for path in (self._log, self._out):
            path.unlink(missing_ok=True)
            path.touch()
        asked = {"words": words, "folder": str(run.resolve()), "log": str(self._log), "out": str(self._out)}
        asked |= {name: getattr(fault, name) for name in Fault.__dataclass_fields__}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        code = json.loads(self._process.stdout.readline())["code"]
        text = self._out.read_text(errors="replace")
        steps, work, before = [], [], ""
        for line in self._log.read_text(errors="replace").splitlines():
            number, kind, what = line.split(" ", 2)
            if kind == "work":
                work.append(what)
            elif kind == "from":
                before = what
            else:
                steps.append(Step(int(number), kind, what, before if kind == "rename" else ""))
        return Ended(code, text, tuple(steps), tuple(work))


def copy_of(run: Path, to: Path) -> Path:
    """A copy of a run folder, in place of what was at `to`."""
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(run, to, symlinks=True)
    return to


def contents(run: Path, below: str = "") -> dict[str, str]:
    """Digest of each file of a run folder by its path, `folder` for each empty folder; without what time decides."""
    found = {}
    for folder, folders, names in os.walk(run / below):
        for name in names:
            path = Path(folder, name)
            place = path.relative_to(run).as_posix()
            if not NEVER_COMPARED.match(place):
                found[place] = hashlib.sha256(_content(path)).hexdigest()[:16]
        if not folders and not names:
            found[Path(folder).relative_to(run).as_posix()] = "folder"
    found.pop("tmp", None)
    return found


def _content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name == "metrics.jsonl":
        clocked = {"seconds", "tokens_per_second", "data_wait", "peak_memory_gib"}
        whole = data[: data.rfind(b"\n") + 1]  # what a kill tore is no line
        lines = [{k: v for k, v in json.loads(line).items() if k not in clocked} for line in whole.splitlines()]
        return json.dumps(lines).encode()
    if path.name.startswith("shard-"):  # of a checkpoint, whose header has its fields in no fixed order
        return data[8 + int.from_bytes(data[:8], "little") :]
    return data


def difference(found: dict[str, str], expected: dict[str, str]) -> Sequence[str]:
    """The paths whose content differs, or that only one of the two has."""
    return sorted(path for path in {*found, *expected} if found.get(path) != expected.get(path))
