"""The loss: every term of a training step from one pass over the output head.

Everything that cross-entropy and the divergences from cached teachers need of the vocabulary is log-sum-exp and the
logits of a few ids. `linear_logsumexp_gather` gives both without holding [rows, vocabulary]; `head_terms` asks it once
for labels and all teachers together. docs/losses.md has the mathematics.

Shape suffixes: M rows of the head, N rows of one teacher, H width, V vocabulary, S ids a row, K kept entries of a
teacher, T temperatures, B vocabulary blocks.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.train.losses.chunked import chunked_head
from kdpipe.stages.train.losses.divergence import (
    Divergence,
    cross_entropy,
    forward_kl,
    jsd,
    reverse_kl,
    student_outcomes,
    teacher_at_temperature,
    tvd,
)
from kdpipe.stages.train.losses.hidden import Projection, hidden_loss
from kdpipe.stages.train.losses.reference import HeadSpec, accumulator, reference_head

__all__ = [
    "Diagnostics",
    "Distribution",
    "Divergence",
    "HeadTerms",
    "Projection",
    "TeacherRows",
    "cross_entropy",
    "forward_kl",
    "head_terms",
    "hidden_loss",
    "jsd",
    "linear_logsumexp_gather",
    "reverse_kl",
    "student_outcomes",
    "teacher_at_temperature",
    "tvd",
]


LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


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
    form: Literal["auto", "reference", "chunked"] = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp of the logits z = W h, and z at some ids, without holding [N, V].

    Gradients to hidden states, weight and bias are exact through both outputs, ids that occur twice included; a
    weight that needs none costs none. The weight's gradient is accumulated in float32 whatever its dtype.

    Args:
        hidden_NH: hidden states [N, H] after the final norm; N may be 0.
        weight_VH: rows of the output head [V, H].
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
            256 MiB on a GPU.
        form: "reference" holds [N, V]; "chunked" does not; "auto" is chunked.

    Returns:
        lse: [N, T], log sum exp(z / temperature); with `blocks` [N, T, B], one for each block, -inf where all its
            ids are left out.
        picked: float32 (float64 for float64 inputs) [N, S]: z at `ids`; 0 where absent and -inf where the id is left
            out, both without gradient.

    Raises:
        KdpipeError: shapes, ids or settings that do not fit together.
    """
    spec = _head_spec(
        hidden_NH, weight_VH, ids_NS, temperatures, blocks, valid_vocab, masked_ids, bias, logit_scale, softcap
    )
    if form not in ("auto", "reference", "chunked"):
        raise KdpipeError(f"form {form!r} is not one of auto, reference, chunked.")
    with torch.autocast(hidden_NH.device.type, enabled=False):
        if form == "reference":
            lse_NTB, picked_NS = reference_head(hidden_NH, weight_VH, bias, ids_NS, spec)
        else:
            lse_NTB, picked_NS = chunked_head(hidden_NH, weight_VH, bias, ids_NS, spec, chunk_bytes)
    lse_NTB = lse_NTB.to(lse_dtype or accumulator(hidden_NH.dtype))
    return (lse_NTB if blocks is not None else lse_NTB[..., 0]), picked_NS


