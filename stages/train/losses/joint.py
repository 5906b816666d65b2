"""Every term of a step from one pass over the output head: labels, lens layers and all teachers together.

Shape suffixes: M rows of the head, m of them at hand, N rows of one teacher, n of them at hand, H width, V vocabulary,
S ids a row, K kept entries of a teacher, D draws from its tail, B vocabulary blocks, O outcomes (K + B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Unpack

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.reader import StoredDistribution
from kdpipe.stages.train.losses.divergence import (
    Divergence,
    cross_entropy,
    sampled_cross_entropy,
    student_outcomes,
    teacher_at_temperature,
)
from kdpipe.stages.train.losses.head import Form, linear_loss
from kdpipe.stages.train.losses.spec import HeadSettings

LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Distribution:
    """A cached teacher at N positions, as the store keeps it.

    Attributes:
        ids: int64 [N, K] kept ids, each at most once in a row; -1 where absent.
        logprob: float32 [N, K] their log-probabilities at temperature 1; -inf where absent.
        log_z: float32 [N, T] log normalizers over the whole vocabulary.
        log_tail: float32 [N, T, B] log mass of what the kept entries leave of each block; -inf where it is 0.
        temperatures: the T declared temperatures, 1 among them.
        rows_valid: bool [N], False where this teacher has nothing to say; None: everywhere valid.
        draws: int64 [N, T, D] ids drawn from the tail at each temperature, with repetitions; None without draws.
        block_bounds: B + 1 ids, the blocks of `log_tail`; None where they are not known, and then not checked.
    """

    ids: torch.Tensor
    logprob: torch.Tensor
    log_z: torch.Tensor
    log_tail: torch.Tensor
    temperatures: tuple[float, ...]
    rows_valid: torch.Tensor | None = None
    draws: torch.Tensor | None = None
    block_bounds: tuple[int, ...] | None = None

    @staticmethod
    def from_store(several: Sequence[StoredDistribution]) -> Distribution:
        """What a part's reader gives for one or more samples, one after the other."""
        first = several[0]

        def joined(name: str) -> torch.Tensor:
            return torch.from_numpy(np.concatenate([getattr(one, name) for one in several]))

        tensors = {name: joined(name) for name in ("ids", "logprob", "log_z", "log_tail")}
        draws = None if first.draws is None else joined("draws")
        return Distribution(
            **tensors, temperatures=first.temperatures, draws=draws, block_bounds=tuple(first.block_bounds)
        )

    def of_rows(self, rows: slice) -> Distribution:
        """The same at some of its positions."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Distribution:
        """The same on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Distribution:
        tensors = ("ids", "logprob", "log_z", "log_tail", "rows_valid", "draws")
        present = {name: part for name in tensors if (part := getattr(self, name)) is not None}
        return replace(self, **{name: change(part) for name, part in present.items()})


