"""Reading published files item by item, and finding clips; every fault is collected with its place."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from kdpipe.data.manifest_rows import Problems, csv_rows, kind


def read_items(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """The items of a published file.

    Args:
        path: `.json` or `.jsonl`, a list of objects or one object a line; or `.csv` with a header.
        problems: takes what cannot be read.

    Yields:
        The item's place (`file:line`, or `file row N`, from 1, in a list) and its fields.
    """
    readers = {".json": _json_items, ".jsonl": _json_items, ".csv": csv_rows}
    reader = readers.get(path.suffix.lower())
    if not path.is_file():
        problems.add(str(path), "no such file")
    elif reader is None:
        problems.add(str(path), "unknown format: use .json, .jsonl or .csv")
    else:
        try:
            yield from reader(path, problems)
        except OSError as error:
            problems.add(str(path), f"cannot be read ({error.strerror})")


def _json_items(path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add(path.name, f"is not UTF-8 (byte {error.start})")
        return
    if text.lstrip().startswith("["):
        values = _parsed(text, path.name, problems)
        places = [(f"{path.name} row {number}", value) for number, value in enumerate(values or [], 1)]
    else:
        lines = [(f"{path.name}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        places = [(where, _parsed(line, where, problems)) for where, line in lines]
    for where, value in places:
        if isinstance(value, dict):
            yield where, value
        elif value is not _BROKEN:
            problems.add(where, f"is {kind(value)}: each item must be one JSON object")


_BROKEN: list[Any] = []


def _parsed(text: str, where: str, problems: Problems) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        problems.add(where, f"is not JSON: {error.msg} at {place}")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, endless nesting
        problems.add(where, f"is not JSON that can be read: {error}")
    return _BROKEN


class Fields:
    """One item's fields, taken as texts; what is missing or no text becomes a problem."""

    def __init__(self, where: str, item: dict[str, Any], problems: Problems):
        self.where, self.item, self._problems = where, item, problems

    def text(self, key: str) -> str:
        """A text that must be there; the empty text, and a problem, where it is not."""
        known = len(self._problems.texts)
        value = self.optional(key)
        if value is None and len(self._problems.texts) == known:
            self._problems.add(self.where, f"{key} is missing")
        return value or ""

    def optional(self, key: str) -> str | None:
        """A text, or a number as text; None where it is missing, null or blank."""
        value = self.item.get(key)
        if self._refused(key):
            self._problems.add(self.where, f"{key} is {kind(value)}: it must be one text")
            return None
        return self._sound(key, as_text(value))

    def label(self, key: str) -> str | None:
        """A text, or a list of texts joined by ` + `, or None: MMAU gives 13 of its items several categories."""
        value = self.item.get(key)
        if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
            return self._sound(key, " + ".join(value))
        return self.optional(key)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts that must be there, at least one."""
        value = self.item.get(key)
        found = [as_text(one) for one in value] if isinstance(value, list) else []
        if not found or any(one is None for one in found):
            what = "missing" if value is None else "an empty list" if value == [] else kind(value)
            what = "a list with blanks or of other things" if isinstance(value, list) and value else what
            self._problems.add(self.where, f"{key} is {what}: it must be a list of texts")
            return ()
        return tuple(self._sound(key, one) or "" for one in found if one is not None)

    def _refused(self, key: str) -> bool:
        value = self.item.get(key)
        return value is not None and (isinstance(value, bool) or not isinstance(value, str | int | float))

    def _sound(self, key: str, text: str | None) -> str | None:
        if text is not None and ("\0" in text or not _is_unicode(text)):
            self._problems.add(self.where, f"{key} is not valid text (NUL bytes, or not UTF-8)")
            return None
        return text


def as_text(value: Any) -> str | None:
    """A text, or a number as text; None for what is blank or of another kind."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    text = str(value)
    return text if text.strip() else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def clip_name(path: str) -> str:
    """A published path without what leads to a root or upwards: `/data/../x/a.wav` is `data/x/a.wav`."""
    parts = [part for part in PurePosixPath(path.replace("\\", "/")).parts if part not in ("/", ".", "..")]
    return "/".join(parts)


def stem(path: str) -> str:
    """The file name without its ending."""
    return PurePosixPath(path).stem


def locate(folder: Path, names: Sequence[str]) -> Path | None:
    """The first clip that is there.

    Args:
        folder: the folder of clips.
        names: places of one clip below it (`clip_name`). Each is tried as it is, then without its first folder, and
            so on down to the bare file name, because published paths start at somebody else's folder.

    Returns:
        Its path; None where no file is there.
    """
    for name in names:
        parts = name.split("/")
        for start in range(len(parts)):
            path = folder.joinpath(*parts[start:])
            try:
                if path.is_file():
                    return path
            except (OSError, ValueError):  # a name that the file system cannot hold
                continue
    return None
