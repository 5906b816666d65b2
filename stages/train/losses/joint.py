"""Every term of a step from one pass over the output head: labels, lens layers and all teachers together.

Shape suffixes: M rows of the head, m of them at hand, N rows of one teacher, n of them at hand, H width, V vocabulary,
S ids a row, T temperatures, B vocabulary blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Unpack

import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses.divergence import Divergence, cross_entropy, declared_column
from kdpipe.stages.train.losses.head import Form, linear_loss
from kdpipe.stages.train.losses.spec import HeadSettings
from kdpipe.stages.train.losses.teacher import (
    Blocks,
    Diagnostics,
    TeacherRows,
    check_teacher,
    check_weights,
    teacher_term,
)


@dataclass(frozen=True)
class HeadTerms:
    """The loss of all rows, and the values a row it is made of, in nats, before any weighting.

    Attributes:
        loss: float32 (float64 for float64 inputs) scalar with gradients: label_weight * sum cross-entropy + sum over
            teachers of weight * sum divergence, each row times its token weight.
        cross_entropy: float32 [M] without gradients, its z-loss included; 0 where the label is -1.
        divergence: one float32 [N] for each teacher, without gradients, times T^2 where asked; 0 in rows that are
            not valid.
        diagnostics: one for each teacher.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: tuple[torch.Tensor, ...]
    diagnostics: tuple[Diagnostics, ...]


@dataclass(frozen=True)
class _Columns:
    """Where a teacher's ids stand among the picked ones."""

    kept: slice
    draws: slice


