"""The primitive of every loss, and its forms.

Everything that cross-entropy and the divergences from cached teachers need of the vocabulary is log-sum-exp and the
logits of a few ids. `linear_logsumexp_gather` gives both, to be differentiated like any function; `linear_loss` takes
the loss as a function and may make its gradients on the way. docs/losses.md has the mathematics and the measurements.

Shape suffixes: N rows (positions), n rows given to a loss at once, H width, V vocabulary, S ids a row, T temperatures,
B vocabulary blocks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Literal, Unpack, get_args

import torch
from torch.distributed.tensor import DTensor, Partial

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses.chunked import tiled_head
from kdpipe.stages.train.losses.in_forward import RowLoss, head_with_loss
from kdpipe.stages.train.losses.reference import reference_head
from kdpipe.stages.train.losses.spec import HeadSettings, HeadSpec, accumulator, head_spec

Form = Literal["auto", "reference", "chunked", "triton", "in_forward"]
"""How the output head is computed: held in memory, in tiles by PyTorch, in tiles by Triton kernels, or in tiles with
the gradients made in the forward pass."""

_Head = Callable[
    [torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor, HeadSpec, "int | None"],
    tuple[torch.Tensor, torch.Tensor],
]


def choose_form(form: Form, hidden_NH: torch.Tensor, weight_VH: torch.Tensor, *, with_loss: bool) -> Form:
    """The form that `auto` stands for, and the proof that a named one can run here.

    On a CPU `in_forward` measured fastest, except for trained weights of low precision, whose gradient it would hold
    in float32. On a GPU it is `triton`, where Triton is installed.

    Args:
        form: what is asked for.
        hidden_NH, weight_VH: the tensors.
        with_loss: the loss is known (`linear_loss`); without it there is no `in_forward`.

    Raises:
        KdpipeError: there is no such form, or it cannot run here.
    """
    if form not in get_args(Form):
        raise KdpipeError(f"form {form!r} of the output head is not one of {', '.join(get_args(Form))}.")
    if form == "in_forward" and not with_loss:
        raise KdpipeError("form 'in_forward' needs the loss as a function: call linear_loss.")
    if form == "triton":
        _check_triton(hidden_NH)
    if form != "auto":
        return form
    if hidden_NH.is_cuda:
        return "triton" if importlib.util.find_spec("triton") is not None else "chunked"
    widened = weight_VH.requires_grad and weight_VH.dtype != accumulator(weight_VH.dtype)
    return "in_forward" if with_loss and not widened else "chunked"


def _check_triton(hidden_NH: torch.Tensor) -> None:
    if importlib.util.find_spec("triton") is None:
        raise KdpipeError("form 'triton' needs the package triton: pip install triton, or choose form 'chunked'.")
    if hidden_NH.dtype == torch.float64:
        raise KdpipeError("form 'triton' computes in float32; for float64 choose form 'chunked' or 'reference'.")
    if not hidden_NH.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise KdpipeError(
            f"form 'triton' runs on CUDA devices, the tensors are on {hidden_NH.device}. Choose form 'auto', or set "
            "TRITON_INTERPRET=1 to have the kernels interpreted (slow, for proofs)."
        )


def _gathered(weight_VH: torch.Tensor) -> torch.Tensor:
    """The whole of a weight; each rank has rows of its own, so the gradients of all are summed up."""
    if not isinstance(weight_VH, DTensor):
        return weight_VH
    return weight_VH.full_tensor(grad_placements=[Partial()] * weight_VH.device_mesh.ndim)


def _head_of(form: Form) -> _Head:
    if form == "triton":
        from kdpipe.stages.train.losses.triton_head import triton_head

        return triton_head
    return tiled_head if form == "chunked" else _materialized


def _materialized(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    bias_V: torch.Tensor | None,
    ids_NS: torch.Tensor,
    spec: HeadSpec,
    tile_bytes: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return reference_head(hidden_NH, weight_VH, bias_V, ids_NS, spec)


def linear_logsumexp_gather(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_NS: torch.Tensor,
    *,
    temperatures: Sequence[float] = (1.0,),
    blocks: Sequence[int] | None = None,
    valid_vocab: int | None = None,
    masked_ids: Sequence[int] = (),
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    lse_dtype: torch.dtype | None = None,
    chunk_bytes: int | None = None,
    form: Form = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of the logits z = W h, and z at some ids, without holding [N, V].

    Gradients to hidden states, weight and bias are exact through both outputs, ids that occur twice included; a
    weight that needs none costs none. The weight's gradient is accumulated in float32 whatever its dtype.

    Args:
        hidden_NH: hidden states [N, H] after the final norm; N may be 0.
        weight_VH: rows of the output head [V, H]; a DTensor, sharded over ranks, is gathered, and its gradient
            summed over the ranks.
        ids_NS: int64 ids to look up [N, S]; -1 is absent.
        temperatures: softmax temperatures.
        blocks: first ids of B ascending vocabulary blocks, beginning with 0; None for the whole vocabulary.
        valid_vocab: rows of the head that belong to the vocabulary; those beyond are left out. None: all.
        masked_ids: further ids that are left out.
        bias: [V], added before scaling.
        logit_scale: factor of the logits.
        softcap: z = softcap * tanh(u / softcap), u the scaled logits.
        lse_dtype: dtype of the log-sum-exp; None: that of the logits.
        chunk_bytes: size of the tile of logits at hand at once (never less than 256 columns); None: 8 MiB on a CPU,
            128 MiB on a GPU.
        form: "reference" holds [N, V]; "chunked" and "triton" (CUDA) do not; "auto": see `choose_form`.

    Returns:
        lse: [N, T], log sum exp(z / temperature); with `blocks` [N, T, B], one for each block, -inf where all its
            ids are left out.
        picked: float32 (float64 for float64 inputs) [N, S]: z at `ids`; 0 where absent and -inf where the id is left
            out, both without gradient.

    Raises:
        KdpipeError: shapes, ids or settings that do not fit together; a form that cannot run here.
    """
    weight_VH = _gathered(weight_VH)
    spec = head_spec(
        hidden_NH,
        weight_VH,
        ids_NS,
        temperatures=temperatures,
        blocks=blocks,
        valid_vocab=valid_vocab,
        masked_ids=masked_ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
    )
    head = _head_of(choose_form(form, hidden_NH, weight_VH, with_loss=False))
    with torch.autocast(hidden_NH.device.type, enabled=False):
        lse_NTB, picked_NS = head(hidden_NH, weight_VH, bias, ids_NS, spec, chunk_bytes)
    lse_NTB = lse_NTB.to(lse_dtype or accumulator(hidden_NH.dtype))
    return (lse_NTB if blocks is not None else lse_NTB[..., 0]), picked_NS


