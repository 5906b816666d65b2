"""The manifest: which clips, which questions. Read whole and checked at once, without touching any clip.

Formats: JSON lines, CSV, Parquet, and a folder written by Hugging Face `save_to_disk`. Columns: `id`, `audio`,
`question`; optional `choices`, `answer`, `task`, `split`, `start`, `end` (seconds), `trace`, `response`,
`description`; all others are carried through. Paths are relative to the folder in which the manifest lies.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from kdpipe.data.answers import is_choice
from kdpipe.data.errors import Rejected
from kdpipe.data.hashing import RACY_NS, Stat, stat_of
from kdpipe.data.manifest_rows import Problems, kind, read_rows

DEFAULT_SPLIT = "train"
"""The split of rows that name none."""

_TEXT_COLUMNS = ("answer", "task", "split", "trace", "response", "description")
_NO_EXTRA: Mapping[str, Any] = {}
_COLUMNS = frozenset(("id", "audio", "question", "choices", "start", "end", *_TEXT_COLUMNS))


@dataclass(frozen=True, slots=True)
class AudioRef:
    """Where the bytes of one clip are. Neither `path` nor `data` when the row has no audio.

    Attributes:
        path: the file, its existence unchecked.
        data: the content itself.
        name: what the manifest calls it, for messages.
    """

    path: Path | None
    data: bytes | None
    name: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of the manifest.

    Attributes:
        id: unique name.
        audio: the clips the question is about; at least one entry.
        question: the question; empty when the row has none (see `check_sample`).
        choices: the answers to choose from; empty for a free-form question.
        answer: the right answer, where known.
        task: kind of task (aqa, ser, asr, ...).
        split: the split it belongs to; None counts as `train`.
        start: begin of the range to hear, in seconds.
        end: end of the range to hear, in seconds.
        trace: an existing reasoning trace.
        response: the response that belongs to the trace.
        description: an existing description of the audio.
        extra: all other columns.
    """

    id: str
    audio: tuple[AudioRef, ...]
    question: str
    choices: tuple[str, ...]
    answer: str | None
    task: str | None
    split: str | None
    start: float | None
    end: float | None
    trace: str | None
    response: str | None
    description: str | None
    extra: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """All samples, in the order of the file.

    Attributes:
        path: the file or folder that was read.
        samples: its rows.
        stat: what the file was when it was read; None for a folder, and where this would not tell it from a later one.
    """

    path: Path
    samples: tuple[Sample, ...]
    stat: Stat | None = None

    def is_current(self) -> bool:
        """Whether reading it again would surely give the same rows."""
        return self.stat is not None and self.stat == _settled(self.path)

    def select(self, split: str) -> tuple[Sample, ...]:
        """The samples of one split, in order; rows without a split belong to `train`."""
        return tuple(sample for sample in self.samples if (sample.split or DEFAULT_SPLIT) == split)

    @cached_property
    def by_id(self) -> Mapping[str, Sample]:
        """The samples by their id."""
        return {sample.id: sample for sample in self.samples}


def load_manifest(path: Path, *, allow_outside: bool = False) -> Manifest:
    """Read and check a manifest.

    Args:
        path: a `.jsonl`, `.json` (one object a line), `.csv` or `.parquet` file, or a folder written by `save_to_disk`
            of a Hugging Face `Dataset` or `DatasetDict` (whose keys name the splits, unless there is a column).
        allow_outside: accept audio paths that lead out of the folder in which the manifest lies.

    Returns:
        The manifest. Clips are not opened; rows are not checked for what `check_sample` checks.

    Raises:
        ManifestError: everything that is wrong with it, each problem with its file and line (Parquet and datasets: row,
            counted from 1), the first 20 in words.
    """
    path = Path(path)
    stat, problems = _settled(path), Problems()
    samples: list[Sample] = []
    first_seen: dict[str, str] = {}
    folder = _Folder(path, allow_outside)
    for where, row in read_rows(path, problems):
        sample = _sample(row, where, folder, problems)
        if sample is None:
            continue
        earlier = first_seen.setdefault(sample.id, where)
        if earlier is not where:
            problems.add(where, f"id {sample.id!r} stands already at {earlier}: every row needs an id of its own")
        samples.append(sample)
    if not samples and not problems.texts:
        problems.add(str(path), "the manifest holds no samples")
    problems.raise_any()
    return Manifest(path, tuple(samples), stat)


def _settled(path: Path) -> Stat | None:
    """What a file is now; None for what is no file, or was written a moment ago."""
    try:
        stat = stat_of(path)
    except OSError:
        return None
    return stat if path.is_file() and time.time_ns() - max(stat[1], stat[2]) > RACY_NS else None


def check_sample(sample: Sample) -> None:
    """Reject a sample that cannot be used, though the manifest is sound.

    Args:
        sample: a row of a loaded manifest.

    Raises:
        Rejected: `question_missing`, or `answer_not_in_choices` (compared as `kdpipe.data.answers.equal` does).
    """
    if not sample.question.strip():
        raise Rejected("question_missing", "the row has no question")
    if sample.choices and sample.answer is not None and not is_choice(sample.answer, sample.choices):
        listed = ", ".join(repr(choice) for choice in sample.choices)
        raise Rejected("answer_not_in_choices", f"the answer {sample.answer!r} is none of the choices {listed}")


