"""From hidden states to stored distributions in one sweep of the output head, never holding [tokens, vocabulary].

Shape suffixes: N response positions, R rows of one chunk, H width, V shared ids counted with masked ones, W columns
(V and what fills up its blocks), P pieces of C = `_PIECE` columns each, p pieces of a tile, K kept entries, G columns
of the pieces that may hold them, T temperatures, B vocabulary blocks, D draws.

For logits z over the shared ids (masked ids are -inf before anything is normalized) and the K largest of them:

    log_z[T] = log sum_v exp(z_v / T)
    logprob  = z_kept - log_z[1]
    log_tail[T, b] = log sum_{v in block b, v not kept} exp(z_v / T) - log_z[T]

The head is swept in tiles. Column `c * p + q` of a tile belongs to its piece q, so that sums over a piece run along
memory. The sweep leaves of each piece its largest logit and its log-sum-exp at each temperature, while the logits are
still in the processor's cache. The K largest logits stand in the K pieces with the largest maxima, so only these are
searched, and only their sums are taken again without what is kept. Tails are sums over what is left, never
`1 - sum(kept)`: a teacher that is sure would leave only rounding error there. Draws are ids of the tail, each with the
probability exp(z_v / T) / sum of them; see `draws`.
"""

from __future__ import annotations

import importlib.util
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.cache_teachers.draws import systematic_draws
from kdpipe.stages.models.vocabulary import Alignment

_PIECE = 32
_TILE = 2048  # columns that are swept at a time: on a CPU what its cache holds, on a GPU what is worth starting
_TILE_GPU = 32_768


