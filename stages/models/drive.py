"""Many items through one engine at once, each through as many requests as it asks for.

Items are prepared (their clips decoded) by threads, a bounded distance ahead of the engine; everything else happens
in the caller's thread.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from kdpipe.data.errors import Rejected
from kdpipe.stages.models.engine import Completion, Engine, Request

T = TypeVar("T")

_DECODE_THREADS = min(4, os.cpu_count() or 1)
_DECODED_AHEAD = 16  # clips: a minute of audio is 4 MB


def drive(
    engine: Engine | None,
    items: Iterable[T],
    *,
    prepare: Callable[[T], object],
    advance: Callable[[T, Completion | None], Request | None],
    reject: Callable[[T, Rejected], None],
) -> None:
    """Takes items through the engine, many at once, each through as many requests as it asks for.

    Args:
        engine: None when no item will ask for anything.
        items: started in this order; finished in any.
        prepare: called for each item in a thread, ahead of the engine; may raise `Rejected`.
        advance: called with None when an item is prepared and with the completion of each of its requests; gives the
            next request, or None when the item is done; may raise `Rejected`.
        reject: called in place of anything further for an item that was rejected.
    """
    running: dict[str, T] = {}

    def follow(item: T, completion: Completion | None) -> None:
        try:
            request = advance(item, completion)
            if request is not None:
                assert engine is not None, "an item asked for an engine that was not opened"
                running[engine.submit(request)] = item
        except Rejected as rejected:
            reject(item, rejected)

    with _Ahead(items, prepare) as ahead:
        while True:
            while engine is None or len(running) < engine.capacity:
                prepared = ahead.take(wait=not running)
                if prepared is None:
                    break
                item, rejected = prepared
                if rejected is None:
                    follow(item, None)
                else:
                    reject(item, rejected)
            if not running:
                return
            assert engine is not None
            for name, result in engine.step():
                item = running.pop(name)
                if isinstance(result, Rejected):
                    reject(item, result)
                else:
                    follow(item, result)


class _Ahead(Generic[T]):
    """Runs `work` on items in threads, a bounded number ahead, and hands them out in order."""

    def __init__(self, items: Iterable[T], work: Callable[[T], object]):
        self._items = iter(items)
        self._work = work
        self._waiting: deque[tuple[T, Future[Rejected | None]]] = deque()

    def __enter__(self) -> _Ahead[T]:
        self._pool = ThreadPoolExecutor(_DECODE_THREADS, thread_name_prefix="kdpipe-decode")
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def take(self, *, wait: bool) -> tuple[T, Rejected | None] | None:
        """The next item and its rejection if it has one; None when there is none left, or none ready and no wait."""
        while len(self._waiting) < _DECODED_AHEAD:
            try:
                item = next(self._items)
            except StopIteration:
                break
            self._waiting.append((item, self._pool.submit(self._attempt, item)))
        if not self._waiting or not (wait or self._waiting[0][1].done()):
            return None
        item, future = self._waiting.popleft()
        return item, future.result()

    def _attempt(self, item: T) -> Rejected | None:
        try:
            self._work(item)
        except Rejected as rejected:
            return rejected
        return None
