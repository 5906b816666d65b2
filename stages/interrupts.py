"""SIGINT in the process of a stage, to which one Ctrl-C may come twice.

A terminal sends SIGINT to all processes of its foreground group, so to the runner and to the stage; `kill -INT` sends
it to the runner alone. The runner cannot tell them apart and passes on either.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from time import monotonic
from types import FrameType
from typing import Any

Handler = Callable[[int, FrameType | None], Any] | int | None
"""What `signal.signal` takes and `signal.getsignal` gives."""

_APART_SECONDS = 1.0


class Interrupts:
    """A handler of SIGINT to which two within a second are one.

    Attributes:
        act: the handler that it calls.
    """

    def __init__(self, act: Handler = signal.default_int_handler):
        self.act = act
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = monotonic()
        if now - self._last >= _APART_SECONDS:
            self._last = now
            if callable(self.act):
                self.act(number, frame)


def handle(number: int, act: Handler) -> Handler:
    """Does what `signal.signal` does, and gives what it gives, but leaves `Interrupts` where they are in charge."""
    now = signal.getsignal(number)
    if not isinstance(now, Interrupts):
        return signal.signal(number, act)
    before, now.act = now.act, act
    return before
