"""Losses on hidden states: the student's, projected, against a teacher's from the store.

Shape suffixes: N rows (positions), S student width, W teacher width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdpipe.data.errors import KdpipeError

# Guards the division by a row's norm; states of a trained model are far above it.
EPSILON = 1e-6


class Projection(nn.Linear):
    """Learned linear map from student width to teacher width, without bias, in float32.

    It starts as the identity where the widths are equal; otherwise normal with deviation 1 / sqrt(student width),
    which keeps the scale of a state.

    Args:
        student_width: S.
        teacher_width: W.
        generator: source of the initial values, for reproducible runs.
    """

    def __init__(self, student_width: int, teacher_width: int, generator: torch.Generator | None = None):
        super().__init__(student_width, teacher_width, bias=False)
        if student_width == teacher_width:
            nn.init.eye_(self.weight)
        else:
            nn.init.normal_(self.weight, std=student_width**-0.5, generator=generator)


def hidden_loss(
    student_NS: torch.Tensor,
    teacher_NW: torch.Tensor,
    projection: nn.Module | None,
    kind: Literal["cosine", "mse"],
    *,
    scale_N: torch.Tensor | None = None,
    chunk_rows: int = 1024,
) -> torch.Tensor:
    """Distance of each row between projected student state s and teacher state t.

    cosine: 1 - s.t / (|s| |t|), in [0, 2], blind to the length of states.
    mse: mean (s - t)^2 / mean t^2 over the width: squared error in units of the teacher's own mean square, since that
    differs widely between layers and one weight has to serve them all. (Normalizing both sides would give the
    cosine again, times two.)

    Rows are taken in chunks, and each chunk is computed again in the backward pass: no float32 copy of all
    states, the student's or the teacher's, is ever held.

    Args:
        student_NS: student states [N, S], any float dtype.
        teacher_NW: teacher states as stored [N, W]: any float dtype, or int8 with `scale_N`.
        projection: maps [n, S] in float32 to [n, W]; None where the widths are equal.
        kind: the distance.
        scale_N: factor of each stored teacher row [N], or None for 1.
        chunk_rows: rows in a chunk.

    Returns:
        float32 [N].

    Raises:
        KdpipeError: unknown kind, shapes that do not fit, or integer states without their scale.
    """
    if kind not in ("cosine", "mse"):
        raise KdpipeError(f"distance of hidden states {kind!r} is not one of cosine, mse.")
    if len(student_NS) != len(teacher_NW):
        raise KdpipeError(f"{len(student_NS)} student states stand against {len(teacher_NW)} teacher states.")
    if projection is None and student_NS.shape[1] != teacher_NW.shape[1]:
        raise KdpipeError(
            f"student states are {student_NS.shape[1]} wide, the teacher's {teacher_NW.shape[1]}: "
            "a projection is needed."
        )
    if scale_N is None and not teacher_NW.is_floating_point():
        raise KdpipeError(f"teacher states are stored as {teacher_NW.dtype}; their scale for each row is missing.")

    def distance(student: torch.Tensor, teacher: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        student, teacher = student.float(), teacher.float()
        if scale is not None:
            teacher = teacher * scale.float().reshape(-1, 1)
        if projection is not None:
            student = projection(student)
        if kind == "cosine":
            return 1.0 - F.cosine_similarity(student, teacher, dim=1, eps=EPSILON)
        return (student - teacher).square().mean(1) / (teacher.square().mean(1) + EPSILON)

    if not len(student_NS):
        return student_NS.float().sum(1)
    values = []
    for start in range(0, len(student_NS), chunk_rows):
        span = slice(start, start + chunk_rows)
        scale = None if scale_N is None else scale_N[span]
        value = checkpoint(
            distance, student_NS[span], teacher_NW[span], scale, use_reentrant=False, preserve_rng_state=False
        )
        values.append(value)
    return torch.cat(values)
