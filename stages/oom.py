"""How torch says that it got no memory."""

from __future__ import annotations

import torch

_ALLOCATION = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
"""What torch says in a plain RuntimeError when the CPU's allocator, a driver or cuBLAS gets no memory."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated, on a GPU or for the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATION)
