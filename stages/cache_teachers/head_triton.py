"""What `head` takes of a tile of logits, as a Triton kernel that reads it once; PyTorch would pass over it six times.

Shape suffixes as in `head`: R rows, C columns a piece, p pieces, T temperatures.
"""

# Triton's own language: pointers and constants have no useful Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

_PIECES = 64


@triton.jit
def _summed_kernel(
    logits_ptr, temperature_ptr, peak_ptr, sum_ptr, pieces, logits_row, peak_row, sum_row, sum_t,
    T: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1) * PIECES + tl.arange(0, PIECES)
    inside = piece < pieces
    place = tl.arange(0, C)[:, None] * pieces + piece[None, :]
    z = tl.load(logits_ptr + row * logits_row + place, mask=inside[None, :], other=float("-inf"))
    peak = tl.max(z, 0)
    tl.store(peak_ptr + row * peak_row + piece, peak, mask=inside)
    base = tl.maximum(peak, -3.4028234663852886e38)  # where all is -inf, so is its logarithm below
    for t in tl.static_range(T):
        temperature = tl.load(temperature_ptr + t)
        total = tl.sum(tl.exp((z - base[None, :]) / temperature), 0)
        tl.store(sum_ptr + row * sum_row + t * sum_t + piece, tl.log(total) + base / temperature, mask=inside)


def summed(
    logits_RCp: torch.Tensor, temperatures: Sequence[float], peak_Rp: torch.Tensor, sum_RTp: torch.Tensor
) -> None:
    """Writes the largest [R, p] and the log-sum-exp [R, T, p] of each piece; -inf where all is -inf.

    Args:
        logits_RCp: float32 [R, C, p] with C a power of 2; each row dense.
        temperatures: the T temperatures.
        peak_Rp, sum_RTp: float32, dense along p.
    """
    rows, columns, pieces = logits_RCp.shape
    assert logits_RCp.stride()[1:] == (pieces, 1) and peak_Rp.stride(1) == sum_RTp.stride(2) == 1
    if not rows:
        return
    temperature_T = torch.tensor(temperatures, dtype=torch.float32).to(logits_RCp.device, non_blocking=True)
    _summed_kernel[(rows, triton.cdiv(pieces, _PIECES))](
        logits_RCp, temperature_T, peak_Rp, sum_RTp, pieces,
        logits_RCp.stride(0), peak_Rp.stride(0), sum_RTp.stride(0), sum_RTp.stride(1),
        T=len(temperatures), C=columns, PIECES=_PIECES,
    )  # fmt: skip
