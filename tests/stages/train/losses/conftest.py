"""What the tests of the losses share."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """The largest tensor that any operation returned, and how many matrix products there were."""

    def __init__(self):
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.name().startswith(("aten::mm", "aten::addmm"))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return result


@pytest.fixture
def recorder() -> type[Recorder]:
    """Watches the operations in its context."""
    return Recorder


@pytest.fixture
def poisoned_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote reads as NaN."""

    def poisoned(make):
        def made(*args, **kwargs):
            buffer = make(*args, **kwargs)
            return buffer.fill_(torch.nan) if buffer.is_floating_point() else buffer

        return made

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
