"""The output head in tiles of the vocabulary: exact, on any device, never [N, V].

A tile is all rows by C columns of u = W h. Forward keeps a running log-sum-exp; backward computes each tile again and
turns it into its gradient

    dL/dz_v = sum_T g_lse[T, block of v] / T * softmax_T(z)_v + sum over picks of v of g_picked,

so that rows `start .. stop` of the weight's gradient are finished by one product, accumulated in float32 and
written once in the weight's dtype. (Tiles of rows instead would add to the whole float32 [V, H] for each tile; where
the loss is known in the forward pass, `in_forward` does that and saves the second computation of the logits.)

What is done to a tile between the products is a `Between`: PyTorch here, Triton kernels in `triton_head`.

Memory beyond inputs and gradients: about four float32 tiles [N, C] (one of logits, one of exponentials, and the copy in
float64 that PyTorch sums on a CPU), one more for each further temperature and for a softcap; one tile [C, H] of the
weight where it must be widened, and [N, H] in float32 for the gradient of low-precision hidden states (on a CPU for the
states too).

Shape suffixes: N rows (positions), H width, V vocabulary, C columns of a tile, S ids a row, T temperatures,
B vocabulary blocks, P picks (ids) that fall into a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch

from kdpipe.stages.train.losses.spec import (
    HeadSpec,
    accumulator,
    add_product,
    constant,
    operand_dtype,
    product,
    write_product,
)

# A tile of 8 MiB stays in the last-level cache of a CPU; a GPU wants few, large kernels.
TILE_BYTES_CPU = 8 * 2**20
TILE_BYTES_GPU = 128 * 2**20
# Narrower tiles starve the matrix product. 256 float32 columns are 1 KiB a row, less than its hidden state.
MIN_COLUMNS = 256


class Tile(NamedTuple):
    """Columns `start .. stop - 1` of the vocabulary, all in one block."""

    index: int
    start: int
    stop: int
    block: int


class Slopes(NamedTuple):
    """What turns a tile into its gradient.

    Attributes:
        largest_N: the largest logit of each row.
        relative_NTB: lse less the largest logit / T. exp((z - largest) / T - relative) are the same small numbers
            that the losses see, so that dense and sparse gradients cancel where a tail is nearly empty.
        scale_NTB: g_lse / T; 0 for empty blocks.
        picked_NS: g_picked.
    """

    largest_N: torch.Tensor
    relative_NTB: torch.Tensor
    scale_NTB: torch.Tensor
    picked_NS: torch.Tensor


class Between(Protocol):
    """What is done to tiles u_NC between the products. Both methods may overwrite u_NC."""

    def reduce(
        self, tile: Tile, u_NC: torch.Tensor, lse_NTB: torch.Tensor, largest_N: torch.Tensor, picked_NS: torch.Tensor
    ) -> None:
        """Takes a tile into the running log-sum-exp (float64), the largest logit of each row and the picked logits."""
        ...

    def gradient(self, tile: Tile, u_NC: torch.Tensor, slopes: Slopes, dtype: torch.dtype) -> torch.Tensor:
        """dL/du of a tile [N, C] in `dtype`."""
        ...


MakeBetween = Callable[[torch.Tensor, "torch.Tensor | None", HeadSpec, Sequence[Tile]], Between]
"""From ids [N, S], bias [V] or None, settings and tiles."""


class TorchBetween:
    """`Between` in PyTorch."""

    def __init__(self, ids_NS: torch.Tensor, bias_V: torch.Tensor | None, spec: HeadSpec, tiles: Sequence[Tile]):
        self._bias_V, self._spec = bias_V, spec
        # The ids of all rows in ascending order, cut at the tiles, so that a tile finds its own without a search.
        flat = ids_NS.reshape(-1)
        self._order = torch.argsort(flat, stable=True)
        self._ids = flat[self._order]
        self._width = max(ids_NS.shape[1], 1)
        edges = constant([tile.start for tile in tiles] + [tiles[-1].stop], flat.device)
        self._edges: list[int] = torch.searchsorted(self._ids, edges).tolist()

    def _picks(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, columns within the tile, and places in the flat [N * S], each int64 [P]."""
        span = slice(self._edges[tile.index], self._edges[tile.index + 1])
        place_P = self._order[span]
        return place_P // self._width, self._ids[span] - tile.start, place_P

    def _logits(self, tile: Tile, u_NC: torch.Tensor) -> torch.Tensor:
        spec = self._spec
        if self._bias_V is not None:
            u_NC += self._bias_V[tile.start : tile.stop].to(u_NC.dtype)
        if spec.logit_scale != 1.0:
            u_NC *= spec.logit_scale
        if spec.softcap is not None:
            u_NC.div_(spec.softcap).tanh_().mul_(spec.softcap)
        masked = spec.masked_columns(tile.start, tile.stop, u_NC.device)
        return u_NC if masked is None else u_NC.index_fill_(1, masked, -torch.inf)

    def reduce(
        self, tile: Tile, u_NC: torch.Tensor, lse_NTB: torch.Tensor, largest_N: torch.Tensor, picked_NS: torch.Tensor
    ) -> None:
        logits_NC = self._logits(tile, u_NC)
        row_P, column_P, place_P = self._picks(tile)
        picked_NS.view(-1)[place_P] = logits_NC[row_P, column_P]
        peak_N = logits_NC.amax(1)
        torch.maximum(largest_N, peak_N, out=largest_N)
        peak_N = peak_N.masked_fill(peak_N == -torch.inf, 0.0)
        logits_NC -= peak_N[:, None]
        for t, temperature in enumerate(self._spec.temperatures):
            # Summed in float64: the mass left beside a dominant entry must not be rounded away.
            sum_N = (logits_NC / temperature).exp_().sum(1, dtype=torch.float64)
            lse_N = sum_N.log_() + peak_N.double() / temperature
            lse_NTB[:, t, tile.block] = torch.logaddexp(lse_NTB[:, t, tile.block], lse_N)

    def gradient(self, tile: Tile, u_NC: torch.Tensor, slopes: Slopes, dtype: torch.dtype) -> torch.Tensor:
        spec = self._spec
        logits_NC = self._logits(tile, u_NC)
        slope_NC = None if spec.softcap is None else 1.0 - (logits_NC / spec.softcap).square_()
        logits_NC -= slopes.largest_N[:, None]
        grad_NC = reduce(
            torch.Tensor.add_,
            (
                (logits_NC / temperature)
                .sub_(slopes.relative_NTB[:, t, tile.block, None])
                .exp_()
                .mul_(slopes.scale_NTB[:, t, tile.block, None])
                for t, temperature in enumerate(spec.temperatures)
            ),
        )
        row_P, column_P, place_P = self._picks(tile)
        grad_NC.index_put_((row_P, column_P), slopes.picked_NS.reshape(-1)[place_P], accumulate=True)
        if slope_NC is not None:
            grad_NC *= slope_NC
        if spec.logit_scale != 1.0:
            grad_NC *= spec.logit_scale
        masked = spec.masked_columns(tile.start, tile.stop, grad_NC.device)
        if masked is not None:
            grad_NC.index_fill_(1, masked, 0.0)
        return grad_NC.to(dtype)


