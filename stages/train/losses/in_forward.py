"""The output head with its loss inside: gradients are made in the forward pass, while the logits are at hand.

The loss is a sum over rows, so once the logits of some rows are known, their log-sum-exp and picked logits are, the
loss of these rows, and its derivatives g_lse and g_picked. The tile of logits then becomes

    dL/dz_v = sum_T g_lse[T, block of v] / T * softmax_T(z)_v + sum over picks of v of g_picked

and is multiplied into the gradients of hidden states and weight before the next tile takes its place. Against a
primitive that is differentiated afterwards (`chunked`) this saves one of four matrix products and half of the
exponentials. The price: every tile adds to the whole gradient of the weight, which is held in float32 meanwhile.

Memory beyond inputs and gradients: a float32 tile [R, V] for each temperature, and one more with a softcap, together
at most the stated tile (but never less than one row); for low-precision weights the float32 gradient [V, H] too.

Shape suffixes: N rows (positions), R rows of a tile, H width, V vocabulary, S ids a row, T temperatures, B vocabulary
blocks, P picks of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from kdpipe.stages.train.losses.spec import HeadSpec, accumulator, constant, operand_dtype, product

# All gradients of the weight are touched once a tile, so tiles of few rows are dear.
TILE_BYTES_CPU = 128 * 2**20
TILE_BYTES_GPU = 512 * 2**20
# What lies between the products is done in stripes of a tile, which stay in a CPU's cache.
STRIPE_BYTES = 2 * 2**20
# A low-precision weight is widened, and its gradient added to, in slices.
SLICE_BYTES = 32 * 2**20

RowLoss = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
"""From lse [R, T, B] (float64), picked [R, S] and which rows these are: their part of the loss (a scalar), and
tensors that are to be joined over all rows."""


class _Tile:
    """Buffers for R rows of logits, and everything that is done to them."""

    def __init__(
        self, rows: int, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, bias_V: torch.Tensor | None, spec: HeadSpec
    ):
        self._spec = spec
        self._wide = accumulator(hidden_NH.dtype)
        self._operand = operand_dtype(hidden_NH, weight_VH)
        self._weight_VH = weight_VH[: spec.valid]
        self._bias_V = None if bias_V is None else bias_V[: spec.valid].to(self._wide)
        self._masked = spec.masked_columns(0, spec.valid, hidden_NH.device)
        self._stripe = rows if hidden_NH.is_cuda else max(1, STRIPE_BYTES // (spec.valid * self._wide.itemsize))
        self._slice = max(1, SLICE_BYTES // (weight_VH.shape[1] * self._wide.itemsize))
        shape = (rows, spec.valid)
        # exps[t] holds exp((z - largest) / T) once there; exps[0] is where logits arrive and gradients leave.
        self._exps = [hidden_NH.new_empty(shape, dtype=self._wide) for _ in spec.temperatures]
        self._slope = hidden_NH.new_empty(shape, dtype=self._wide) if spec.softcap is not None else None

    def softmax(self, hidden_RH: torch.Tensor, ids_RS: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """lse [R, T, B] in float64 and picked [R, S]; keeps what `gradient` needs."""
        rows, spec = len(hidden_RH), self._spec
        self._product(hidden_RH, self._exps[0][:rows])
        inside_RS = (ids_RS >= 0) & (ids_RS < spec.valid)
        columns_RS = ids_RS.where(inside_RS, 0)
        self._row_P, self._place_P = inside_RS.nonzero(as_tuple=True)
        self._column_P = columns_RS[inside_RS]
        picked_RS = torch.zeros(ids_RS.shape, dtype=self._wide, device=hidden_RH.device)
        largest_RB = picked_RS.new_empty(rows, len(spec.bounds) - 1)
        sums_RTB = picked_RS.new_empty((rows, len(spec.temperatures), len(spec.bounds) - 1), dtype=torch.float64)
        for start in range(0, rows, self._stripe):
            stripe = slice(start, min(start + self._stripe, rows))
            self._stripe_softmax(stripe, columns_RS[stripe], picked_RS[stripe], largest_RB[stripe], sums_RTB[stripe])
        picked_RS = torch.where(inside_RS, picked_RS, torch.where(ids_RS < 0, 0.0, -torch.inf))
        temperature_T1 = constant(spec.temperatures, hidden_RH.device, torch.float64)[:, None]
        self._shift_RTB = largest_RB.double()[:, None] / temperature_T1
        return sums_RTB.log_() + self._shift_RTB, picked_RS

    def _product(self, hidden_RH: torch.Tensor, out_RV: torch.Tensor) -> None:
        if self._weight_VH.dtype == self._wide:
            torch.mm(hidden_RH, self._weight_VH.T, out=out_RV)
            return
        for start in range(0, self._spec.valid, self._slice):
            columns = slice(start, start + self._slice)
            out_RV[:, columns] = product(hidden_RH, self._weight_VH[columns].to(self._operand).T)

    def _stripe_softmax(
        self,
        stripe: slice,
        columns_rS: torch.Tensor,
        picked_rS: torch.Tensor,
        largest_rB: torch.Tensor,
        sums_rTB: torch.Tensor,
    ) -> None:
        spec, logits_rV = self._spec, self._exps[0][stripe]
        if self._bias_V is not None:
            logits_rV += self._bias_V
        if spec.logit_scale != 1.0:
            logits_rV *= spec.logit_scale
        if spec.softcap is not None and self._slope is not None:
            logits_rV.div_(spec.softcap).tanh_()
            torch.mul(logits_rV, logits_rV, out=self._slope[stripe]).neg_().add_(1.0)
            logits_rV.mul_(spec.softcap)
        if self._masked is not None:
            logits_rV.index_fill_(1, self._masked, -torch.inf)
        torch.gather(logits_rV, 1, columns_rS, out=picked_rS)
        for block, (first, stop) in enumerate(pairwise(spec.bounds)):
            logits_rC = logits_rV[:, first:stop]
            largest_r = logits_rC.amax(1)
            largest_r.masked_fill_(largest_r == -torch.inf, 0.0)
            largest_rB[:, block] = largest_r
            logits_rC -= largest_r[:, None]
        for t in reversed(range(len(spec.temperatures))):
            exps_rV = self._exps[t][stripe]
            if t or spec.temperatures[t] != 1.0:
                torch.div(logits_rV, spec.temperatures[t], out=exps_rV)
            exps_rV.exp_()
            # Summed in float64: the mass left beside a dominant entry must not be rounded away.
            for block, (first, stop) in enumerate(pairwise(spec.bounds)):
                torch.sum(exps_rV[:, first:stop], 1, dtype=torch.float64, out=sums_rTB[:, t, block])

    def gradient(self, lse_RTB: torch.Tensor, grad_lse_RTB: torch.Tensor, grad_picked_RS: torch.Tensor) -> torch.Tensor:
        """dL/du [R, V] for the product u = W h, from the derivatives of the loss; valid until the next tile."""
        rows, spec = len(lse_RTB), self._spec
        temperature_T1 = constant(spec.temperatures, lse_RTB.device, torch.float64)[:, None]
        factor_RTB = grad_lse_RTB.double() / temperature_T1 * (self._shift_RTB - lse_RTB).exp()
        factor_RTB = torch.where(lse_RTB > -torch.inf, factor_RTB, 0.0).to(self._wide)
        for start in range(0, rows, self._stripe):
            stripe = slice(start, min(start + self._stripe, rows))
            for t, exps_RV in enumerate(self._exps):
                for block, (first, stop) in enumerate(pairwise(spec.bounds)):
                    exps_RV[stripe, first:stop] *= factor_RTB[stripe, t, block, None]
                if t:
                    self._exps[0][stripe] += exps_RV[stripe]
        grad_RV = self._exps[0][:rows]
        values_P = grad_picked_RS.to(self._wide)[self._row_P, self._place_P]
        grad_RV.index_put_((self._row_P, self._column_P), values_P, accumulate=True)
        if self._masked is not None:
            grad_RV.index_fill_(1, self._masked, 0.0)
        if self._slope is not None:
            grad_RV *= self._slope[:rows]
        if spec.logit_scale != 1.0:
            grad_RV *= spec.logit_scale
        return grad_RV

    def into_hidden(self, grad_RV: torch.Tensor) -> torch.Tensor:
        """dL/dh [R, H]."""
        if self._weight_VH.dtype == self._wide:
            return torch.mm(grad_RV, self._weight_VH)
        result_RH = grad_RV.new_zeros(len(grad_RV), self._weight_VH.shape[1])
        for start in range(0, self._spec.valid, self._slice):
            columns = slice(start, start + self._slice)
            result_RH += product(grad_RV[:, columns].to(self._operand), self._weight_VH[columns].to(self._operand))
        return result_RH

    def into_weight(self, grad_RV: torch.Tensor, hidden_RH: torch.Tensor, total_VH: torch.Tensor) -> None:
        """Adds dL/dW to `total_VH`, which is wide."""
        if self._operand == self._wide:
            total_VH[: self._spec.valid].addmm_(grad_RV.T, hidden_RH)
            return
        for start in range(0, self._spec.valid, self._slice):
            columns = slice(start, min(start + self._slice, self._spec.valid))
            total_VH[columns] += product(grad_RV[:, columns].to(self._operand).T, hidden_RH)


class _HeadWithLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        ids_NS: torch.Tensor,
        spec: HeadSpec,
        loss: RowLoss,
        tile_bytes: int | None,
    ) -> tuple[torch.Tensor, ...]:
        rows, wide = len(hidden_NH), accumulator(hidden_NH.dtype)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        tile_bytes = tile_bytes or (TILE_BYTES_GPU if hidden_NH.is_cuda else TILE_BYTES_CPU)
        buffers = len(spec.temperatures) + (spec.softcap is not None)
        most = max(1, tile_bytes // (buffers * wide.itemsize * spec.valid))
        tiles = max(1, -(-rows // most))
        height = -(-rows // tiles)
        tile = _Tile(height, hidden_NH, weight_VH, bias_V, spec)
        operand_NH = hidden_NH.to(operand_dtype(hidden_NH, weight_VH))

        grad_hidden_NH = torch.zeros(hidden_NH.shape, dtype=wide, device=hidden_NH.device) if need_hidden else None
        grad_weight_VH = torch.zeros(weight_VH.shape, dtype=wide, device=weight_VH.device) if need_weight else None
        grad_bias_V = torch.zeros(len(weight_VH), dtype=wide, device=weight_VH.device) if need_bias else None
        values, parts = [], []
        for start in range(0, max(rows, 1), max(height, 1)):
            span = slice(start, min(start + height, rows))
            lse_RTB, picked_RS = tile.softmax(operand_NH[span], ids_NS[span])
            with torch.enable_grad():
                lse_RTB, picked_RS = lse_RTB.requires_grad_(), picked_RS.requires_grad_()
                value, outputs = loss(lse_RTB, picked_RS, span)
            values.append(value.detach())
            parts.append([output.detach() for output in outputs])
            if not (need_hidden or need_weight or need_bias) or not value.requires_grad:
                continue
            grad_lse_RTB, grad_picked_RS = torch.autograd.grad(
                value, (lse_RTB, picked_RS), allow_unused=True, materialize_grads=True
            )
            grad_RV = tile.gradient(lse_RTB.detach(), grad_lse_RTB, grad_picked_RS)
            if grad_hidden_NH is not None:
                grad_hidden_NH[span] = tile.into_hidden(grad_RV)
            if grad_weight_VH is not None:
                tile.into_weight(grad_RV, operand_NH[span], grad_weight_VH)
            if grad_bias_V is not None:
                grad_bias_V[: spec.valid] += grad_RV.sum(0)
        totals = ((grad_hidden_NH, hidden_NH.dtype), (grad_weight_VH, weight_VH.dtype))
        gradients = [None if total is None else total.to(dtype) for total, dtype in totals]
        gradients.append(None if grad_bias_V is None or bias_V is None else grad_bias_V.to(bias_V.dtype))
        ctx.save_for_backward(*gradients)
        joined = [torch.cat(column) for column in zip(*parts, strict=True)]
        ctx.mark_non_differentiable(*joined)
        return torch.stack(values).sum(), *joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor, gradients = grad_outputs[0], ctx.saved_tensors
        if (scale := float(factor)) != 1.0:
            # A Python number is not rounded to the gradient's dtype, in which 65536 may be infinite.
            gradients = [None if gradient is None else gradient * scale for gradient in gradients]
        return *gradients, None, None, None, None


def head_with_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
    loss: RowLoss,
    tile_bytes: int | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Sum of `loss` over tiles of rows, and what it returns beside it, joined; see `linear_loss`.

    Not differentiable twice.
    """
    if not torch.is_grad_enabled():
        # `needs_input_grad` does not know of `no_grad`, and gradients would be made for nobody.
        hidden_NH, weight_VH = hidden_NH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    value, *outputs = _HeadWithLoss.apply(hidden_NH, weight_VH, bias_V, ids_NS, spec, loss, tile_bytes)  # type: ignore[misc]
    return value, tuple(outputs)
