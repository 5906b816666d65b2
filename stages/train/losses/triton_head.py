"""What lies between the products of the tiled output head, as Triton kernels.

The products stay with the device's own library; between them a tile u = W h [N, C] is read once in the forward pass
(log-sum-exp at every temperature, largest logit, picked logits) and once in the backward pass, which writes its
gradient in the operands' dtype. PyTorch would pass over the tile some ten times. Sums are made in float64: what is
left beside a dominant entry must not be rounded away. No atomics: results do not depend on scheduling.

One program a row, in steps of WIDTH columns. Runs under `TRITON_INTERPRET=1` on a CPU.

Shape suffixes: N rows, C columns of a tile, S ids a row, T temperatures, B vocabulary blocks.
"""

# Triton's own language: pointers and constants have no useful Python types.
# pyright: basic, reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kdpipe.stages.train.losses.chunked import Slopes, Tile, tiled_head
from kdpipe.stages.train.losses.spec import HeadSpec, constant

_WIDTH = 1024
_PICKS = 128


@triton.jit
def _logits(
    u, bias_ptr, masked_ptr, column, inside, logit_scale, softcap,
    BIAS: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """z of columns of the tile; -inf where masked or outside."""
    if BIAS:
        u += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    z = u * logit_scale
    if CAP:
        x = z / softcap
        shrunk = tl.exp(-2.0 * tl.abs(x))
        far = tl.where(x < 0, -softcap, softcap) * (1.0 - shrunk) / (1.0 + shrunk)
        # 1 - shrunk cancels near 0; the series of tanh is off by less than 2e-9 there.
        x2 = x * x
        near = z * (1.0 - x2 * (1.0 / 3.0 - x2 * (2.0 / 15.0 - x2 * (17.0 / 315.0))))
        z = tl.where(tl.abs(x) < 0.125, near, far)
    if MASK:
        inside = inside & (tl.load(masked_ptr + column, mask=inside, other=1) == 0)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _slope(z, largest, factors_ptr, relative_ptr, temperature_ptr, stride, T: tl.constexpr):
    """sum_T scale * exp((z - largest) / T - relative) for logits z, before picks are added."""
    total = tl.zeros_like(z)
    for t in tl.static_range(T):
        temperature = tl.load(temperature_ptr + t).to(tl.float32)
        shifted = (z - largest) / temperature - tl.load(relative_ptr + t * stride)
        total += tl.load(factors_ptr + t * stride) * tl.exp(shifted)
    return total


@triton.jit
def _to_product(grad, z, logit_scale, softcap, CAP: tl.constexpr):
    """dL/du from dL/dz; 0 where z is -inf."""
    if CAP:
        grad = grad * (1.0 - (z / softcap) * (z / softcap))
    return tl.where(z == float("-inf"), 0.0, grad * logit_scale)


@triton.jit
def _reduce_kernel(
    u_ptr, bias_ptr, masked_ptr, temperature_ptr, lse_ptr, largest_ptr, ids_ptr, picked_ptr,
    columns, first, S, lse_row, lse_t, logit_scale, softcap,
    T: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr,
    WIDTH: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_ptr += row * columns
    lane = tl.arange(0, WIDTH)

    peaks = tl.full((WIDTH,), float("-inf"), tl.float32)
    for start in range(0, columns, WIDTH):
        column = start + lane
        inside = column < columns
        u = tl.load(u_ptr + column, mask=inside, other=0.0)
        z = _logits(u, bias_ptr, masked_ptr, column, inside, logit_scale, softcap, BIAS, CAP, MASK)
        peaks = tl.maximum(peaks, z)
    peak = tl.max(peaks, 0)
    tl.store(largest_ptr + row, tl.maximum(tl.load(largest_ptr + row), peak))
    peak = tl.where(peak == float("-inf"), 0.0, peak)

    for t in tl.static_range(T):
        temperature = tl.load(temperature_ptr + t)
        sums = tl.zeros((WIDTH,), tl.float64)
        for start in range(0, columns, WIDTH):
            column = start + lane
            inside = column < columns
            u = tl.load(u_ptr + column, mask=inside, other=0.0)
            z = _logits(u, bias_ptr, masked_ptr, column, inside, logit_scale, softcap, BIAS, CAP, MASK)
            sums += tl.exp((z - peak) / temperature.to(tl.float32)).to(tl.float64)
        new = tl.log(tl.sum(sums, 0)) + peak.to(tl.float64) / temperature
        place = lse_ptr + row * lse_row + t * lse_t
        old = tl.load(place)
        high = tl.maximum(old, new)
        high = tl.where(high == float("-inf"), 0.0, high)
        tl.store(place, high + tl.log(tl.exp(old - high) + tl.exp(new - high)))

    for start in range(0, S, PICKS):
        pick = start + tl.arange(0, PICKS)
        token = tl.load(ids_ptr + row * S + pick, mask=pick < S, other=-1)
        column = token - first
        here = (column >= 0) & (column < columns)
        u = tl.load(u_ptr + column, mask=here, other=0.0)
        z = _logits(u, bias_ptr, masked_ptr, column, here, logit_scale, softcap, BIAS, CAP, MASK)
        tl.store(picked_ptr + row * S + pick, z, mask=here)


@triton.jit
def _gradient_kernel(
    u_ptr, bias_ptr, masked_ptr, temperature_ptr, largest_ptr, relative_ptr, factors_ptr, out_ptr,
    columns, lse_row, lse_t, logit_scale, softcap,
    T: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factors_ptr += row * lse_row
    relative_ptr += row * lse_row
    largest = tl.load(largest_ptr + row)
    for start in range(0, columns, WIDTH):
        column = start + tl.arange(0, WIDTH)
        inside = column < columns
        u = tl.load(u_ptr + row * columns + column, mask=inside, other=0.0)
        z = _logits(u, bias_ptr, masked_ptr, column, inside, logit_scale, softcap, BIAS, CAP, MASK)
        grad = _slope(z, largest, factors_ptr, relative_ptr, temperature_ptr, lse_t, T)
        grad = _to_product(grad, z, logit_scale, softcap, CAP)
        tl.store(out_ptr + row * columns + column, grad.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _pick_gradient_kernel(
    u_ptr, bias_ptr, masked_ptr, temperature_ptr, largest_ptr, relative_ptr, factors_ptr, ids_ptr, values_ptr, out_ptr,
    columns, first, S, lse_row, lse_t, logit_scale, softcap,
    T: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, MASK: tl.constexpr, PICKS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of picked columns anew, their picks included: rounded once, after the two have cancelled."""
    row = tl.program_id(0).to(tl.int64)
    factors_ptr += row * lse_row
    relative_ptr += row * lse_row
    largest = tl.load(largest_ptr + row)
    for start in range(0, S, PICKS):
        pick = start + tl.arange(0, PICKS)
        token = tl.load(ids_ptr + row * S + pick, mask=pick < S, other=-1)
        column = token - first
        here = (column >= 0) & (column < columns)
        u = tl.load(u_ptr + row * columns + column, mask=here, other=0.0)
        z = _logits(u, bias_ptr, masked_ptr, column, here, logit_scale, softcap, BIAS, CAP, MASK)
        grad = _slope(z, largest, factors_ptr, relative_ptr, temperature_ptr, lse_t, T)
        grad += tl.load(values_ptr + row * S + pick, mask=here, other=0.0)
        grad = _to_product(grad, z, logit_scale, softcap, CAP)
        tl.store(out_ptr + row * columns + column, grad.to(out_ptr.dtype.element_ty), mask=here)


def unique_picks(ids_NS: torch.Tensor, values_NS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's ids once (-1 fills up), and the sums of their values."""
    ids_NS, order_NS = ids_NS.sort(dim=1, stable=True)
    values_NS = values_NS.gather(1, order_NS)
    first_NS = torch.ones_like(ids_NS, dtype=torch.bool)
    first_NS[:, 1:] = ids_NS[:, 1:] != ids_NS[:, :-1]
    place_NS = first_NS.cumsum(1) - 1
    row_N1 = torch.arange(len(ids_NS), device=ids_NS.device)[:, None]
    totals_NS = torch.zeros_like(values_NS).index_put_((row_N1, place_NS), values_NS, accumulate=True)
    return torch.full_like(ids_NS, -1).scatter_(1, place_NS, ids_NS), totals_NS


class TritonBetween:
    """`Between` in Triton kernels; see `kdpipe.stages.train.losses.chunked`."""

    def __init__(self, ids_NS: torch.Tensor, bias_V: torch.Tensor | None, spec: HeadSpec, tiles: Sequence[Tile]):
        device = ids_NS.device
        # The kernels count on dense memory. The ids are a copy: nobody may change them before the backward pass.
        self._ids_NS = ids_NS.clone(memory_format=torch.contiguous_format)
        self._bias_V, self._spec = None if bias_V is None else bias_V.contiguous(), spec
        self._masked_V = torch.zeros(spec.valid if spec.masked else 1, dtype=torch.int8, device=device)
        if spec.masked:
            self._masked_V[constant(spec.masked, device)] = 1
        # float64: peak / T must be the same number here and where the losses divide a picked logit by T.
        self._temperature_T = constant(spec.temperatures, device, torch.float64)
        self._unique: tuple[torch.Tensor, torch.Tensor] | None = None
        self._unique_of: Slopes | None = None

    def _pointers(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor]:
        """Bias and mask from the tile's first column on; any tensor stands in for one that is not read."""
        bias = self._temperature_T if self._bias_V is None else self._bias_V[tile.start :]
        return bias, self._masked_V[tile.start :] if self._spec.masked else self._masked_V

    @property
    def _scalars(self) -> tuple[float, float]:
        return self._spec.logit_scale, self._spec.softcap or 1.0

    @property
    def _flags(self) -> dict[str, int | bool]:
        return {
            "T": len(self._spec.temperatures),
            "BIAS": self._bias_V is not None,
            "CAP": self._spec.softcap is not None,
            "MASK": bool(self._spec.masked),
        }

    def reduce(
        self, tile: Tile, u_NC: torch.Tensor, lse_NTB: torch.Tensor, largest_N: torch.Tensor, picked_NS: torch.Tensor
    ) -> None:
        rows, columns = u_NC.shape
        if not rows:
            return
        _reduce_kernel[(rows,)](
            u_NC, *self._pointers(tile), self._temperature_T, lse_NTB[:, :, tile.block], largest_N,
            self._ids_NS, picked_NS, columns, tile.start, self._ids_NS.shape[1], lse_NTB.stride(0), lse_NTB.stride(1),
            *self._scalars, **self._flags, WIDTH=_WIDTH, PICKS=_PICKS,
        )  # fmt: skip

    def gradient(self, tile: Tile, u_NC: torch.Tensor, slopes: Slopes, dtype: torch.dtype) -> torch.Tensor:
        rows, columns = u_NC.shape
        out_NC = torch.empty(u_NC.shape, dtype=dtype, device=u_NC.device)
        if not rows:
            return out_NC
        if self._unique is None or self._unique_of is not slopes:
            self._unique = unique_picks(self._ids_NS, slopes.picked_NS)
            self._unique_of = slopes
        ids_NS, values_NS = self._unique
        relative_NT, scale_NT = slopes.relative_NTB[:, :, tile.block], slopes.scale_NTB[:, :, tile.block]
        shared = (u_NC, *self._pointers(tile), self._temperature_T, slopes.largest_N, relative_NT, scale_NT)
        strides = (relative_NT.stride(0), relative_NT.stride(1))
        _gradient_kernel[(rows,)](
            *shared, out_NC, columns, *strides, *self._scalars, **self._flags, WIDTH=_WIDTH
        )  # fmt: skip
        _pick_gradient_kernel[(rows,)](
            *shared, ids_NS, values_NS, out_NC, columns, tile.start, ids_NS.shape[1], *strides,
            *self._scalars, **self._flags, PICKS=_PICKS,
        )  # fmt: skip
        return out_NC


def triton_head(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
    tile_bytes: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `tiled_head`, with Triton kernels between the products; not for float64."""
    return tiled_head(hidden_NH, weight_VH, bias_V, ids_NS, spec, tile_bytes, TritonBetween)
