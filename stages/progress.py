"""One kind of progress bar for all stages: rate and time left, redrawn often on a terminal and seldom in a log."""

from __future__ import annotations

import sys

from tqdm import tqdm

_TERMINAL_SECONDS, _LOG_SECONDS = 0.5, 20.0


def progress(total: int, name: str, unit: str, done: int = 0, *, shown: bool = True) -> tqdm:
    """A bar on stderr.

    Args:
        total: how many there are.
        name: what is being done.
        unit: what is counted.
        done: how many were done before.
        shown: whether it is; of several processes one shows it.
    """
    seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(
        total=total,
        initial=done,
        desc=name,
        unit=unit,
        mininterval=seconds,
        miniters=1,
        dynamic_ncols=True,
        disable=not shown,
    )
