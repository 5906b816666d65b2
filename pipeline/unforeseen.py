"""Errors nobody foresaw: a library's, of a damaged model file perhaps, or a mistake of ours."""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path

from kdpipe.pipeline.terminal import printable


def unforeseen(error: Exception) -> str:
    """One sentence for the user; the traceback goes to a file that the sentence names."""
    first = printable((str(error).splitlines() or [""])[0][:300])
    try:
        # Names of files that are no UTF-8 come with lone surrogates.
        with tempfile.NamedTemporaryFile(
            "w", prefix="kdpipe-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.write("".join(traceback.format_exception(error)))
        where = f"The traceback is in {Path(file.name)}."
    except OSError:
        where = "".join(traceback.format_exception(error))
    return f"{type(error).__name__}: {first}. What was committed is kept. {where}"