def distribution(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    *,
    k: int,
    temperatures: Sequence[float],
    bounds: Sequence[int],
    alignment: Alignment,
    chunk: int,
    mass: float = 1.0,
    min_k: int = 1,
    draws: int = 0,
    draws_k: int | None = None,
    uniforms: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """What a teacher says at each position: its likeliest ids, and the exact rest.

    Logits, normalizers and tails are float32 whatever the model's precision (float64 for float64 states).

    Args:
        hidden_NH: states after the final norm, [N, H].
        weight_VH: output head, at least `alignment.valid` rows.
        k: most entries to keep, at most the number of shared ids.
        temperatures: the T temperatures that logits are divided by, 1 among them.
        bounds: B + 1 bounds of the vocabulary blocks, from 0 to `alignment.valid`.
        alignment: ids to normalize over.
        chunk: positions taken through the output head at once.
        mass: below 1, of a position only as many of the k are kept as reach this mass at temperature 1.
        min_k: the fewest then kept.
        draws: ids D to draw from the tail at each temperature; 0: none. Not together with a mass.
        draws_k: likeliest ids that are not in the tail that is drawn from, at most k; None: k.
        uniforms: float64 [N, T] in [0, 1), which decide on the draws; not needed without.

    Returns:
        On the states' device, which may still be at work on them: `ids` int64 [N, K], likeliest first, -1 where a
        position keeps fewer; `logprob` [N, K] at temperature 1 (nats), -inf there; `log_z` [N, T]; `log_tail`
        [N, T, B], -inf where nothing is left; with draws also `draws` int64 [N, T, D], -1 where nothing is left to
        draw from. Where a logit is NaN or infinite, so is `log_z`; see `refuse_nonfinite`.
    """
    assert bounds[0] == 0 and bounds[-1] == alignment.valid
    uniforms_NT = hidden_NH.new_zeros(len(hidden_NH), len(temperatures), dtype=torch.float64)
    if draws:
        assert uniforms is not None and uniforms.shape == uniforms_NT.shape and mass >= 1
        uniforms_NT.copy_(uniforms)
    beside = k if draws_k is None else draws_k
    assert beside <= k
    sweep = _Sweep.over(bounds, alignment, hidden_NH.device)
    parts = []
    for rows_RH, uniforms_RT in zip(hidden_NH.split(chunk), uniforms_NT.split(chunk), strict=True):
        logits_RW, peaks_RP, sums_RTP = sweep.logits(rows_RH, weight_VH, temperatures)
        part = sweep.largest(logits_RW, peaks_RP, sums_RTP, k, temperatures, mass, min_k)
        if draws:
            part["draws"] = sweep.draws(logits_RW, part["ids"][:, :beside], temperatures, uniforms_RT, draws)
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def refuse_nonfinite(log_z_NT: np.ndarray) -> None:
    """Refuses what came of logits that are NaN or infinite. Apart from `distribution`, so that nothing waits for a GPU.

    Raises:
        KdpipeError: there are such.
    """
    if not np.isfinite(log_z_NT).all():
        raise KdpipeError("the teacher's logits hold NaN or infinity. Run it in a wider dtype (`dtype: float32`).")


@dataclass(frozen=True)
class _Sweep:
    """Columns of logits: each vocabulary block starts on a piece of its own, filled up with -inf.

    Attributes:
        bounds: of the blocks, as ids.
        columns: first column of each block, and the end W.
        id_W: int64, the id of a column; -1 for filling.
        column_V: int64, the column of an id.
        column_PC: int64, the columns of each piece.
        tiles: first id, first column, ids and columns of each.
        masked: columns of masked ids, rising.
        masked_M: the same on the device.
    """

    bounds: Sequence[int]
    columns: Sequence[int]
    id_W: torch.Tensor
    column_V: torch.Tensor
    column_PC: torch.Tensor
    tiles: Sequence[tuple[int, int, int, int]]
    masked: Sequence[int]
    masked_M: torch.Tensor

    @staticmethod
    def over(bounds: Sequence[int], alignment: Alignment, device: torch.device) -> _Sweep:
        columns = [0]
        for low, high in pairwise(bounds):
            columns.append(columns[-1] + -(-(high - low) // _PIECE) * _PIECE)
        column_V = torch.cat(
            [torch.arange(high - low) + first for (low, high), first in zip(pairwise(bounds), columns, strict=False)]
        )
        id_W = torch.full((columns[-1],), -1, dtype=torch.int64)
        id_W[column_V] = torch.arange(bounds[-1])
        masked_M = column_V[torch.tensor(sorted(alignment.masked), dtype=torch.int64)]
        tiles, pieces = [], []
        size = _TILE_GPU if device.type == "cuda" else _TILE
        for (low, high), start in zip(pairwise(bounds), columns, strict=False):
            for first in range(low, high, size):
                ids, column = min(first + size, high) - first, start + first - low
                wide = -(-ids // _PIECE) * _PIECE
                tiles.append((first, column, ids, wide))
                pieces.append(torch.arange(column, column + wide).view(_PIECE, -1).T)
        id_W, column_V, column_PC, on_device_M = (
            tensor.to(device, non_blocking=True) for tensor in (id_W, column_V, torch.cat(pieces), masked_M)
        )
        return _Sweep(bounds, columns, id_W, column_V, column_PC, tiles, masked_M.tolist(), on_device_M)

    def logits(
        self, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, temperatures: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [R, W], and of each piece the largest [R, P] and the log-sum-exp at each temperature [R, T, P]."""
        dtype = torch.float64 if hidden_RH.dtype == torch.float64 else torch.float32
        rows, pieces = len(hidden_RH), self.columns[-1] // _PIECE
        logits_RW = hidden_RH.new_empty(rows, self.columns[-1], dtype=dtype)
        peaks_RP = logits_RW.new_empty(rows, pieces)
        sums_RTP = logits_RW.new_empty(rows, len(temperatures), pieces)
        for first, column, ids, wide in self.tiles:
            _product(hidden_RH, weight_VH[first : first + ids], logits_RW[:, column : column + ids])
            logits_RW[:, column + ids : column + wide] = -torch.inf
            low, high = bisect_left(self.masked, column), bisect_left(self.masked, column + wide)
            if high - low:
                logits_RW.index_fill_(1, self.masked_M[low:high], -torch.inf)
            here_RCp = logits_RW[:, column : column + wide].unflatten(1, (_PIECE, -1))
            span = slice(column // _PIECE, (column + wide) // _PIECE)
            _summed(here_RCp, temperatures, peaks_RP[:, span], sums_RTP[:, :, span])
        return logits_RW, peaks_RP, sums_RTP

    def largest(
        self,
        logits_RW: torch.Tensor,
        peaks_RP: torch.Tensor,
        sums_RTP: torch.Tensor,
        k: int,
        temperatures: Sequence[float],
        mass: float,
        min_k: int,
    ) -> dict[str, torch.Tensor]:
        """The likeliest ids and what is left of each block."""
        log_z_RT = torch.logsumexp(sums_RTP, dim=2)
        piece_RQ = peaks_RP.topk(min(k, peaks_RP.shape[1]), dim=1, sorted=False).indices
        # Columns of a piece stand as in a tile: the c-th of all pieces, then the next.
        column_RG = self.column_PC[piece_RQ].transpose(1, 2).flatten(1)
        found_RG = logits_RW.gather(1, column_RG)
        kept_RK, place_RK = found_RG.topk(k, dim=1)
        ids_RK = self.id_W[column_RG.gather(1, place_RK)]
        logprob_RK = kept_RK - log_z_RT[:, temperatures.index(1.0), None]
        if mass < 1:
            before_RK = logprob_RK.exp().cumsum(1).roll(1, dims=1)
            gone_RK = before_RK >= mass
            gone_RK[:, :min_k] = False
            # Only what is kept leaves the tail; the likeliest id stands in for the others.
            place_RK = torch.where(gone_RK, place_RK[:, :1], place_RK)
            ids_RK, logprob_RK = ids_RK.masked_fill(gone_RK, -1), logprob_RK.masked_fill(gone_RK, -torch.inf)
        found_RG.scatter_(1, place_RK, -torch.inf)
        left_RTQ = sums_RTP.new_empty(*sums_RTP.shape[:2], piece_RQ.shape[1])
        _summed(found_RG.unflatten(1, (_PIECE, -1)), temperatures, torch.empty_like(left_RTQ[:, 0]), left_RTQ)
        sums_RTP = sums_RTP.scatter(2, piece_RQ[:, None].expand_as(left_RTQ), left_RTQ)
        tails = [
            torch.logsumexp(sums_RTP[:, :, low // _PIECE : high // _PIECE], dim=2)
            for low, high in pairwise(self.columns)
        ]
        log_tail_RTB = torch.stack(tails, dim=2) - log_z_RT[:, :, None]
        return {"ids": ids_RK, "logprob": logprob_RK, "log_z": log_z_RT, "log_tail": log_tail_RTB}

    def draws(
        self,
        logits_RW: torch.Tensor,
        beside_RK: torch.Tensor,
        temperatures: Sequence[float],
        uniforms_RT: torch.Tensor,
        draws: int,
    ) -> torch.Tensor:
        """Ids [R, T, D] drawn from what `beside_RK` leaves; the logits of these are overwritten."""
        logits_RW.scatter_(1, self.column_V[beside_RK], -torch.inf)
        by_temperature = zip(temperatures, uniforms_RT.unbind(1), strict=True)
        columns = [systematic_draws(logits_RW, T, uniform_R, draws) for T, uniform_R in by_temperature]
        column_RTD = torch.stack(columns, dim=1)
        return torch.where(column_RTD < 0, -1, self.id_W[column_RTD.clamp_min(0)])


def _product(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, out_RV: torch.Tensor) -> None:
    """Logits in float32 at least: rounded to bfloat16 they would be off by 0.1 at a logit of 20."""
    dtype = out_RV.dtype
    half = hidden_RH.dtype == weight_VH.dtype and hidden_RH.dtype in (torch.bfloat16, torch.float16)
    if half and hidden_RH.is_cuda:
        # Products of such operands are exact in float32, and tensor cores add them up in it.
        torch.mm(hidden_RH, weight_VH.T, out_dtype=dtype, out=out_RV)
    else:
        torch.mm(hidden_RH.to(dtype), weight_VH.to(dtype).T, out=out_RV)


def _summed(
    logits_RCp: torch.Tensor, temperatures: Sequence[float], peak_Rp: torch.Tensor, sum_RTp: torch.Tensor
) -> None:
    """Writes the largest [R, p] and the log-sum-exp [R, T, p] of each piece; -inf where all is -inf."""
    if logits_RCp.is_cuda and logits_RCp.dtype == torch.float32 and _has_triton():
        from kdpipe.stages.cache_teachers import head_triton

        head_triton.summed(logits_RCp, temperatures, peak_Rp, sum_RTp)
        return
    torch.amax(logits_RCp, 1, out=peak_Rp)
    base_Rp = peak_Rp.clamp_min(torch.finfo(peak_Rp.dtype).min)
    for place, T in enumerate(temperatures):
        shifted_RCp = logits_RCp - base_Rp[:, None]
        if T != 1:
            shifted_RCp /= T
        sum_RTp[:, place] = shifted_RCp.exp_().sum(1).log_().add_(base_Rp, alpha=1 / T)
    sum_RTp.masked_fill_(peak_Rp[:, None] == -torch.inf, -torch.inf)


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
