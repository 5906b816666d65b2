"""The output head in tiles of the vocabulary: exact, on any device, never [N, V].

A tile is all rows by C columns of the logits. Forward keeps a running log-sum-exp; backward computes each tile
again and turns it into its gradient

    dL/dz_v = sum_T g_lse[T, block of v] / T * softmax_T(z)_v + sum over picks of v of g_picked,

so that rows `start .. stop` of the weight's gradient are finished by one product, accumulated in float32 and
written once in the weight's dtype. (Tiles of rows instead would add to the whole float32 [V, H] for each tile:
measured 1.2 to 1.7 times slower on two CPU cores at N 1024, H 512, V 32,000.)

Memory beyond inputs and gradients: about two float32 tiles [N, C], one tile [C, H] of the weight where it must be
widened, and [N, H] in float32 for the gradient of low-precision hidden states (on a CPU for the states too).

Shape suffixes: N rows (positions), H width, V vocabulary, C columns of a tile, S ids a row, T temperatures,
B vocabulary blocks, P picks (ids) that fall into a tile.
"""

from __future__ import annotations

from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from kdpipe.stages.train.losses.reference import HeadSpec, accumulator

# A tile of 8 MiB stays in the last-level cache of a CPU; a GPU wants few, large kernels.
TILE_BYTES_CPU = 8 * 2**20
TILE_BYTES_GPU = 256 * 2**20
# Narrower tiles starve the matrix product. 256 float32 columns are 1 KiB a row, less than its hidden state.
MIN_COLUMNS = 256


class _Tile(NamedTuple):
    start: int
    stop: int
    block: int


