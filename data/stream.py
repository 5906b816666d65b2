"""The order in which samples are trained on, and loading them ahead of use.

The order of an epoch is a function of seed, epoch and digest alone: the parts are permuted; they are cut into windows
of `window_parts`; all samples of a window are permuted. The sequence is then cut into global batches: a batch takes
samples as long as their lengths sum to no more than the token budget, and a longer sample is a batch of its own.
Within a global batch samples stand from long to short (equal ones in their shuffled order), so that slices of it pad
little and ranks get like work. No batch spans two epochs.

A permutation sorts 64-bit draws of PCG64 seeded from a SHA-256, stably. Both are fixed algorithms, so that the order
stays what it is in later versions of numpy, whose `Generator.permutation` promises no such thing (NEP 19).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np

from kdpipe.data.errors import KdpipeError

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample to train on.

    Attributes:
        id: sample id.
        part: name of the part it is read from.
        length: tokens of its whole sequence.
    """

    id: str
    part: str
    length: int


@dataclass(frozen=True, slots=True)
class StreamState:
    """A place in a stream: the next global batch is number `batch` of `epoch` (both counted from 0).

    It holds for any number of ranks and threads.
    """

    digest: str
    seed: int
    epoch: int
    batch: int

    def as_dict(self) -> dict[str, Any]:
        """The state as JSON values; `StreamState(**values)` gives it back."""
        return asdict(self)


class Stream:
    """Global batches of sample ids over several epochs, and one rank's share of them.

    Iterating yields `(state, ids)`: the ids of this rank, `global batch[rank::world]` (none, where a batch has fewer
    samples than there are ranks), and the state to save once that batch is done: resuming from it gives the rest.

    Args:
        entries: the samples, in any order.
        digest: identifies the entries; a state of another digest is refused.
        seed: with the digest and the epoch it gives the order.
        batch_tokens: token budget of a global batch (sum of lengths).
        window_parts: parts whose samples are shuffled together.
        epochs: passes over the samples.
        rank: this process.
        world: number of processes.

    Raises:
        KdpipeError: there are no entries, or two have the same id.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        *,
        digest: str,
        seed: int,
        batch_tokens: int,
        window_parts: int,
        epochs: int,
        rank: int = 0,
        world: int = 1,
    ):
        if min(batch_tokens, window_parts, epochs, world) < 1 or not 0 <= rank < world:
            raise ValueError(
                f"batch_tokens {batch_tokens}, window_parts {window_parts}, epochs {epochs} and world {world} are at "
                f"least 1, and rank {rank} is below world"
            )
        self._entries = sorted(entries, key=lambda entry: (entry.part, entry.id))
        if not self._entries:
            raise KdpipeError("there is nothing to train on: every sample was rejected, or none is cached")
        if len({entry.id for entry in self._entries}) < len(self._entries):
            raise KdpipeError("two samples of the stream share an id; ids must be unique")
        starts = [i for i, e in enumerate(self._entries) if i == 0 or e.part != self._entries[i - 1].part]
        self._parts = [range(a, b) for a, b in zip(starts, [*starts[1:], len(self._entries)], strict=True)]
        self.digest = digest
        self.seed = seed
        self.epochs = epochs
        self._batch_tokens = batch_tokens
        self._window_parts = window_parts
        self._rank, self._world = rank, world
        self._start = StreamState(digest, seed, 0, 0)
        self._steps: dict[int, int] = {}

    def batches(self, epoch: int) -> list[list[str]]:
        """Global batches of an epoch (counted from 0), the same for every rank."""
        batches: list[list[int]] = []
        tokens = 0
        for index in self._order(epoch):
            length = self._entries[index].length
            if not batches or tokens + length > self._batch_tokens:
                batches.append([])
                tokens = 0
            batches[-1].append(index)
            tokens += length
        return [
            [self._entries[i].id for i in sorted(batch, key=lambda i: -self._entries[i].length)] for batch in batches
        ]

    def steps_in(self, epoch: int) -> int:
        """Global batches of an epoch; epochs differ a little, as each packs another order."""
        if epoch not in self._steps:
            self._steps[epoch] = len(self.batches(epoch))
        return self._steps[epoch]

    def total_steps(self, most: int | None = None) -> int:
        """Global batches in all epochs, or `most` if there are more; later epochs are then not looked at."""
        total = 0
        for epoch in range(self.epochs):
            total += self.steps_in(epoch)
            if most is not None and total >= most:
                return most
        return total

    def resume(self, state: StreamState) -> Stream:
        """Starts the next iteration at a saved state; returns this stream.

        Raises:
            KdpipeError: the state belongs to other samples, another seed, or lies past the end of an epoch.
        """
        if (state.digest, state.seed) != (self.digest, self.seed):
            raise KdpipeError(
                f"the checkpoint was made from samples {state.digest} with seed {state.seed}, and this run has samples "
                f"{self.digest} with seed {self.seed}. Restore them, or remove the checkpoint to start anew."
            )
        past = state.epoch == self.epochs and state.batch == 0
        if not past and not (0 <= state.epoch < self.epochs and 0 <= state.batch < self.steps_in(state.epoch)):
            raise KdpipeError(
                f"the checkpoint stands at batch {state.batch} of epoch {state.epoch}, which this run does not have ("
                f"{self.epochs} epochs). Remove the checkpoint to start anew."
            )
        self._start = state
        return self

    def __iter__(self) -> Iterator[tuple[StreamState, list[str]]]:
        first = self._start.batch
        for epoch in range(self._start.epoch, self.epochs):
            batches = self.batches(epoch)
            for number in range(first, len(batches)):
                done = number + 1 == len(batches)
                after = (epoch + 1, 0) if done else (epoch, number + 1)
                yield StreamState(self.digest, self.seed, *after), batches[number][self._rank :: self._world]
            first = 0

    def _order(self, epoch: int) -> Iterator[int]:
        """Indices of all entries in the order of an epoch."""
        seed = hashlib.sha256(f"kdpipe stream 1/{self.seed}/{epoch}/{self.digest}".encode()).digest()
        bits = np.random.PCG64(int.from_bytes(seed, "little"))

        def permutation(count: int) -> np.ndarray:
            return np.argsort(bits.random_raw(count), kind="stable")

        parts = permutation(len(self._parts))
        for start in range(0, len(parts), self._window_parts):
            window = [index for part in parts[start : start + self._window_parts] for index in self._parts[part]]
            for place in permutation(len(window)):
                yield window[place]


def prefetch(
    items: Iterable[Item], load: Callable[[Item], Loaded], *, depth: int, threads: int
) -> Generator[Loaded, None, None]:
    """Yields `load(item)` for each item, in order, loading up to `depth` items ahead.

    An error of `items` or `load` is raised where its result would have come. The threads are gone when the iterator is
    exhausted, fails, or is closed.

    Args:
        items: taken from the caller's thread.
        load: called from the threads.
        depth: results that may be loading or wait at once.
        threads: number of threads; 0 loads in the caller's thread when asked.
    """
    if threads < 1:
        for item in items:
            yield load(item)
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="kdpipe-prefetch")
    waiting: deque[Future[Loaded]] = deque()
    source = iter(items)
    try:
        more = True
        while more or waiting:
            while more and len(waiting) < max(depth, 1):
                try:
                    waiting.append(pool.submit(load, next(source)))
                except StopIteration:
                    more = False
                except Exception as error:
                    failed: Future[Loaded] = Future()
                    failed.set_exception(error)
                    waiting.append(failed)
                    more = False
            if waiting:
                yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
