"""What the tests of the losses share."""

from __future__ import annotations

import pytest
import torch


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
