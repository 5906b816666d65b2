"""Errors that no stage words itself: the system's, with a remedy, and those nobody foresaw."""

from __future__ import annotations

import errno
import tempfile
import traceback
from pathlib import Path

from kdpipe.pipeline.terminal import printable

_REMEDIES = {
    "free space on the disk of the run folder, or move it": (errno.ENOSPC, errno.EDQUOT),
    "make it readable and writable for this user (whose is it, and is its disk mounted read-only?)": (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ),
    "look after that disk (`dmesg` says more)": (errno.EIO,),
    "see who removed it": (errno.ENOENT, errno.ESTALE),
}


def of_the_system(error: OSError) -> str:
    """One sentence for the user about a file or disk: what is wrong, that nothing is lost, and the remedy."""
    remedy = next((text for text, numbers in _REMEDIES.items() if error.errno in numbers), "mend it")
    return f"{error}. What was committed is kept; {remedy}, and run the command again."


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