class _Picks:
    """The ids of all rows in ascending order, cut at the tiles, so that a tile finds its own without a search."""

    def __init__(self, ids_NS: torch.Tensor, tiles: list[_Tile]):
        flat = ids_NS.reshape(-1)
        self.order = torch.argsort(flat, stable=True)
        self.ids = flat[self.order]
        self.width = max(ids_NS.shape[1], 1)
        edges = torch.tensor([tile.start for tile in tiles] + [tiles[-1].stop], device=flat.device)
        self.edges: list[int] = torch.searchsorted(self.ids, edges).tolist()

    def of(self, index: int, tile: _Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, columns within the tile, and places in the flat [N * S], each int64 [P]."""
        span = slice(self.edges[index], self.edges[index + 1])
        place_P = self.order[span]
        return place_P // self.width, self.ids[span] - tile.start, place_P


def _tiles(rows: int, itemsize: int, spec: HeadSpec, tile_bytes: int) -> list[_Tile]:
    columns = max(MIN_COLUMNS, tile_bytes // (itemsize * max(rows, 1)))
    return [
        _Tile(start, min(start + columns, stop), block)
        for block, (first, stop) in enumerate(pairwise(spec.bounds))
        for start in range(first, stop, columns)
    ]


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with float32 result whatever the operands' dtype (float64 for float64)."""
    wide = accumulator(a.dtype)
    return torch.mm(a, b) if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def _operand_dtype(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.dtype:
    """bfloat16 where the device multiplies it with a float32 result, else the accumulator's dtype."""
    native = hidden_NH.is_cuda and hidden_NH.dtype == weight_VH.dtype == torch.bfloat16
    return torch.bfloat16 if native else accumulator(hidden_NH.dtype)


def _logits(
    hidden_NH: torch.Tensor, weight_CH: torch.Tensor, bias_V: torch.Tensor | None, tile: _Tile, spec: HeadSpec
) -> torch.Tensor:
    logits_NC = _product(hidden_NH, weight_CH.T)
    if bias_V is not None:
        logits_NC += bias_V[tile.start : tile.stop].to(logits_NC.dtype)
    if spec.logit_scale != 1.0:
        logits_NC *= spec.logit_scale
    if spec.softcap is not None:
        logits_NC.div_(spec.softcap).tanh_().mul_(spec.softcap)
    masked = spec.masked_columns(tile.start, tile.stop, logits_NC.device)
    return logits_NC if masked is None else logits_NC.index_fill_(1, masked, -torch.inf)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NS: torch.Tensor,
        spec: HeadSpec,
        tile_bytes: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide, rows = accumulator(hidden_NH.dtype), hidden_NH.shape[0]
        tile_bytes = tile_bytes or (TILE_BYTES_GPU if hidden_NH.is_cuda else TILE_BYTES_CPU)
        tiles = _tiles(rows, wide.itemsize, spec, tile_bytes)
        picks = _Picks(ids_NS, tiles)

        lse_NTB = torch.full(
            (rows, len(spec.temperatures), len(spec.bounds) - 1),
            -torch.inf,
            dtype=torch.float64,
            device=hidden_NH.device,
        )
        largest_N = torch.full((rows,), -torch.inf, dtype=wide, device=hidden_NH.device)
        picked_NS = torch.zeros(ids_NS.shape, dtype=wide, device=hidden_NH.device)
        picked_NS.masked_fill_(ids_NS >= spec.bounds[-1], -torch.inf)
        operand = _operand_dtype(hidden_NH, weight_VH)
        operand_NH = hidden_NH.to(operand)
        for index, tile in enumerate(tiles):
            logits_NC = _logits(operand_NH, weight_VH[tile.start : tile.stop].to(operand), bias_V, tile, spec)
            row_P, column_P, place_P = picks.of(index, tile)
            picked_NS.view(-1)[place_P] = logits_NC[row_P, column_P]
            peak_N = logits_NC.amax(1)
            largest_N = torch.maximum(largest_N, peak_N)
            peak_N = peak_N.masked_fill(peak_N == -torch.inf, 0.0)
            logits_NC -= peak_N[:, None]
            for t, temperature in enumerate(spec.temperatures):
                # Summed in float64: the mass left beside a dominant entry must not be rounded away.
                sum_N = (logits_NC / temperature).exp_().sum(1, dtype=torch.float64)
                lse_N = sum_N.log_() + peak_N.double() / temperature
                lse_NTB[:, t, tile.block] = torch.logaddexp(lse_NTB[:, t, tile.block], lse_N)

        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, lse_NTB, largest_N)
        ctx.spec, ctx.tiles, ctx.picks = spec, tiles, picks
        return lse_NTB, picked_NS

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_lse_NTB, grad_picked_NS = grad_outputs
        hidden_NH, weight_VH, bias_V, lse_NTB, largest_N = ctx.saved_tensors
        spec: HeadSpec = ctx.spec
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide, operand = largest_N.dtype, _operand_dtype(hidden_NH, weight_VH)
        temperature_T = torch.tensor(spec.temperatures, dtype=torch.float64, device=hidden_NH.device)

        # exp((z - largest) / T - lse) with lse relative to the largest logit: the same small numbers that the
        # losses see, so that dense and sparse gradients cancel where a tail is nearly empty.
        exists_NTB = lse_NTB > -torch.inf
        relative_NTB = torch.where(exists_NTB, lse_NTB - (largest_N.double()[:, None] / temperature_T)[..., None], 0.0)
        relative_NTB = relative_NTB.to(wide)
        scale_NTB = torch.where(exists_NTB, grad_lse_NTB / temperature_T[:, None], 0.0).to(wide)
        values = grad_picked_NS.to(wide).reshape(-1)

        grad_hidden_NH = torch.zeros(hidden_NH.shape, dtype=wide, device=hidden_NH.device) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if need_bias else None
        operand_NH = hidden_NH.to(operand)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for index, tile in enumerate(ctx.tiles):
                span = slice(tile.start, tile.stop)
                weight_CH = weight_VH[span].to(operand)
                logits_NC = _logits(operand_NH, weight_CH, bias_V, tile, spec)
                slope_NC = None if spec.softcap is None else 1.0 - (logits_NC / spec.softcap).square_()
                logits_NC -= largest_N[:, None]
                grad_NC = reduce(
                    torch.Tensor.add_,
                    (
                        (logits_NC / temperature)
                        .sub_(relative_NTB[:, t, tile.block, None])
                        .exp_()
                        .mul_(scale_NTB[:, t, tile.block, None])
                        for t, temperature in enumerate(spec.temperatures)
                    ),
                )
                row_P, column_P, place_P = ctx.picks.of(index, tile)
                grad_NC.index_put_((row_P, column_P), values[place_P], accumulate=True)
                if slope_NC is not None:
                    grad_NC *= slope_NC
                if spec.logit_scale != 1.0:
                    grad_NC *= spec.logit_scale
                masked = spec.masked_columns(tile.start, tile.stop, grad_NC.device)
                if masked is not None:
                    grad_NC.index_fill_(1, masked, 0.0)
                if grad_bias_V is not None:
                    grad_bias_V[span] = grad_NC.sum(0)
                grad_NC = grad_NC.to(operand)
                if grad_hidden_NH is not None:
                    grad_hidden_NH += _product(grad_NC, weight_CH)
                if grad_weight_VH is not None:
                    grad_weight_VH[span] = _product(grad_NC.T, operand_NH)
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None


def chunked_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
    tile_bytes: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_head`, in tiles of at most `tile_bytes` bytes or 256 columns, whichever is more.

    Not differentiable twice. Operands of low precision are multiplied with float32 results.

    Returns:
        lse_NTB: float64 [N, T, B].
        picked_NS: float32 (float64 for float64 inputs) [N, S].
    """
    lse_NTB, picked_NS = _ChunkedHead.apply(hidden_NH, weight_VH, bias_V, ids_NS, spec, tile_bytes)  # type: ignore[misc]
    return lse_NTB, picked_NS
