"""The output head, materialized: the plain twin against which every other form is tested.

Shape suffixes: N rows (positions), H width, V vocabulary, S ids a row, T temperatures, B vocabulary blocks.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class HeadSpec:
    """What lies between hidden states and log-sum-exp, apart from the weights.

    Logits are z = softcap * tanh(u / softcap) with u = logit_scale * (W h + bias); without a softcap, z = u.

    Attributes:
        temperatures: softmax temperatures.
        bounds: B + 1 ascending ids; block b holds ids `bounds[b] .. bounds[b + 1] - 1`. The last is the number of
            valid rows of the head: what lies beyond is not part of the softmax.
        masked: ascending ids below `bounds[-1]` that are not part of the softmax either.
        logit_scale: factor of the logits (Granite, Cohere).
        softcap: bound of the logits (Gemma), or None.
    """

    temperatures: tuple[float, ...]
    bounds: tuple[int, ...]
    masked: tuple[int, ...]
    logit_scale: float
    softcap: float | None

    def masked_columns(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """Masked ids in `start .. stop - 1`, counted from `start` (int64), or None where there are none."""
        low, high = bisect_left(self.masked, start), bisect_left(self.masked, stop)
        if low == high:
            return None
        return torch.tensor([token - start for token in self.masked[low:high]], device=device)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and picked logits from logits [N, V] held in memory; gradients by autograd.

    Returns:
        lse_NTB: float64 [N, T, B], log sum over block b of exp(z / T); -inf where every id of a block is masked.
        picked_NS: float32 (float64 for float64 inputs) [N, S], z at `ids`; 0 where the id is -1, -inf where the
            id is not part of the softmax.
    """
    wide, valid = accumulator(hidden_NH.dtype), spec.bounds[-1]
    bias = None if bias_V is None else bias_V[:valid].to(wide)
    logits_NV = F.linear(hidden_NH.to(wide), weight_VH[:valid].to(wide), bias) * spec.logit_scale
    if spec.softcap is not None:
        logits_NV = spec.softcap * torch.tanh(logits_NV / spec.softcap)
    columns = spec.masked_columns(0, valid, logits_NV.device)
    if columns is not None:
        logits_NV = logits_NV.index_fill(1, columns, -torch.inf)

    blocks = logits_NV.double().split([b - a for a, b in pairwise(spec.bounds)], dim=1)
    lse_NTB = torch.stack(
        [torch.stack([torch.logsumexp(block / t, 1) for block in blocks], 1) for t in spec.temperatures], 1
    )
    inside_NS = (ids_NS >= 0) & (ids_NS < valid)
    gathered_NS = logits_NV.gather(1, ids_NS.where(inside_NS, 0))
    picked_NS = torch.where(inside_NS, gathered_NS, torch.where(ids_NS < 0, 0.0, -torch.inf))
    return lse_NTB, picked_NS
