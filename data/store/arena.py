"""Memory that is used again for each batch: what a store reads into, in place of fresh arrays.

Fresh memory costs more than the reading does (the system clears each page first), and only pinned memory can be copied
to a GPU while it computes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes, a cache line


class Arena:
    """Arrays one after the other in one buffer, all given back at once.

    Args:
        pinned: take page-locked memory, from which a GPU copies while it computes; needs CUDA.
    """

    def __init__(self, *, pinned: bool = False):
        self._pinned = pinned
        self._buffer = np.empty(0, np.uint8)
        self._used = 0
        self._wanted = 0

    @property
    def size(self) -> int:
        """Bytes of the buffer."""
        return len(self._buffer)

    def take(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        """An array of unset values, valid until `reset`.

        What does not fit into the buffer gets memory of its own; the buffer grows at the next `reset`.
        """
        kind = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        start = -(-self._used // _ALIGNMENT) * _ALIGNMENT
        self._wanted = -(-self._wanted // _ALIGNMENT) * _ALIGNMENT + size
        if start + size > len(self._buffer):
            return np.empty(shape, kind)
        self._used = start + size
        return self._buffer[start : start + size].view(kind).reshape(shape)

    def reset(self) -> None:
        """Takes all arrays back; who still holds one sees it overwritten."""
        if self._wanted > len(self._buffer):
            self._buffer = self._allocate(self._wanted + self._wanted // 4)
        self._used = self._wanted = 0

    def _allocate(self, size: int) -> np.ndarray:
        if not self._pinned:
            raw = np.empty(size + _ALIGNMENT, np.uint8)
            first = -raw.ctypes.data % _ALIGNMENT
            return raw[first : first + size]
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


class Ring:
    """Arenas that go round: as many as there are batches in flight. Safe to use from several threads.

    Args:
        pinned: as `Arena`.
    """

    def __init__(self, *, pinned: bool = False):
        self._pinned = pinned
        self._free: list[Arena] = []
        self._lock = threading.Lock()

    def acquire(self) -> Arena:
        """An arena that nobody uses."""
        with self._lock:
            return self._free.pop() if self._free else Arena(pinned=self._pinned)

    def release(self, arena: Arena) -> None:
        """Gives an arena back, when nothing reads its arrays any more."""
        arena.reset()
        with self._lock:
            self._free.append(arena)
