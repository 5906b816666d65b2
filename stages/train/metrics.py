"""`train/metrics.jsonl`: one line for each logged step, in the order of the steps whatever interrupted them."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from kdpipe.data.files import write_atomically


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, up to one that is none: the last may have been torn by a crash."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                break
            if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < 1 << 53:
                break
            lines.append(line)
    return lines


def missing_watchers(log_to: Sequence[str]) -> list[str]:
    """One problem for each library of `train.log_to` that is not installed; imports none."""
    problems = []
    for name in log_to:
        found = importlib.util.find_spec(name)
        # A folder of that name, as Weights & Biases leaves behind, is found too, but holds no module.
        if found is None or found.origin is None:
            problems.append(f"train.log_to: {name} is not installed here. Run `pip install {name}`, or leave it out.")
    return problems


class MetricsFile:
    """Appends to a metrics file; a context manager.

    Args:
        path: the file.
        after: lines of later steps belong to work that is done anew, and are dropped.
        tmp: folder for unfinished files.
    """

    def __init__(self, path: Path, after: int, tmp: Path):
        kept = [line for line in read_metrics(path) if line["step"] <= after]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomically(path, lambda new: new.write_text(text, encoding="utf-8"), tmp)
        self._file = path.open("a", encoding="utf-8")

    def append(self, line: Mapping[str, Any]) -> None:
        """Writes one line and hands it to the operating system, so that a killed process leaves it behind.

        A line that tells of a skipped step is waited for until it is on the disk: these are counted after a crash.
        """
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if "skipped" in line:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:  # of the line that could not be written, which is said already
            if kind is None:
                raise
