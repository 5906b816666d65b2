"""Text for a terminal: nothing that could disturb it, in columns whatever the script."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Iterable

_FALLBACK_WIDTH = 100
_NAMED = 6


def terminal_width() -> int:
    """Columns of the terminal, or 100 where there is none."""
    return shutil.get_terminal_size((_FALLBACK_WIDTH, 24)).columns


def visible(text: str) -> str:
    """The text on one line: spaces as `·`, line ends as `⏎`, all else that does not print, or cannot here, escaped."""
    shown = "".join(_VISIBLE.get(char) or (char if char.isprintable() else _escaped(char)) for char in text)
    encoding = sys.stdout.encoding or "ascii"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str) -> str:
    """The text with what does not print escaped; spaces stay."""
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


_VISIBLE = {" ": "·", "\n": "⏎"}


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def columns_of(text: str) -> int:
    """Columns that a printable text takes: two for a wide character, none for a combining one."""
    return sum(_columns(char) for char in text)


def _columns(char: str) -> int:
    if unicodedata.combining(char):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def fitted(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly `width` columns: filled up with spaces, or cut with `…`."""
    if columns_of(text) > width:
        kept, room = "", width - 1
        for char in text:
            room -= _columns(char)
            if room < 0:
                break
            kept += char
        text = kept + "…"
    space = " " * (width - columns_of(text))
    return space + text if right else text + space


def names(ids: Iterable[str], most: int = _NAMED) -> str:
    """The first of some sample ids, and how many more there are."""
    found = list(ids)
    shown = ", ".join(printable(one) if len(one) <= 60 else f"{printable(one[:57])}..." for one in found[:most])
    return shown + (f" and {len(found) - most} more" if len(found) > most else "")
