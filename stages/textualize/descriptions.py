"""Descriptions on their way to the tracer, when another model writes the traces.

Two models are never in memory together, so all clips are described before the first trace is written. The
descriptions wait in a file of JSON lines, which also spares them when the run is interrupted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from kdpipe.data.files import naming


@dataclass(frozen=True)
class Description:
    """A clip in words, and what it took.

    Attributes:
        text: the description, not empty.
        prompt_tokens: length of the request's prompt, audio included; None when the manifest brought the text.
        completion_tokens: length of the text in tokens, end token included; None likewise.
        finish_reason: `stop` or `length`; None likewise.
    """

    text: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None

    @property
    def is_whole(self) -> bool:
        """Whether all of it is of its kind, as it may not be where it was read from a damaged file."""
        counts = (self.prompt_tokens, self.completion_tokens)
        return (
            isinstance(self.text, str)
            and bool(self.text.strip())
            and all(count is None or (type(count) is int and 0 <= count < 1 << 63) for count in counts)
            and (self.finish_reason is None or isinstance(self.finish_reason, str))
        )


class Descriptions:
    """A file of descriptions by key, appended to as they come.

    Args:
        path: the file; what an interrupted run left in it is read, a torn last line left out.
    """

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, Description] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    record = json.loads(line)
                    key = record.pop("key")
                    found = Description(**record)
                except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                    continue
                if isinstance(key, str) and found.is_whole:
                    self._known[key] = found

    def __enter__(self) -> Descriptions:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n")  # closes a torn line
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with naming(self._path):
                self._file.close()
        except OSError:  # of a line that could not be written, which is said already
            if kind is None:
                raise
        if kind is None:
            self._path.unlink(missing_ok=True)

    def get(self, key: str) -> Description | None:
        """The description of a key, or None."""
        return self._known.get(key)

    def add(self, key: str, description: Description) -> None:
        """Remembers a description."""
        self._known[key] = description
        with naming(self._path):
            self._file.write(json.dumps({"key": key, **asdict(description)}) + "\n")
            self._file.flush()
