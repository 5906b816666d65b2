"""The output head, materialized: the plain twin against which every other form is tested.

Shape suffixes: N rows (positions), H width, V vocabulary, S ids a row, T temperatures, B vocabulary blocks.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F

from kdpipe.stages.train.losses.spec import HeadSpec, accumulator


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