def _tiles(rows: int, itemsize: int, spec: HeadSpec, tile_bytes: int) -> list[Tile]:
    columns = max(MIN_COLUMNS, tile_bytes // (itemsize * max(rows, 1)))
    edges = [
        (start, min(start + columns, stop), block)
        for block, (first, stop) in enumerate(pairwise(spec.bounds))
        for start in range(first, stop, columns)
    ]
    return [Tile(index, *edge) for index, edge in enumerate(edges)]


class _TiledHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NS: torch.Tensor,
        spec: HeadSpec,
        tile_bytes: int | None,
        make: MakeBetween,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wide, rows = accumulator(hidden_NH.dtype), hidden_NH.shape[0]
        tile_bytes = tile_bytes or (TILE_BYTES_GPU if hidden_NH.is_cuda else TILE_BYTES_CPU)
        tiles = _tiles(rows, wide.itemsize, spec, tile_bytes)
        between = make(ids_NS, bias_V, spec, tiles)

        lse_NTB = torch.full(
            (rows, len(spec.temperatures), len(spec.bounds) - 1),
            -torch.inf,
            dtype=torch.float64,
            device=hidden_NH.device,
        )
        largest_N = torch.full((rows,), -torch.inf, dtype=wide, device=hidden_NH.device)
        picked_NS = torch.zeros(ids_NS.shape, dtype=wide, device=hidden_NH.device)
        picked_NS.masked_fill_(ids_NS >= spec.valid, -torch.inf)
        operand = operand_dtype(hidden_NH, weight_VH)
        operand_NH = hidden_NH.to(operand)
        for tile in tiles:
            u_NC = product(operand_NH, weight_VH[tile.start : tile.stop].to(operand).T)
            between.reduce(tile, u_NC, lse_NTB, largest_N, picked_NS)

        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, lse_NTB, largest_N)
        ctx.spec, ctx.tiles, ctx.between = spec, tiles, between
        return lse_NTB, picked_NS

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_lse_NTB, grad_picked_NS = grad_outputs
        hidden_NH, weight_VH, bias_V, lse_NTB, largest_N = ctx.saved_tensors
        spec: HeadSpec = ctx.spec
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        wide, operand = largest_N.dtype, operand_dtype(hidden_NH, weight_VH)
        temperature_T = constant(spec.temperatures, hidden_NH.device, torch.float64)
        exists_NTB = lse_NTB > -torch.inf
        relative_NTB = torch.where(exists_NTB, lse_NTB - (largest_N.double()[:, None] / temperature_T)[..., None], 0.0)
        scale_NTB = torch.where(exists_NTB, grad_lse_NTB / temperature_T[:, None], 0.0)
        slopes = Slopes(largest_N, relative_NTB.to(wide), scale_NTB.to(wide), grad_picked_NS.to(wide))

        grad_hidden_NH = torch.zeros(hidden_NH.shape, dtype=wide, device=hidden_NH.device) if need_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH) if need_weight else None
        grad_bias_V = torch.zeros_like(bias_V) if need_bias else None
        operand_NH = hidden_NH.to(operand)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for tile in ctx.tiles:
                span = slice(tile.start, tile.stop)
                weight_CH = weight_VH[span].to(operand)
                grad_NC = ctx.between.gradient(tile, product(operand_NH, weight_CH.T), slopes, operand)
                if grad_bias_V is not None:
                    grad_bias_V[span] = grad_NC.sum(0, dtype=wide)
                if grad_hidden_NH is not None:
                    add_product(grad_hidden_NH, grad_NC, weight_CH)
                if grad_weight_VH is not None:
                    write_product(grad_weight_VH[span], grad_NC.T, operand_NH)
        if grad_hidden_NH is not None:
            grad_hidden_NH = grad_hidden_NH.to(hidden_NH.dtype)
        return grad_hidden_NH, grad_weight_VH, grad_bias_V, None, None, None, None


def tiled_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
    tile_bytes: int | None,
    make: MakeBetween = TorchBetween,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference_head`, in tiles of at most `tile_bytes` bytes or 256 columns, whichever is more.

    Not differentiable twice. Operands of low precision are multiplied with float32 results.

    Args:
        hidden_NH, weight_VH, bias_V, ids_NS, spec: as there.
        tile_bytes: None: 8 MiB on a CPU, 128 MiB on a GPU.
        make: what is done between the products.

    Returns:
        lse_NTB: float64 [N, T, B].
        picked_NS: float32 (float64 for float64 inputs) [N, S].
    """
    lse_NTB, picked_NS = _TiledHead.apply(hidden_NH, weight_VH, bias_V, ids_NS, spec, tile_bytes, make)  # type: ignore[misc]
    return lse_NTB, picked_NS
