"""Losses on hidden states: the student's, projected, against a teacher's from the store.

Shape suffixes: N rows (positions), n rows of a chunk, S student width, W teacher width, C stored width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kdpipe.data.errors import KdpipeError

Distance = Literal["cosine", "mse", "smooth_l1"]

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


@dataclass(frozen=True)
class StoredStates:
    """A teacher's states at N positions as the store keeps them, decoded a few rows at a time.

    A row is `(codes * scale) @ basis + mean`, with what there is of the three.

    Attributes:
        codes: [N, C], any float dtype or int8; C = W without a basis.
        scale: [N] factor of each row; needed for int8.
        basis: [C, W] low-rank basis, one for all rows.
        mean: [W], added last.
    """

    codes: torch.Tensor
    scale: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.scale is None and not self.codes.is_floating_point():
            raise KdpipeError(f"teacher states are stored as {self.codes.dtype}; their scale for each row is missing.")
        expected = {"scale": (len(self),), "basis": (self.codes.shape[1], self.width), "mean": (self.width,)}
        for name, shape in expected.items():
            part = getattr(self, name)
            if part is not None and tuple(part.shape) != shape:
                raise KdpipeError(f"{name} of teacher states is {tuple(part.shape)}, expected {shape}.")

    @staticmethod
    def from_store(arrays: Mapping[str, np.ndarray]) -> StoredStates:
        """What a part's `PartReader.states` gives, not decoded: bfloat16 as uint16, float8 as uint8."""
        codes = torch.from_numpy(arrays["states"])
        as_stored = {torch.uint16: torch.bfloat16, torch.uint8: torch.float8_e4m3fn}
        scale, basis = (torch.from_numpy(arrays[name]) if name in arrays else None for name in ("scale", "basis"))
        return StoredStates(codes.view(as_stored.get(codes.dtype, codes.dtype)), scale, basis)

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def width(self) -> int:
        """W."""
        return self.codes.shape[1] if self.basis is None else self.basis.shape[-1]

    def rows(self, span: slice) -> torch.Tensor:
        """Decoded rows, float32 [n, W]."""
        states_nW = self.codes[span].float()
        if self.scale is not None:
            states_nW = states_nW * self.scale[span].float()[:, None]
        if self.basis is not None:
            states_nW = states_nW @ self.basis.float()
        return states_nW if self.mean is None else states_nW + self.mean.float()

    def to(self, device: torch.device) -> StoredStates:
        """The same on another device; from pinned memory while the caller goes on."""
        present = {field.name: part for field in fields(self) if (part := getattr(self, field.name)) is not None}
        moved = {name: part.to(device, non_blocking=True) for name, part in present.items()}
        return replace(self, **moved)


def hidden_loss(
    student_NS: torch.Tensor,
    teacher: StoredStates,
    projection: nn.Module | None,
    kind: Distance,
    *,
    chunk_rows: int = 1024,
) -> torch.Tensor:
    """Distance of each row between projected student state s and teacher state t.

    cosine: 1 - s.t / (|s| |t|), in [0, 2], blind to the length of states.
    mse: mean (s - t)^2 / mean t^2 over the width.
    smooth_l1: mean over the width of d^2 / 2 where |d| < 1 and |d| - 1/2 elsewhere, d = (s - t) / sqrt(mean t^2)
    (Huber): large single dimensions, which states of trained models have, do not rule it.

    The last two are in units of the teacher's own root mean square, since that differs widely between layers and one
    weight has to serve them all. (Normalizing both sides would give the cosine again, times two.)

    Rows are decoded, projected and compared in chunks, and each chunk again in the backward pass: no float32 copy of
    all states, the student's or the teacher's, is ever held.

    Args:
        student_NS: student states [N, S], any float dtype.
        teacher: its states at the same positions.
        projection: maps [n, S] in float32 to [n, W]; None where the widths are equal.
        kind: the distance.
        chunk_rows: rows in a chunk.

    Returns:
        float32 [N].

    Raises:
        KdpipeError: unknown kind, or shapes that do not fit.
    """
    if kind not in get_args(Distance):
        raise KdpipeError(f"distance of hidden states {kind!r} is not one of {', '.join(get_args(Distance))}.")
    if len(student_NS) != len(teacher):
        raise KdpipeError(f"{len(student_NS)} student states stand against {len(teacher)} teacher states.")
    if projection is None and student_NS.shape[1] != teacher.width:
        raise KdpipeError(
            f"student states are {student_NS.shape[1]} wide, the teacher's {teacher.width}: a projection is needed."
        )

    def distance(student_nS: torch.Tensor, span: slice) -> torch.Tensor:
        with torch.autocast(student_nS.device.type, enabled=False):
            return in_float32(student_nS.float(), teacher.rows(span))

    def in_float32(student_nS: torch.Tensor, teacher_nW: torch.Tensor) -> torch.Tensor:
        student_nW = student_nS if projection is None else projection(student_nS)
        if kind == "cosine":
            return 1.0 - F.cosine_similarity(student_nW, teacher_nW, dim=1, eps=EPSILON)
        square_n = teacher_nW.square().mean(1) + EPSILON
        if kind == "mse":
            return (student_nW - teacher_nW).square().mean(1) / square_n
        return F.smooth_l1_loss(
            (student_nW - teacher_nW) / square_n.sqrt()[:, None], torch.zeros_like(teacher_nW), reduction="none"
        ).mean(1)

    if not len(student_NS):
        return student_NS.float().sum(1)
    values = []
    for start in range(0, len(student_NS), chunk_rows):
        span = slice(start, start + chunk_rows)
        values.append(checkpoint(distance, student_NS[span], span, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(values)
