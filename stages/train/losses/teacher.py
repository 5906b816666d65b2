"""One cached teacher: what it says, and how far the student is from it at the rows they share.

Shape suffixes: N rows of the teacher, K kept entries, D draws from its tail, T temperatures, B vocabulary blocks,
O outcomes (K + B).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.store.distributions import StoredDistribution
from kdpipe.stages.train.losses.divergence import (
    Divergence,
    declared_column,
    sampled_cross_entropy,
    student_outcomes,
    teacher_at_temperature,
)
from kdpipe.stages.train.losses.spec import constant

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
        """What a part's reader gives for one or more samples, one after the other.

        Samples that keep fewer entries than another are filled up with absent ones.
        """
        first = several[0]
        most = max(one.ids.shape[1] for one in several)

        def joined(name: str, absent: float | None = None) -> torch.Tensor:
            arrays = [getattr(one, name) for one in several]
            if absent is not None:
                arrays = [
                    array
                    if array.shape[1] == most
                    else np.pad(array, ((0, 0), (0, most - array.shape[1])), constant_values=absent)
                    for array in arrays
                ]
            return torch.from_numpy(np.concatenate(arrays))

        tensors = {"ids": joined("ids", -1), "logprob": joined("logprob", -np.inf)}
        tensors |= {name: joined(name) for name in ("log_z", "log_tail")}
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
class Blocks:
    """The vocabulary blocks of tails, on the device of the losses.

    Attributes:
        starts_B: int64, first id of each.
        live_B: int64, how many ids of each are part of the softmax.
    """

    starts_B: torch.Tensor
    live_B: torch.Tensor

    @staticmethod
    def of(bounds: Sequence[int], masked_ids: Sequence[int], device: torch.device) -> Blocks:
        """From B + 1 rising bounds and the ids that are left out."""
        masked = set(masked_ids)
        live = [b - a - sum(a <= token < b for token in masked) for a, b in pairwise(bounds)]
        return Blocks(constant(bounds[:-1], device), constant(live, device))


def check_teacher(teacher: TeacherRows, rows: int, bounds: Sequence[int], divergence: Divergence) -> None:
    """Refuses a teacher that does not fit `rows` rows of a head with these blocks, or the divergence.

    Raises:
        KdpipeError: says what does not fit.
    """
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
    check_weights(teacher.token_weights, n, "token_weights of a teacher")
    check_weights(given.rows_valid, n, "rows_valid of a teacher")
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


def check_weights(weights: torch.Tensor | None, rows: int, name: str) -> None:
    """Refuses numbers a row that are not one for each of `rows`."""
    if weights is not None and tuple(weights.shape) != (rows,):
        raise KdpipeError(f"{name}: {tuple(weights.shape)} does not fit {rows} rows.")


def teacher_term(
    given: Distribution,
    picked_NK: torch.Tensor,
    picked_ND: torch.Tensor,
    lse_NB: torch.Tensor,
    blocks: Blocks,
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
    block_NK = (torch.bucketize(given.ids, blocks.starts_B, right=True) - 1).clamp_min(0)
    kept_NB = torch.zeros_like(lse_NB).scatter_add(1, block_NK, present_NK.to(lse_NB.dtype))
    left_NB = (kept_NB < blocks.live_B) & valid_N[:, None]

    # A tail of 0 over ids that exist, which no softmax gives, counts as the smallest number that is not 0.
    log_p_tail_NB = given.log_tail[:, declared_column(given.temperatures, temperature)].float().clamp_min(LOG_TINY)
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
