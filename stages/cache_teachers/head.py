"""From hidden states to stored distributions, without ever holding [tokens, vocabulary].

Dimension key: N response positions, R rows of one chunk, H width, V shared ids counted with masked ones, K kept
entries, T temperatures, B vocabulary blocks, D draws.

For logits z over the shared ids (masked ids are -inf before anything is normalized) and the K largest of them:

    log_z[T] = log sum_v exp(z_v / T)
    logprob  = z_kept - log_z[1]
    log_tail[T, b] = log sum_{v in block b, v not kept} exp(z_v / T) - log_z[T]

Tails are summed over what is left, never taken as `1 - sum(kept)`: a teacher that is sure would leave only rounding
error there. Draws are ids of the tail, each with the probability exp(z_v / T) / sum of them; see `draws`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.cache_teachers.draws import systematic_draws
from kdpipe.stages.models.vocabulary import Alignment

_HEAD_ROWS = 8192  # rows of the output head that are widened to float32 at a time


def distribution(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    k: int,
    temperatures: Sequence[float],
    bounds: Sequence[int],
    alignment: Alignment,
    chunk: int,
    draws: int = 0,
    draws_k: int | None = None,
    uniforms: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What a teacher says at each position: its likeliest ids, and the exact rest.

    Logits, normalizers and tails are float32 whatever the model's precision (float64 for float64 states).

    Args:
        hidden_NH: states after the final norm, [N, H].
        weight_VH: output head, at least `alignment.valid` rows.
        k: entries to keep, at most the number of shared ids.
        temperatures: the T temperatures that logits are divided by, 1 among them.
        bounds: B + 1 bounds of the vocabulary blocks, from 0 to `alignment.valid`.
        alignment: ids to normalize over.
        chunk: positions taken through the output head at once.
        draws: ids D to draw from the tail at each temperature; 0: none.
        draws_k: likeliest ids that are not in the tail that is drawn from, at most k; None: k.
        uniforms: float64 [N, T] in [0, 1), which decide on the draws; not needed without.

    Returns:
        On the states' device: `ids` int64 [N, K], likeliest first; `logprob` [N, K] at temperature 1 (nats);
        `log_z` [N, T]; `log_tail` [N, T, B], -inf where nothing is left; with draws also `draws` int64 [N, T, D],
        -1 where nothing is left to draw from.

    Raises:
        KdpipeError: a logit is NaN or infinite.
    """
    masked = torch.tensor(alignment.masked, dtype=torch.int64, device=hidden_NH.device)
    assert bounds[0] == 0 and bounds[-1] == alignment.valid
    uniforms_NT = hidden_NH.new_zeros(len(hidden_NH), len(temperatures), dtype=torch.float64)
    if draws:
        assert uniforms is not None and uniforms.shape == uniforms_NT.shape
        uniforms_NT.copy_(uniforms)
    beside = k if draws_k is None else draws_k
    assert beside <= k
    parts = [
        _chunk(rows_RH, weight_VH, k, temperatures, bounds, alignment.valid, masked, _Draws(draws, beside, uniforms_RT))
        for rows_RH, uniforms_RT in zip(hidden_NH.split(chunk), uniforms_NT.split(chunk), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


class _Draws(NamedTuple):
    """How many to draw, beside how many of the likeliest ids, and by which numbers."""

    count: int
    k: int
    uniforms_RT: torch.Tensor


def _chunk(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    k: int,
    temperatures: Sequence[float],
    bounds: Sequence[int],
    valid: int,
    masked: torch.Tensor,
    draws: _Draws,
) -> dict[str, torch.Tensor]:
    logits_RV = _logits(hidden_RH, weight_VH[:valid])
    logits_RV[:, masked] = -torch.inf
    log_z_RT = torch.stack([torch.logsumexp(logits_RV / T, dim=1) for T in temperatures], dim=1)
    if not bool(torch.isfinite(log_z_RT).all()):
        raise KdpipeError("the teacher's logits hold NaN or infinity. Run it in a wider dtype (`dtype: float32`).")
    kept_RK, ids_RK = torch.topk(logits_RV, k, dim=1)
    drawn: dict[str, torch.Tensor] = {}
    if draws.count:
        logits_RV.scatter_(1, ids_RK[:, : draws.k], -torch.inf)
        by_temperature = zip(temperatures, draws.uniforms_RT.unbind(1), strict=True)
        drawn_TRD = [systematic_draws(logits_RV, T, uniform_R, draws.count) for T, uniform_R in by_temperature]
        drawn["draws"] = torch.stack(drawn_TRD, dim=1)
    logits_RV.scatter_(1, ids_RK, -torch.inf)
    tails = []
    for column, T in enumerate(temperatures):
        left_RB = torch.stack(
            [torch.logsumexp(logits_RV[:, low:high] / T, dim=1) for low, high in pairwise(bounds)],
            dim=1,
        )
        tails.append(left_RB - log_z_RT[:, column, None])
    return {
        "ids": ids_RK,
        "logprob": kept_RK - log_z_RT[:, temperatures.index(1.0), None],
        "log_z": log_z_RT,
        "log_tail": torch.stack(tails, dim=1),
        **drawn,
    }


def _logits(hidden_RH: torch.Tensor, weight_VH: torch.Tensor) -> torch.Tensor:
    """Logits [R, V] in float32: a product rounded to bfloat16 would be off by 0.1 at a logit of 20."""
    dtype = torch.float64 if hidden_RH.dtype == torch.float64 else torch.float32
    wide_RH = hidden_RH.to(dtype)
    logits_RV = wide_RH.new_empty(len(hidden_RH), len(weight_VH))
    for low in range(0, len(weight_VH), _HEAD_ROWS):
        rows_VH = weight_VH[low : low + _HEAD_ROWS].to(dtype)
        torch.mm(wide_RH, rows_VH.T, out=logits_RV[:, low : low + _HEAD_ROWS])
    return logits_RV