class _Folder:
    """The folder in which a manifest lies, and whether a path leads out of it.

    A relative path without `..` leads out only through a symbolic link. The links of each folder are listed once, so
    that 100,000 rows cost no system call each; only a path that meets a link is resolved.
    """

    def __init__(self, manifest: Path, allow_outside: bool) -> None:
        self.root = str(manifest.absolute().parent)
        self._real = os.path.realpath(self.root)
        self._allow_outside = allow_outside
        self._links: dict[str, frozenset[str]] = {}
        self._parents: dict[str, Path] = {}
        self._clips: dict[str, AudioRef] = {}

    def clip(self, name: str) -> AudioRef:
        """The clip `name`, one object for all rows that are about it."""
        if name not in self._clips:
            self._clips[name] = AudioRef(self.join(name), None, name)
        return self._clips[name]

    def join(self, name: str) -> Path:
        """The path of `name`; each parent is parsed once, since pathlib takes longer than all the rest of a row."""
        cut = name.rfind("/") + 1
        parent, last = name[:cut], name[cut:]
        folder = self._parents.get(parent)
        if folder is None:
            folder = self._parents[parent] = Path(self.root, parent)
        return folder / last

    def holds(self, name: str) -> bool:
        """Whether `name`, relative to the folder, stays in it once resolved; always true when that is not asked."""
        if self._allow_outside:
            return True
        parts = name.split("/")
        if not name.startswith("/") and ".." not in parts and not self._meets_link(parts):
            return True
        target = os.path.realpath(os.path.join(self.root, name))
        return os.path.commonpath((target, self._real)) == self._real

    def _meets_link(self, parts: list[str]) -> bool:
        folder = self.root
        for part in parts:
            if part in self._links_in(folder):
                return True
            folder = f"{folder}/{part}"
        return False

    def _links_in(self, folder: str) -> frozenset[str]:
        links = self._links.get(folder)
        if links is None:
            try:
                with os.scandir(folder) as entries:
                    links = frozenset(entry.name for entry in entries if entry.is_symlink())
            except OSError:  # not there: its clips are missing, which decoding finds
                links = frozenset()
            self._links[folder] = links
        return links


def _sample(row: dict[str, Any], where: str, folder: _Folder, problems: Problems) -> Sample | None:
    """Check one row. Returns None where it has no usable id; its other faults are in `problems` alone."""
    identifier = row.get("id")
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    if identifier is None or identifier == "":
        problems.add(where, "there is no id")
        return None
    if not isinstance(identifier, str):
        problems.add(where, f"id is {kind(identifier)}: it must be text or a whole number")
        return None
    for column, value in row.items():
        if isinstance(value, str) and column != "audio" and (fault := _fault(value)):
            problems.add(where, f"{column} {fault}")
    start, end = _seconds(row, "start", where, problems), _seconds(row, "end", where, problems)
    if start is not None and end is not None and end <= start:
        problems.add(where, f"end ({end:g} s) must lie behind start ({start:g} s)")
    audio = row.get("audio")
    clips = audio if isinstance(audio, list) and audio else [None if audio == [] else audio]
    return Sample(
        id=identifier,
        audio=tuple(_audio(clip, identifier, where, folder, problems) for clip in clips),
        question=_text(row, "question", where, problems) or "",
        choices=_choices(row, where, problems),
        **{column: _text(row, column, where, problems) for column in _TEXT_COLUMNS},
        start=start,
        end=end,
        extra={column: value for column, value in row.items() if column not in _COLUMNS} or _NO_EXTRA,
    )


def _audio(clip: Any, identifier: str, where: str, folder: _Folder, problems: Problems) -> AudioRef:
    name = f"the audio of sample {identifier!r}"
    if isinstance(clip, dict) and clip.keys() & {"bytes", "path"}:
        data, path = clip.get("bytes"), clip.get("path")
        if isinstance(data, bytes) and isinstance(path, str) and path:
            name = path
        if data is None or isinstance(data, bytes):
            clip = path if data is None else data
    if clip is None or clip == "":
        return AudioRef(None, None, name)
    if isinstance(clip, bytes):
        return AudioRef(None, clip, name)
    if not isinstance(clip, str):
        problems.add(where, f"audio is {kind(clip)}: it must be a path, a list of paths, or bytes")
    elif fault := _fault(clip):
        problems.add(where, f"audio {fault}")
    elif not folder.holds(clip):
        problems.add(
            where,
            f"audio {clip!r} leaves the manifest's folder {folder.root}: move the clip there, "
            "or allow it with `data.allow_outside: true`",
        )
    else:
        return folder.clip(clip)
    return AudioRef(None, None, name)


def _choices(row: dict[str, Any], where: str, problems: Problems) -> tuple[str, ...]:
    value = row.get("choices")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(choice, str) for choice in value):
        problems.add(where, f"choices is {_kind_of_list(value)}: it must be a list of texts")
        return ()
    for choice in value:
        fault = "is blank" if not choice.strip() else _fault(choice)
        if fault:
            problems.add(where, f"one of the choices {fault}")
    return tuple(value)


def _text(row: dict[str, Any], column: str, where: str, problems: Problems) -> str | None:
    value = row.get(column)
    if value is None or isinstance(value, str):
        return value if value and not value.isspace() else None
    problems.add(where, f"{column} is {kind(value)}: it must be one text")
    return None


def _seconds(row: dict[str, Any], column: str, where: str, problems: Problems) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        problems.add(where, f"{column} is {kind(value)}: it must be a number of seconds")
    elif not 0 <= value <= sys.float_info.max:
        problems.add(where, f"{column} is {value}: it must be a finite number of seconds, not below 0")
    else:
        return float(value)
    return None


def _fault(text: str) -> str | None:
    if "\0" in text:
        return "holds a NUL byte"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "is not valid Unicode (UTF-8)"
    return None


def _kind_of_list(value: Any) -> str:
    if not isinstance(value, list):
        return kind(value)
    return f"a list with {', '.join(sorted({kind(item) for item in value}))}"
