"""Requests in an engine that may die: which go in when, and which of them is found to kill it.

A dead engine does not say which request killed it, if any did. So those that were in it are suspects, and go into the
next engine by themselves, the older half first. A half that is answered is innocent, and the older half of the rest
comes next; a half with which the engine dies holds the killer, is halved in its turn, and the others are no suspects
any more. So the killer among n is alone after at most log2(n) halves, rounded up, and only those with which the engine
dies cost a start. Alone it has to kill the engine twice: anything may end a process once.

A request that did so is given up when another one is answered after it, or none is left to ask. Until then it may be
the engine that is broken and dies of everything, and the restarts count. Those that found a request which is given up
do not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

ENGINE_DIED = "engine_died"
"""Reason under which a sample is rejected that kills the engine."""


class Flight(Generic[T]):
    """Requests by name from being asked to being answered, over the lives of an engine.

    Attributes:
        restarts: deaths of the engine, without those that found a request which was given up.
        answered: whether any request was answered.
    """

    def __init__(self) -> None:
        self.restarts = 0
        self.answered = False
        self._asked: dict[str, T] = {}
        self._inside: set[str] = set()
        self._suspects: list[str] = []
        self._killed_alone: str | None = None
        self._spent = 0  # restarts since there are suspects
        self._killers: dict[str, int] = {}  # and the restarts that it took to find each
        self._is_proven = False  # the engine can answer, and dies of the killers all the same

    def ask(self, name: str, request: T) -> None:
        """Takes a request in; `due` says when it goes into the engine."""
        self._asked[name] = request

    def due(self) -> Iterator[tuple[str, T]]:
        """Requests that go into the engine now; each counts as inside from when it is given out."""
        if not self._suspects:
            names = [name for name in self._asked if name not in self._inside and name not in self._killers]
        elif not self._inside:
            names = self._suspects[: (len(self._suspects) + 1) // 2]
        else:
            names = []
        for name in names:
            self._inside.add(name)
            yield name, self._asked[name]

    def answer(self, name: str) -> None:
        """A living engine answered a request, whatever it said."""
        self.answered = True
        self._is_proven = bool(self._killers)
        self.drop(name)

    def drop(self, name: str) -> None:
        """A request is of no interest any more."""
        self._asked.pop(name, None)
        self._killers.pop(name, None)
        self._inside.discard(name)
        if name in self._suspects:
            self._suspects.remove(name)
            if not self._suspects:
                self._spent = 0

    def die(self) -> str:
        """The engine died: counts it, and chooses the suspects.

        Returns:
            How many were inside, and what becomes of them.
        """
        inside = [name for name in self._asked if name in self._inside]
        self._inside.clear()
        self.restarts += 1
        if inside:
            self._suspects = inside
        if self._suspects:
            self._spent += 1
        if not inside:
            return "with no sample in it"
        if len(inside) > 1:
            return f"with {len(inside)} samples in it, which are tried again in groups, since one of them may kill it"
        if self._killed_alone != inside[0]:
            self._killed_alone = inside[0]
            return "with one sample in it, which is tried again by itself"
        self._killers[inside[0]] = self._spent
        self._suspects, self._spent, self._is_proven = [], 0, False
        return "with the same sample alone in it again, which is rejected as soon as another gets through"

    def give_up(self) -> list[str]:
        """Requests that kill the engine, once that is certain; they are dropped, and their restarts do not count."""
        killers = dict(self._killers)
        if not killers or not (self._is_proven or len(killers) == len(self._asked)):
            return []
        for name, restarts in killers.items():
            self.restarts -= restarts
            self.drop(name)
        return list(killers)