def linear_loss(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_NS: torch.Tensor,
    loss: RowLoss,
    *,
    temperatures: Sequence[float] = (1.0,),
    chunk_bytes: int | None = None,
    form: Form = "auto",
    **settings: Unpack[HeadSettings],
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """A loss of log-sum-exp and picked logits that is a sum over rows, without holding [N, V].

    Args:
        hidden_NH, weight_VH, ids_NS, temperatures: as in `linear_logsumexp_gather`.
        loss: called as `loss(lse, picked, rows)` for consecutive rows, once or several times, with lse float64
            [n, T, B] (B = 1 without blocks), picked [n, S] and the slice of rows they are. Gives the summed loss of
            these rows (a scalar) and a tuple of tensors to be joined along their first dimension. It must not
            depend on how the rows are cut, nor on anything else that needs a gradient.
        chunk_bytes: size of the tile of logits at hand at once; None: as the form chooses (`in_forward`: 128 MiB on
            a CPU, 512 MiB on a GPU).
        form: as in `linear_logsumexp_gather`, or "in_forward": gradients are made in the forward pass, which saves
            computing the logits twice.
        **settings: blocks, valid_vocab, masked_ids, bias, logit_scale, softcap, as in `linear_logsumexp_gather`.

    Returns:
        loss: the scalar, summed over all rows, with gradients to hidden states, weight and bias.
        outputs: what `loss` returned beside it, joined, without gradients.

    Raises:
        KdpipeError: as `linear_logsumexp_gather`.
    """
    weight_VH = _gathered(weight_VH)
    spec, bias = head_spec(hidden_NH, weight_VH, ids_NS, temperatures=temperatures, **settings), settings.get("bias")
    form = choose_form(form, hidden_NH, weight_VH, with_loss=True)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if form == "in_forward":
            return head_with_loss(hidden_NH, weight_VH, bias, ids_NS, spec, loss, chunk_bytes)
        lse_NTB, picked_NS = _head_of(form)(hidden_NH, weight_VH, bias, ids_NS, spec, chunk_bytes)
        value, outputs = loss(lse_NTB, picked_NS, slice(0, len(hidden_NH)))
    return value, tuple(output.detach() for output in outputs)
