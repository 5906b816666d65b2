"""Draws from the tail of a distribution: which ids, and by which random numbers.

Shape suffixes: N rows, r rows at hand, V ids, D draws a row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from kdpipe.data.hashing import digest

_TABLE_BYTES = 16 << 20  # weights of 8 bytes [r, V], or points [r, D], that are held at a time


def uniforms(unit: str, prefix: str, tokens: int, temperatures: Sequence[float]) -> np.ndarray:
    """Numbers in [0, 1) that decide on the draws of a unit.

    Of the unit, the distribution and the temperature alone: batches, order and the other temperatures do not matter.
    They are the top 53 bits of Philox (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) under
    the digest of these as its key; NumPy promises the raw stream of a bit generator across versions, but not that of
    `Generator.random`.

    Args:
        unit: its id.
        prefix: of the distribution, such as `top`.
        tokens: numbers wanted at each temperature.
        temperatures: one column each.

    Returns:
        float64 [tokens, temperatures].
    """
    columns = [np.random.Philox(key=int(digest([unit, prefix, float(T)]), 16)).random_raw(tokens) for T in temperatures]
    return (np.stack(columns, axis=1) >> np.uint64(11)) * 2.0**-53


def systematic_draws(logits_NV: torch.Tensor, temperature: float, uniform_N: torch.Tensor, draws: int) -> torch.Tensor:
    """Ids drawn from softmax(z / T) of each row by systematic sampling.

    Draw j of D is the id at the point (j + u) / D of the cumulated probabilities, ids ascending. Over u each draw of a
    random place has the row's distribution, so the mean of any f(v) over the draws is unbiased; and an id comes up
    floor(D p) or ceil(D p) times, so the mean varies less than that of independent draws.

    Probabilities are cumulated as integers, of 44 bits at a vocabulary of 2^18 (2^62 in all at most): sums are exact on
    any device, and an id of probability 0 is never drawn.

    Args:
        logits_NV: [N, V], -inf for ids that must not be drawn.
        temperature: T.
        uniform_N: u in [0, 1), float64 [N].
        draws: D.

    Returns:
        int64 [N, D], ascending in each row; -1 where every id is -inf.
    """
    vocabulary = logits_NV.shape[1]
    unit = 2.0 ** (62 - math.ceil(math.log2(vocabulary)))
    place_D = torch.arange(draws, dtype=torch.float64, device=logits_NV.device)
    step = max(1, _TABLE_BYTES // (8 * max(vocabulary, draws)))
    found = []
    for logits_rV, uniform_r in zip(logits_NV.split(step), uniform_N.split(step), strict=True):
        peak_r1 = logits_rV.amax(1, keepdim=True)
        empty_r1 = peak_r1 == -torch.inf
        weight_rV = logits_rV.to(torch.float64, copy=True).sub_(peak_r1.masked_fill(empty_r1, 0.0))
        sum_rV = weight_rV.div_(temperature).exp_().mul_(unit).long().cumsum_(1)
        total_r1 = sum_rV[:, -1:]
        point_rD = (place_D + uniform_r[:, None]) / draws
        # A point just below 1 may be rounded up to it.
        target_rD = (point_rD * total_r1).long().minimum(total_r1 - 1)
        # NaN, which is refused later, must not lead outside.
        place_rD = torch.searchsorted(sum_rV, target_rD, right=True).clamp_max_(vocabulary - 1)
        found.append(place_rD.masked_fill_(empty_r1, -1))
    return torch.cat(found)