def _head_spec(
    hidden_NH: torch.Tensor,
    weight_VH: torch.Tensor,
    ids_NS: torch.Tensor,
    temperatures: Sequence[float],
    blocks: Sequence[int] | None,
    valid_vocab: int | None,
    masked_ids: Sequence[int],
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float | None,
) -> HeadSpec:
    rows = weight_VH.shape[0]
    if hidden_NH.ndim != 2 or weight_VH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise KdpipeError(
            f"hidden states {tuple(hidden_NH.shape)} and output head {tuple(weight_VH.shape)} "
            "are not [N, H] and [V, H]."
        )
    if ids_NS.ndim != 2 or len(ids_NS) != len(hidden_NH) or ids_NS.dtype != torch.int64:
        raise KdpipeError(f"ids {tuple(ids_NS.shape)} {ids_NS.dtype} are not int64 [{len(hidden_NH)}, S].")
    if ids_NS.numel() and not (int(ids_NS.min()) >= -1 and int(ids_NS.max()) < rows):
        raise KdpipeError(
            f"ids lie in {int(ids_NS.min())}..{int(ids_NS.max())}, the output head has rows 0..{rows - 1} "
            "(-1 stands for an absent id)."
        )
    if bias is not None and tuple(bias.shape) != (rows,):
        raise KdpipeError(f"bias {tuple(bias.shape)} does not fit an output head of {rows} rows.")
    if not temperatures or min(temperatures) <= 0:
        raise KdpipeError(f"temperatures {tuple(temperatures)} must be positive, and at least one.")
    valid = rows if valid_vocab is None else valid_vocab
    if not 0 < valid <= rows:
        raise KdpipeError(f"valid_vocab {valid} is not within the {rows} rows of the output head.")
    bounds = (*(blocks if blocks is not None else (0,)), valid)
    if bounds[0] != 0 or any(b <= a for a, b in pairwise(bounds)):
        raise KdpipeError(f"blocks {tuple(bounds[:-1])} must ascend from 0 and end below valid_vocab {valid}.")
    masked = sorted(set(masked_ids))
    if masked and not (masked[0] >= 0 and masked[-1] < rows):
        raise KdpipeError(f"masked ids {masked[0]}..{masked[-1]} are not rows of the output head (0..{rows - 1}).")
    masked = masked[: bisect_left(masked, valid)]
    if len(masked) == valid:
        raise KdpipeError("every id of the vocabulary is masked.")
    return HeadSpec(tuple(temperatures), bounds, tuple(masked), logit_scale, softcap)


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
    """

    ids: torch.Tensor
    logprob: torch.Tensor
    log_z: torch.Tensor
    log_tail: torch.Tensor
    temperatures: tuple[float, ...]
    rows_valid: torch.Tensor | None = None


@dataclass(frozen=True)
class TeacherRows:
    """A teacher and the rows of the head that it teaches: `rows` is a slice of step 1 and N = its length."""

    rows: slice
    distribution: Distribution


@dataclass(frozen=True)
class Diagnostics:
    """How student and teacher stand, each float32 [N] without gradient, 0 in rows that are not valid.

    Attributes:
        agreement: 1 where both give their largest probability among the kept entries to the same one, else 0.
        teacher_kept: the teacher's mass on the kept entries.
        student_kept: the student's mass on them.
    """

    agreement: torch.Tensor
    teacher_kept: torch.Tensor
    student_kept: torch.Tensor


@dataclass(frozen=True)
class HeadTerms:
    """Values a row, in nats, before any weighting or normalization.

    Attributes:
        cross_entropy: float32 [M]; 0 where the label is -1.
        divergence: one float32 [N] for each teacher; 0 in rows that are not valid.
        diagnostics: one for each teacher.
    """

    cross_entropy: torch.Tensor
    divergence: tuple[torch.Tensor, ...]
    diagnostics: tuple[Diagnostics, ...]


def head_terms(
    hidden_MH: torch.Tensor,
    weight_VH: torch.Tensor,
    labels_M: torch.Tensor,
    teachers: Sequence[TeacherRows],
    *,
    divergence: Divergence,
    temperature: float,
    t_squared: bool,
    z_loss: float = 0.0,
    blocks: Sequence[int] | None = None,
    valid_vocab: int | None = None,
    masked_ids: Sequence[int] = (),
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_bytes: int | None = None,
    form: Literal["auto", "reference", "chunked"] = "auto",
) -> HeadTerms:
    """Cross-entropy and the divergence from every teacher, with one pass over the output head.

    Args:
        hidden_MH: rows of the head [M, H]: the response positions after the final norm, then those of lens layers.
        weight_VH: the student's output head [V, H].
        labels_M: int64 [M], the token that each row predicts; -1 for rows without cross-entropy.
        teachers: cached distributions and the rows they belong to; rows may be shared.
        divergence: from teacher to student.
        temperature: softmax temperature of the divergences on both sides, declared by every teacher.
        t_squared: multiply divergences by temperature^2, which keeps the size of their gradients (Hinton et al.,
            arXiv 1503.02531, section 2).
        z_loss: weight of the squared log-sum-exp in the cross-entropy.
        blocks: as in `linear_logsumexp_gather`, the blocks of the teachers' tails; None for one tail.
        valid_vocab, masked_ids, bias, logit_scale, softcap, chunk_bytes, form: as in `linear_logsumexp_gather`.

    Raises:
        KdpipeError: as there; shapes of a teacher that do not fit; an undeclared temperature.
    """
    block_count = 1 if blocks is None else len(blocks)
    for teacher in teachers:
        _check_teacher(teacher, len(hidden_MH), block_count)
    columns, ids_MS = _gather_ids(labels_M, teachers)
    temperatures = (1.0,) if temperature == 1.0 or not teachers else (1.0, temperature)
    lse, picked_MS = linear_logsumexp_gather(
        hidden_MH,
        weight_VH,
        ids_MS,
        temperatures=temperatures,
        blocks=blocks or (0,),
        valid_vocab=valid_vocab,
        masked_ids=masked_ids,
        bias=bias,
        logit_scale=logit_scale,
        softcap=softcap,
        # Tails are differences from this sum: its rounding to float32 would cost them two digits.
        lse_dtype=torch.float64,
        chunk_bytes=chunk_bytes,
        form=form,
    )
    lse_1_M = torch.logsumexp(lse[:, 0], dim=1)
    ce_M = cross_entropy(picked_MS[:, 0].double(), lse_1_M, z_loss).to(picked_MS.dtype)
    ce_M = torch.where(labels_M >= 0, ce_M, 0.0)

    live_B = _ids_in_blocks(blocks or (0,), len(weight_VH) if valid_vocab is None else valid_vocab, masked_ids)
    values, diagnostics = [], []
    for teacher, column in zip(teachers, columns, strict=True):
        value_N, diagnostic = _teacher_term(
            teacher.distribution,
            picked_MS[teacher.rows, column],
            lse[teacher.rows, -1],
            blocks or (0,),
            live_B,
            divergence,
            temperature,
        )
        values.append(value_N * temperature**2 if t_squared else value_N)
        diagnostics.append(diagnostic)
    return HeadTerms(ce_M, tuple(values), tuple(diagnostics))


def _check_teacher(teacher: TeacherRows, rows: int, block_count: int) -> None:
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


def _gather_ids(labels_M: torch.Tensor, teachers: Sequence[TeacherRows]) -> tuple[list[slice], torch.Tensor]:
    """Label and kept ids side by side: the columns of each teacher, and ids [M, S].

    Teachers of different rows share columns; a teacher's columns begin where those of its rows are free.
    """
    rows = len(labels_M)
    columns: list[slice] = []
    for index, teacher in enumerate(teachers):
        first, last, _ = teacher.rows.indices(rows)
        taken = [
            column.stop
            for other, column in zip(teachers[:index], columns, strict=True)
            if other.rows.indices(rows)[0] < last and first < other.rows.indices(rows)[1]
        ]
        start = max(taken, default=1)
        columns.append(slice(start, start + teacher.distribution.ids.shape[1]))
    width = max((column.stop for column in columns), default=1)
    ids_MS = torch.full((rows, width), -1, dtype=torch.int64, device=labels_M.device)
    ids_MS[:, 0] = labels_M
    for teacher, column in zip(teachers, columns, strict=True):
        ids_MS[teacher.rows, column] = teacher.distribution.ids
    return columns, ids_MS


def _ids_in_blocks(blocks: Sequence[int], valid: int, masked_ids: Sequence[int]) -> list[int]:
    """How many ids of each block are part of the softmax."""
    masked = set(masked_ids)
    return [b - a - sum(a <= token < b for token in masked) for a, b in pairwise((*blocks, valid))]


def _teacher_term(
    given: Distribution,
    picked_NK: torch.Tensor,
    lse_NB: torch.Tensor,
    blocks: Sequence[int],
    live_B: Sequence[int],
    divergence: Divergence,
    temperature: float,
) -> tuple[torch.Tensor, Diagnostics]:
    log_p_NK = teacher_at_temperature(given.logprob, given.log_z, given.temperatures, temperature)
    present_NK = (given.ids >= 0) & (log_p_NK > -torch.inf)
    valid_N = present_NK.any(1) if given.rows_valid is None else given.rows_valid
    present_NK = present_NK & valid_N[:, None]
    starts_B = torch.tensor(list(blocks), device=given.ids.device)
    block_NK = (torch.bucketize(given.ids, starts_B, right=True) - 1).clamp_min(0)
    kept_NB = torch.zeros_like(lse_NB).scatter_add(1, block_NK, present_NK.to(lse_NB.dtype))
    left_NB = (kept_NB < torch.tensor(live_B, device=kept_NB.device)) & valid_N[:, None]

    # A tail of 0 over ids that exist, which no softmax gives, counts as the smallest number that is not 0.
    log_p_tail_NB = given.log_tail[:, given.temperatures.index(temperature)].float().clamp_min(LOG_TINY)
    log_p_NM = torch.cat(
        [log_p_NK.masked_fill(~present_NK, -torch.inf), log_p_tail_NB.masked_fill(~left_NB, -torch.inf)], dim=1
    )
    # Entries stored in float16 do not quite sum to one; a divergence is one only between distributions.
    total_N1 = torch.logsumexp(log_p_NM, dim=1, keepdim=True)
    log_p_NM = log_p_NM - torch.where(valid_N[:, None], total_N1, 0.0)

    log_q_NK, log_q_tail_NB = student_outcomes(picked_NK, lse_NB, block_NK, present_NK, left_NB, temperature)
    value_N = divergence(log_p_NM, torch.cat([log_q_NK, log_q_tail_NB], dim=1))

    kept = log_p_NM[:, : log_q_NK.shape[1]]
    agreement_N = (kept.argmax(1) == log_q_NK.detach().argmax(1)) & present_NK.any(1)
    student_kept_N = log_q_NK.detach().exp().sum(1)
    return value_N, Diagnostics(agreement_N.float(), kept.exp().sum(1), student_kept_N.float())
