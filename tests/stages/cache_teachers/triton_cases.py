"""The Triton kernel of teachers' output heads against PyTorch; run by test_head_triton.py."""

from __future__ import annotations

import os

import pytest
import torch

from kdpipe.stages.cache_teachers import head, head_triton

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0, 0.5)])
@pytest.mark.parametrize(("rows", "pieces"), [(3, 1), (2, 63), (2, 64), (3, 130), (0, 5)])
def test_equals_pytorch(rows: int, pieces: int, temperatures: tuple[float, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = 10 * torch.randn(rows, 32 * pieces + 7, generator=generator)
    logits = wide[:, 3 : 3 + 32 * pieces].unflatten(1, (32, pieces))
    if pieces > 1 and rows:
        logits[0, :, 1] = -torch.inf
        logits[1, 3:, 0] = -torch.inf
        logits[1, :, pieces - 1] -= 3e4
    want = torch.empty(rows, 1 + len(temperatures), pieces, dtype=torch.float64)
    exact = logits.double()
    if rows:
        head._summed(exact, temperatures, want[:, 0], want[:, 1:])
    got = torch.full((rows, 1 + len(temperatures), pieces + 2), torch.nan, device=DEVICE)
    head_triton.summed(logits.to(DEVICE), temperatures, got[:, 0, 1:-1], got[:, 1:, 1:-1])
    assert got[:, :, [0, -1]].isnan().all(), "nothing beside is written"
    torch.testing.assert_close(got[:, :, 1:-1].cpu().double(), want, rtol=1e-6, atol=1e-5)


def test_nan_is_seen() -> None:
    logits = torch.zeros(1, 32, 2, device=DEVICE)
    logits[0, 5, 1] = torch.nan
    out = torch.empty(1, 2, 2, device=DEVICE)
    head_triton.summed(logits, (1.0,), out[:, 0], out[:, 1:])
    assert out[0, 1, 0].isfinite() and not torch.logsumexp(out[0, 1], 0).isfinite()
