"""Parts written in a thread of their own, while the teacher goes on with the next batch.

Memory is bounded: as many batches wait to be written as `_WAITING` says. Parts are committed in the order in which they
are begun, and what was committed stays when anything fails.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from kdpipe.data.ledger import Ledger
from kdpipe.data.manifest import Sample
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers.capture import Job
from kdpipe.stages.cache_teachers.parts import PartBuilder, building
from kdpipe.stages.cache_teachers.shape import Shape

_WAITING = 2


class Recorder:
    """Takes the arrays of jobs and commits parts; a context manager.

    Leaving the block waits for all that was begun; leaving it by an exception throws the part in flight away. An error
    of the thread is raised by a later call, at the latest by leaving the block.

    Args:
        ctx: the run.
        ledger: takes the parts. Others may read it meanwhile; who commits to it first calls `wait`.
        source: whose units these are.
    """

    def __init__(self, ctx: Context, ledger: Ledger, source: str):
        self._ctx = ctx
        self._ledger = ledger
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kdpipe-write")
        self._waiting: deque[Future[None]] = deque()
        self._stack = ExitStack()
        self._part: PartBuilder | None = None

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._stack.close()

    def begin(self, shape: Shape) -> None:
        """Begins a part."""
        self._later(lambda: self._begin(shape))

    def add(self, jobs: Sequence[Job], arrays: Callable[[], Sequence[Mapping[str, np.ndarray]]]) -> None:
        """Adds units to the part.

        Args:
            jobs: one a unit.
            arrays: gives the arrays of each; called in the thread.
        """
        self._later(lambda: self._add(jobs, arrays))

    def commit(self, heard: Iterable[Sample], attributes: Callable[[], Mapping[str, Any]]) -> None:
        """Finishes the part and takes it into the ledger.

        Args:
            heard: whose clips were read; refused if one changed meanwhile.
            attributes: gives what is known only now; called in the thread.
        """
        self._later(lambda: self._commit(heard, attributes))

    def wait(self) -> None:
        """Waits until all that was asked for is done."""
        while self._waiting:
            self._waiting.popleft().result()

    def _later(self, work: Callable[[], None]) -> None:
        self._waiting.append(self._pool.submit(work))
        while len(self._waiting) > _WAITING:
            self._waiting.popleft().result()

    def _begin(self, shape: Shape) -> None:
        self._part = self._stack.enter_context(
            building(
                self._ctx,
                self._ledger,
                self._source,
                shape.arrays,
                shape.attributes,
                shape.cover,
                shape.constants,
            )
        )

    def _add(self, jobs: Sequence[Job], arrays: Callable[[], Sequence[Mapping[str, np.ndarray]]]) -> None:
        assert self._part is not None
        for job, mine in zip(jobs, arrays(), strict=True):
            self._part.add(job.wants, mine)

    def _commit(self, heard: Iterable[Sample], attributes: Callable[[], Mapping[str, Any]]) -> None:
        assert self._part is not None
        self._part.commit(heard, attributes=attributes())
        self._stack.close()