def head_terms(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_M: torch.Tensor,
    teachers: Sequence[TeacherRows],
    *,
    divergence: Divergence,
    temperature: float = 1.0,
    t_squared: bool = False,
    label_weight: float = 1.0,
    label_token_weights: torch.Tensor | None = None,
    z_loss: float = 0.0,
    chunk_bytes: int | None = None,
    form: Form = "auto",
    **settings: Unpack[HeadSettings],
) -> HeadTerms:
    """Cross-entropy and the divergence from every teacher, with one pass over the output head.

    To get the same loss from one big batch and from its micro-batches on any number of ranks, put one normalizer into
    all weights: the number of tokens (or the sum of token weights) of the whole global batch.

    Args:
        hidden_MH: rows of the head [M, H]: the response positions after the final norm, then those of lens layers.
        weight_VH: the student's output head [V, H].
        labels_M: int64 [M], the token that each row predicts; -1 for rows without cross-entropy.
        teachers: cached distributions and the rows they belong to; rows may be shared.
        divergence: from teacher to student.
        temperature: softmax temperature of the divergences on both sides, declared by every teacher.
        t_squared: multiply divergences by temperature^2, which keeps the size of their gradients (Hinton et al.,
            arXiv 1503.02531, section 2).
        label_weight: factor of the cross-entropy in the loss.
        label_token_weights: float32 [M] further factors, one a row; None for 1.
        z_loss: weight of the squared log-sum-exp in the cross-entropy.
        chunk_bytes, form: as in `linear_loss`.
        **settings: valid_vocab, masked_ids, bias, logit_scale, softcap, as in `linear_logsumexp_gather`; blocks, as
            there, are the blocks of the teachers' tails (None for one tail).

    Raises:
        KdpipeError: as there; shapes of a teacher that do not fit; an undeclared temperature; draws that are needed
            and missing.
    """
    bounds = (*(settings.get("blocks") or (0,)), settings.get("valid_vocab") or len(weight_VH))
    if tuple(labels_M.shape) != (len(hidden_MH),):
        raise KdpipeError(f"labels {tuple(labels_M.shape)} do not fit {len(hidden_MH)} rows.")
    if z_loss < 0:
        raise KdpipeError(f"z_loss {z_loss:g} is negative.")
    for teacher in teachers:
        check_teacher(teacher, len(hidden_MH), bounds, divergence)
    check_weights(label_token_weights, len(hidden_MH), "label_token_weights")
    column = [declared_column(teacher.distribution.temperatures, temperature) for teacher in teachers]
    places, ids_MS = _gather_ids(labels_M, teachers, column if divergence.sampled else None)
    blocks = Blocks.of(bounds, settings.get("masked_ids", ()), hidden_MH.device)
    scale = temperature**2 if t_squared else 1.0
    width = 1 + len(fields(Diagnostics))  # outputs of a teacher

    def loss(
        lse_mTB: torch.Tensor, picked_mS: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        lse_1_m = torch.logsumexp(lse_mTB[:, 0], dim=1)
        ce_m = cross_entropy(picked_mS[:, 0].double(), lse_1_m, z_loss).to(picked_mS.dtype)
        ce_m = torch.where(labels_M[rows] >= 0, ce_m, 0.0)
        # A term of weight 0 is left out: it may be infinite, and 0 times that is no number.
        total = 0.0 * picked_mS[:0].sum()
        if label_weight:
            total = total + label_weight * _weighted(ce_m, label_token_weights, rows)
        outputs = [ce_m]
        for teacher, place in zip(teachers, places, strict=True):
            own, at = _overlap(teacher.rows, rows, len(labels_M))
            if own.start == own.stop:
                outputs += [ce_m.new_zeros(0)] * width
                continue
            value_n, diagnostics = teacher_term(
                teacher.distribution.of_rows(own),
                picked_mS[at, place.kept],
                picked_mS[at, place.draws],
                lse_mTB[at, -1],
                blocks,
                divergence,
                temperature,
            )
            value_n = value_n * scale
            if teacher.weight:
                total = total + teacher.weight * _weighted(value_n, teacher.token_weights, own)
            outputs += [value_n, *diagnostics]
        return total, tuple(outputs)

    total, outputs = linear_loss(
        hidden_MH,
        weight_VH,
        ids_MS,
        loss,
        temperatures=(1.0,) if temperature == 1.0 or not teachers else (1.0, temperature),
        chunk_bytes=chunk_bytes,
        form=form,
        **settings,
    )
    groups = [outputs[start : start + width] for start in range(1, len(outputs), width)]
    return HeadTerms(
        total, outputs[0], tuple(group[0] for group in groups), tuple(Diagnostics(*group[1:]) for group in groups)
    )


def _weighted(values: torch.Tensor, weights: torch.Tensor | None, rows: slice) -> torch.Tensor:
    """Sum of the values; a row of weight 0 adds nothing, whatever its value."""
    if weights is None:
        return values.sum()
    return torch.where(weights[rows] != 0, values * weights[rows], 0.0).sum()


def _overlap(of: slice, rows: slice, count: int) -> tuple[slice, slice]:
    """What two ranges of rows share: counted from the first one's start, and from the second one's."""
    first, stop, _ = of.indices(count)
    low, high = max(first, rows.start), min(stop, rows.stop)
    high = max(low, high)
    return slice(low - first, high - first), slice(low - rows.start, high - rows.start)


def _gather_ids(
    labels_M: torch.Tensor, teachers: Sequence[TeacherRows], drawn_at: Sequence[int] | None
) -> tuple[list[_Columns], torch.Tensor]:
    """Label, kept ids and draws side by side: the columns of each teacher, and ids [M, S].

    Teachers of different rows share columns; a teacher's columns begin where those of its rows are free.
    """
    rows = len(labels_M)
    columns: list[_Columns] = []
    wanted: list[torch.Tensor] = []
    for index, teacher in enumerate(teachers):
        given = teacher.distribution
        drawn = given.draws[:, drawn_at[index]] if drawn_at is not None and given.draws is not None else None
        ids_NS = given.ids if drawn is None else torch.cat([given.ids, drawn], dim=1)
        first, last, _ = teacher.rows.indices(rows)
        taken = [
            column.draws.stop
            for other, column in zip(teachers[:index], columns, strict=True)
            if other.rows.indices(rows)[0] < last and first < other.rows.indices(rows)[1]
        ]
        start = max(taken, default=1)
        kept = start + given.ids.shape[1]
        columns.append(_Columns(slice(start, kept), slice(kept, start + ids_NS.shape[1])))
        wanted.append(ids_NS)
    width = max((column.draws.stop for column in columns), default=1)
    ids_MS = torch.full((rows, width), -1, dtype=torch.int64, device=labels_M.device)
    ids_MS[:, 0] = labels_M
    for teacher, column, ids_NS in zip(teachers, columns, wanted, strict=True):
        ids_MS[teacher.rows, column.kept.start : column.draws.stop] = ids_NS
    return columns, ids_MS
