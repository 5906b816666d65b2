"""What the output head computes, apart from its weights: shared by every form of it.

Shape suffixes: N rows (positions), H width, V vocabulary, S ids a row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict, Unpack

import torch

from kdpipe.data.errors import KdpipeError


@dataclass(frozen=True)
class HeadSpec:
    """What lies between hidden states and log-sum-exp, apart from the weights.

    Logits are z = softcap * tanh(u / softcap) with u = logit_scale * (W h + bias); without a softcap, z = u.

    Attributes:
        temperatures: softmax temperatures.
        bounds: B + 1 ascending ids; block b holds ids `bounds[b] .. bounds[b + 1] - 1`. The last is the number of
            valid rows of the head: what lies beyond is not part of the softmax.
        masked: ascending ids below `bounds[-1]` that are not part of the softmax either.
        logit_scale: factor of the logits (Cohere's `logit_scale`; for Granite 1 / `logits_scaling`).
        softcap: bound of the logits (Gemma), or None.
    """

    temperatures: tuple[float, ...]
    bounds: tuple[int, ...]
    masked: tuple[int, ...]
    logit_scale: float
    softcap: float | None

    @property
    def valid(self) -> int:
        """Rows of the head that belong to the vocabulary."""
        return self.bounds[-1]

    def masked_columns(self, start: int, stop: int, device: torch.device) -> torch.Tensor | None:
        """Masked ids in `start .. stop - 1`, counted from `start` (int64), or None where there are none."""
        low, high = bisect_left(self.masked, start), bisect_left(self.masked, stop)
        if low == high:
            return None
        return constant([token - start for token in self.masked[low:high]], device)


class HeadSettings(TypedDict, total=False):
    """Settings of an output head.

    Attributes:
        blocks: first ids of B ascending vocabulary blocks, beginning with 0; None (the default) for one block.
        valid_vocab: rows of the head that belong to the vocabulary; those beyond are left out. None: all.
        masked_ids: further ids that are left out.
        bias: [V], added before scaling.
        logit_scale: factor of the logits (Cohere's `logit_scale`; for Granite 1 / `logits_scaling`); 1 by default.
        softcap: z = softcap * tanh(u / softcap), u the scaled logits; None: none.
    """

    blocks: Sequence[int] | None
    valid_vocab: int | None
    masked_ids: Sequence[int]
    bias: torch.Tensor | None
    logit_scale: float
    softcap: float | None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`torch.tensor` without waiting for what a GPU still does."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b with float32 result whatever the operands' dtype (float64 for float64)."""
    wide = accumulator(a.dtype)
    return torch.mm(a, b) if a.dtype == wide else torch.mm(a, b, out_dtype=wide)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in place, for a total with the dtype of `product`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)


def write_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """out[:] = a @ b, summed up in the dtype of `product` and rounded once."""
    if a.dtype != out.dtype:
        out.copy_(product(a, b))
        return
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # parts of a sum would be rounded to bfloat16
    try:
        torch.mm(a, b, out=out)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def operand_dtype(hidden_NH: torch.Tensor, weight_VH: torch.Tensor) -> torch.dtype:
    """bfloat16 where the device multiplies it with a float32 result, else the accumulator's dtype."""
    native = hidden_NH.is_cuda and hidden_NH.dtype == weight_VH.dtype == torch.bfloat16
    return torch.bfloat16 if native else accumulator(hidden_NH.dtype)


def head_spec(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_NS: torch.Tensor,
    *,
    temperatures: Sequence[float] = (1.0,),
    **settings: Unpack[HeadSettings],
) -> HeadSpec:
    """Checks that tensors and settings fit together; arguments as in `linear_logsumexp_gather`.

    Raises:
        KdpipeError: they do not; says what and where.
    """
    rows = weight_VH.shape[0]
    blocks, valid_vocab, bias = settings.get("blocks"), settings.get("valid_vocab"), settings.get("bias")
    logit_scale, softcap = settings.get("logit_scale", 1.0), settings.get("softcap")
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise KdpipeError(
            f"hidden states {tuple(hidden_NH.shape)} and output head {tuple(weight_VH.shape)} "
            "are not [N, H] and [V, H]."
        )
    if ids_NS.ndim != 2 or len(ids_NS) != len(hidden_NH) or ids_NS.dtype != torch.int64:
        raise KdpipeError(f"ids {tuple(ids_NS.shape)} {ids_NS.dtype} are not int64 [{len(hidden_NH)}, S].")
    if ids_NS.numel():
        low, high = torch.stack(torch.aminmax(ids_NS)).tolist()
        if not (low >= -1 and high < rows):
            raise KdpipeError(
                f"ids lie in {low}..{high}, the output head has rows 0..{rows - 1} (-1 stands for an absent id)."
            )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise KdpipeError(f"bias {tuple(bias.shape)} does not fit an output head of {rows} rows.")
    if isinstance(temperatures, float | int) or not temperatures or not all(0 < t < float("inf") for t in temperatures):
        raise KdpipeError(f"temperatures {temperatures} must be a sequence of positive numbers, and at least one.")
    if logit_scale == 0 or not abs(logit_scale) < float("inf"):
        raise KdpipeError(f"logit_scale {logit_scale} must be a number other than 0.")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise KdpipeError(f"softcap {softcap} must be positive; None turns it off.")
    valid = rows if valid_vocab is None else valid_vocab
    if not 0 < valid <= rows:
        raise KdpipeError(f"valid_vocab {valid} is not within the {rows} rows of the output head.")
    bounds = (*(blocks if blocks is not None else (0,)), valid)
    if bounds[0] != 0 or any(b <= a for a, b in pairwise(bounds)):
        raise KdpipeError(f"blocks {tuple(bounds[:-1])} must ascend from 0 and end below valid_vocab {valid}.")
    masked = sorted(set(settings.get("masked_ids", ())))
    if masked and not (masked[0] >= 0 and masked[-1] < rows):
        raise KdpipeError(f"masked ids {masked[0]}..{masked[-1]} are not rows of the output head (0..{rows - 1}).")
    masked = masked[: bisect_left(masked, valid)]
    if len(masked) == valid:
        raise KdpipeError("every id of the vocabulary is masked.")
    return HeadSpec(tuple(temperatures), bounds, tuple(masked), logit_scale, softcap)