@dataclass(frozen=True)
class TeacherRows:
    """A teacher and the rows of the head that it teaches.

    Attributes:
        rows: a slice of step 1, N rows long.
        distribution: what the teacher says there.
        weight: factor of its divergence in the loss.
        token_weights: float32 [N] further factors, one a row; None for 1. Rows of weight 0 are masked out.
    """

    rows: slice
    distribution: Distribution
    weight: float = 1.0
    token_weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Diagnostics:
    """How student and teacher stand, each float32 [N] without gradient, 0 in rows that are not valid.

    Attributes:
        agreement: 1 where both give their largest probability among the kept entries to the same one, else 0.
        teacher_kept: the teacher's mass on the kept entries.
        student_kept: the student's mass on them.
        teacher_entropy: entropy (nats) of the teacher over its kept entries and tails.
        student_entropy: of the student over the same outcomes.
    """

    agreement: torch.Tensor
    teacher_kept: torch.Tensor
    student_kept: torch.Tensor
    teacher_entropy: torch.Tensor
    student_entropy: torch.Tensor


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
    blocks = settings.get("blocks") or (0,)
    valid = settings.get("valid_vocab") or len(weight_VH)
    if tuple(labels_M.shape) != (len(hidden_MH),):
        raise KdpipeError(f"labels {tuple(labels_M.shape)} do not fit {len(hidden_MH)} rows.")
    if z_loss < 0:
        raise KdpipeError(f"z_loss {z_loss:g} is negative.")
    for teacher in teachers:
        _check_teacher(teacher, len(hidden_MH), (*blocks, valid), divergence)
    _check_weights(label_token_weights, len(hidden_MH), "label_token_weights")
    column = [_temperature_column(teacher.distribution, temperature) for teacher in teachers]
    places, ids_MS = _gather_ids(labels_M, teachers, column if divergence.sampled else None)
    live_B = _ids_in_blocks(blocks, valid, settings.get("masked_ids", ()))
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
            value_n, diagnostics = _teacher_term(
                teacher.distribution.of_rows(own),
                picked_mS[at, place.kept],
                picked_mS[at, place.draws],
                lse_mTB[at, -1],
                blocks,
                live_B,
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


def _check_teacher(teacher: TeacherRows, rows: int, bounds: Sequence[int], divergence: Divergence) -> None:
    block_count = len(bounds) - 1
    given, start_stop = teacher.distribution, teacher.rows.indices(rows)
    n, k = given.ids.shape
    if start_stop[2] != 1 or len(range(*start_stop)) != n:
        raise KdpipeError(f"a teacher of {n} rows stands at rows {teacher.rows} of {rows}.")
    expected = {
        "logprob": (n, k),
        "log_z": (n, len(given.temperatures)),
        "log_tail": (n, len(given.temperatures), block_count),
    }
    for name, shape in expected.items():
        if tuple(getattr(given, name).shape) != shape:
            raise KdpipeError(
                f"{name} of a cached teacher is {tuple(getattr(given, name).shape)}, expected {shape} for "
                f"{n} rows, {k} entries, {len(given.temperatures)} temperatures and {block_count} tail blocks."
            )
    if given.block_bounds is not None and given.block_bounds != tuple(bounds):
        raise KdpipeError(
            f"a teacher's tails are those of the vocabulary blocks {given.block_bounds}, and the head is asked for "
            f"{tuple(bounds)}: pass its `blocks` (all bounds but the last) and `valid_vocab` (the last)."
        )
    _check_weights(teacher.token_weights, n, "token_weights of a teacher")
    _check_weights(given.rows_valid, n, "rows_valid of a teacher")
    if not divergence.sampled:
        return
    if given.draws is None:
        raise KdpipeError(
            f"divergence {divergence.kind} takes the tail from draws, and this teacher was cached without. Set "
            "`teachers.draws` and run `kdpipe cache-teachers`, or choose another divergence."
        )
    if given.draws.ndim != 3 or given.draws.shape[:2] != (n, len(given.temperatures)) or not given.draws.shape[2]:
        raise KdpipeError(
            f"draws of a cached teacher are {tuple(given.draws.shape)}, expected ({n}, {len(given.temperatures)}, D)."
        )


def _check_weights(weights: torch.Tensor | None, rows: int, name: str) -> None:
    if weights is not None and tuple(weights.shape) != (rows,):
        raise KdpipeError(f"{name}: {tuple(weights.shape)} does not fit {rows} rows.")


def _temperature_column(given: Distribution, temperature: float) -> int:
    return given.temperatures.index(temperature) if temperature in given.temperatures else 0


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


def _ids_in_blocks(blocks: Sequence[int], valid: int, masked_ids: Sequence[int]) -> list[int]:
    """How many ids of each block are part of the softmax."""
    masked = set(masked_ids)
    return [b - a - sum(a <= token < b for token in masked) for a, b in pairwise((*blocks, valid))]


def _teacher_term(
    given: Distribution,
    picked_NK: torch.Tensor,
    picked_ND: torch.Tensor,
    lse_NB: torch.Tensor,
    blocks: Sequence[int],
    live_B: Sequence[int],
    divergence: Divergence,
    temperature: float,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Divergence [N] from a teacher, and its diagnostics in the order of `Diagnostics`."""
    log_p_NK = teacher_at_temperature(given.logprob, given.log_z, given.temperatures, temperature)
    present_NK = (given.ids >= 0) & (log_p_NK != -torch.inf)
    valid_N = present_NK.any(1) if given.rows_valid is None else given.rows_valid
    if divergence.sampled and given.rows_valid is None:
        valid_N = torch.ones_like(valid_N)
    present_NK = present_NK & valid_N[:, None]
    starts_B = torch.tensor(list(blocks), device=given.ids.device)
    block_NK = (torch.bucketize(given.ids, starts_B, right=True) - 1).clamp_min(0)
    kept_NB = torch.zeros_like(lse_NB).scatter_add(1, block_NK, present_NK.to(lse_NB.dtype))
    left_NB = (kept_NB < torch.tensor(live_B, device=kept_NB.device)) & valid_N[:, None]

    # A tail of 0 over ids that exist, which no softmax gives, counts as the smallest number that is not 0.
    log_p_tail_NB = given.log_tail[:, given.temperatures.index(temperature)].float().clamp_min(LOG_TINY)
    log_p_NO = torch.cat(
        [log_p_NK.masked_fill(~present_NK, -torch.inf), log_p_tail_NB.masked_fill(~left_NB, -torch.inf)], dim=1
    )
    # Entries stored in float16 do not quite sum to one; a divergence is one only between distributions.
    total_N1 = torch.logsumexp(log_p_NO, dim=1, keepdim=True)
    log_p_NO = log_p_NO - torch.where(valid_N[:, None], total_N1, 0.0)

    log_q_NK, log_q_tail_NB = student_outcomes(picked_NK, lse_NB, block_NK, present_NK, left_NB, temperature)
    log_q_NO = torch.cat([log_q_NK, log_q_tail_NB], dim=1)
    k = log_p_NK.shape[1]
    if divergence.sampled:
        lse_N1 = torch.logsumexp(lse_NB, dim=1, keepdim=True)
        log_q_ND = (picked_ND.double() / temperature - lse_N1).to(picked_ND.dtype)
        tail_N = torch.logsumexp(log_p_NO[:, k:], dim=1)
        value_N = sampled_cross_entropy(log_p_NO[:, :k], log_q_NK, tail_N, log_q_ND)
        value_N = torch.where(valid_N, value_N, 0.0)
    else:
        value_N = divergence(log_p_NO, log_q_NO)
    return value_N, _diagnostics(log_p_NO, log_q_NO.detach(), present_NK)


def _diagnostics(log_p_NO: torch.Tensor, log_q_NO: torch.Tensor, present_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    k = present_NK.shape[1]
    if k:
        agreement_N = (log_p_NO[:, :k].argmax(1) == log_q_NO[:, :k].argmax(1)) & present_NK.any(1)
    else:
        agreement_N = log_p_NO.new_zeros(len(log_p_NO))
    p_NO, q_NO = log_p_NO.exp(), log_q_NO.float().exp()
    return (
        agreement_N.float(),
        p_NO[:, :k].sum(1),
        q_NO[:, :k].sum(1),
        -(p_NO * log_p_NO.clamp_min(LOG_TINY)).sum(1),
        -(q_NO * log_q_NO.float().clamp_min(LOG_TINY)).sum(1),
    )
