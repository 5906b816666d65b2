"""The ways of caching that `bench_fidelity.py` compares, and a teacher of which each keeps so much.

Shape suffixes: N positions, R positions of one chunk, H width, V vocabulary, K kept entries, D draws, B blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.train.losses import Distribution

DEEPEST = 512
"""Entries of a teacher at hand, from which less is kept."""
TAIL_BEYOND = 32
"""Entries left out where a teacher's mean tail is measured, by which blocks of equal mass are cut."""
CHUNK = 64
"""Positions taken through a teacher's output head at once."""

Kind = Literal[
    "renormalized",
    "renormalized_both",
    "renormalized_zero",
    "sampled",
    "hybrid",
    "outcomes",
    "interpolated",
    "threshold",
]


@dataclass(frozen=True)
class Form:
    """A way of caching.

    Attributes:
        name: as printed.
        kind: what is kept of a distribution.
            `renormalized`: top-k of mass 1 against the same ids of the student's full softmax, as axolotl 0.19.0 does
            by default; `renormalized_both`: top-k of mass 1 on both sides, as it does with `kd_normalize_topk`;
            `renormalized_zero`: top-k of mass 1 and 0 elsewhere, against the student's full softmax (the same as
            `renormalized` for forward KL, where ids of probability 0 add nothing); `sampled`: independent draws;
            `hybrid`: top-k and as many systematic draws from the tail; `outcomes`: top-k and tails; `interpolated`:
            the same with log-probabilities kept at `anchors` alone; `threshold`: all entries above one probability,
            k on average, and tails.
        blocks: number of tails.
        cut: how the blocks are cut: `geometric` as `block_bounds` does, `mass` into equal parts of the mean tail.
    """

    name: str
    kind: Kind
    blocks: int = 0
    cut: Literal["geometric", "mass"] = "geometric"

    def packed_bytes(self, k: int, vocabulary: int) -> float:
        """Bytes as format 2 of the store has them; `threshold` has 1 for the number of entries."""
        id_bytes = math.ceil(math.log2(vocabulary)) / 8
        match self.kind:
            case "renormalized" | "renormalized_both" | "renormalized_zero":
                return k * (id_bytes + 2)
            case "sampled":
                return k * id_bytes
            case "hybrid":
                return k * (2 * id_bytes + 2) + 4 + 2
            case "outcomes":
                return k * (id_bytes + 2) + 4 + 2 * self.blocks
            case "interpolated":
                return k * id_bytes + 2 * len(anchors(k)) + 4 + 2 * self.blocks
            case "threshold":
                return k * (id_bytes + 2) + 4 + 2 * self.blocks + 1

    def stored_bytes(self, k: int) -> float | None:
        """Bytes in format 1 of the store, with uint32 ids and float32 tails; None for what it could not keep."""
        match self.kind:
            case "renormalized" | "renormalized_both" | "renormalized_zero":
                return 6 * k
            case "sampled":
                return 4 * k
            case "hybrid":
                return 10 * k + 4 + 4
            case "outcomes":
                return 6 * k + 4 + 4 * self.blocks
            case "interpolated" | "threshold":
                return None

    def fitting(self, budget: float, vocabulary: int) -> int:
        """The largest k whose packed bytes fit; 0 where none does."""
        most = min(DEEPEST, vocabulary)
        return max((k for k in range(1, most + 1) if self.packed_bytes(k, vocabulary) <= budget), default=0)


def anchors(k: int) -> list[int]:
    """Ranks below k whose log-probabilities `interpolated` keeps: the first eight, then ever fewer, and the last."""
    ranks, rank = [], 0
    while rank < k:
        ranks.append(rank)
        rank = max(rank + 1, round(rank * 1.25))
    return sorted({*ranks, k - 1})


FORMS = (
    Form("top-k renormalized", "renormalized"),
    Form("top-k renormalized, both sides", "renormalized_both"),
    Form("top-k renormalized, 0 elsewhere", "renormalized_zero"),
    Form("sampled", "sampled"),
    Form("hybrid", "hybrid"),
    Form("top-k + tail", "outcomes", 1),
    *(Form(f"top-k + {b} blocks", "outcomes", b) for b in (4, 8, 16, 32)),
    *(Form(f"top-k + {b} blocks of equal mass", "outcomes", b, "mass") for b in (16, 32)),
    Form("threshold + 8 blocks of equal mass", "threshold", 8, "mass"),
    Form("interpolated top-k + 8 blocks of equal mass", "interpolated", 8, "mass"),
)


@dataclass(frozen=True)
class Student:
    """A student at N positions: states after its final norm [N, H] and its output head [V, H], both float32."""

    name: str
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor


@dataclass
class Teacher:
    """A teacher at N positions, and what is cached of it.

    Attributes:
        name: as printed.
        hidden_NH: states after its final norm, float32.
        weight_VH: its output head, float32.
        alignment: ids that count.
        students: who learns from it.
    """

    name: str
    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    alignment: Alignment
    students: Sequence[Student]
    _made: dict[tuple[object, ...], Distribution] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.live = self.alignment.valid - len(self.alignment.masked)
        tail_V, entropy_N, sampled = torch.zeros(self.alignment.valid, dtype=torch.float64), [], []
        generator = torch.Generator().manual_seed(1)
        for log_p_RV in map(self.log_p, self.chunks()):
            p_RV = log_p_RV.exp()
            entropy_N.append(-(p_RV * log_p_RV.clamp_min(-1e4)).sum(1))
            sampled.append(torch.multinomial(p_RV, DEEPEST, replacement=True, generator=generator))
            largest_RK = p_RV.topk(min(TAIL_BEYOND, self.live), dim=1).indices
            tail_V += p_RV.scatter(1, largest_RK, 0.0).sum(0)
        self.tail_V, self.entropy_N, self.sampled_ND = tail_V, torch.cat(entropy_N), torch.cat(sampled)

    def chunks(self) -> Iterator[slice]:
        return (slice(low, low + CHUNK) for low in range(0, len(self.hidden_NH), CHUNK))

    def log_p(self, rows: slice) -> torch.Tensor:
        """The full distribution [R, valid], -inf at masked ids."""
        logits_RV = self.hidden_NH[rows] @ self.weight_VH[: self.alignment.valid].T
        logits_RV[:, list(self.alignment.masked)] = -torch.inf
        return logits_RV.log_softmax(1)

    def bounds(self, form: Form) -> tuple[int, ...]:
        valid = self.alignment.valid
        if form.blocks <= 1:
            return (0, valid)
        if form.cut == "geometric":
            return block_bounds(valid, form.blocks)
        share_V = self.tail_V.cumsum(0) / self.tail_V.sum()
        inner = torch.searchsorted(share_V, torch.arange(1, form.blocks, dtype=torch.float64) / form.blocks) + 1
        bounds = tuple(sorted({0, *inner.clamp(1, valid - 1).tolist(), valid}))
        if len(bounds) <= form.blocks:
            raise KdpipeError(f"{self.name}: the tail cannot be cut into {form.blocks} blocks of equal mass.")
        return bounds

    def cached(self, form: Form, k: int) -> Distribution:
        """What the form keeps, with at most (`threshold`: on average) k entries, rounded as stored."""
        match form.kind:
            case "sampled":
                none = torch.zeros(len(self.hidden_NH), 0)
                zeros = torch.zeros(len(none), 1, 1)
                return Distribution(none.long(), none, zeros[..., 0], zeros, (1.0,), draws=self.sampled_ND[:, None, :k])
            case "hybrid":
                return self.distribution(k, (0, self.alignment.valid), draws=k)
            case "threshold":
                deep = self._deepest(self.bounds(form))
                largest = deep.logprob.flatten().topk(min(k * len(deep.ids), deep.ids.numel())).indices
                keep_NK = torch.zeros(deep.ids.numel(), dtype=torch.bool).scatter(0, largest, True).view(deep.ids.shape)
                keep_NK[:, 0] = True
                return _narrowed(deep, keep_NK, self.bounds(form))
            case _:
                deep = self._deepest(self.bounds(form))
                keep_NK = (torch.arange(deep.ids.shape[1]) < k).expand(deep.ids.shape)
                given = _narrowed(deep, keep_NK, self.bounds(form))
                return _interpolated(given) if form.kind == "interpolated" else given

    def _deepest(self, bounds: tuple[int, ...]) -> Distribution:
        return self.distribution(min(DEEPEST, self.live), bounds)

    def distribution(self, k: int, bounds: tuple[int, ...], draws: int = 0) -> Distribution:
        """What the teacher's stage caches, log-probabilities in float16; computed once."""
        if (k, bounds, draws) not in self._made:
            self._made[k, bounds, draws] = self._distribution(k, bounds, draws)
        return self._made[k, bounds, draws]

    def _distribution(self, k: int, bounds: tuple[int, ...], draws: int) -> Distribution:
        drawing = {}
        if draws:
            generator = torch.Generator().manual_seed(2)
            uniforms = torch.rand(len(self.hidden_NH), 1, dtype=torch.float64, generator=generator)
            drawing = {"draws": draws, "uniforms": uniforms}
        made = distribution(
            self.hidden_NH,
            self.weight_VH,
            k=k,
            temperatures=(1.0,),
            bounds=bounds,
            alignment=self.alignment,
            chunk=CHUNK,
            **drawing,
        )
        return Distribution(
            made["ids"],
            made["logprob"].half().float(),
            made["log_z"],
            made["log_tail"],
            (1.0,),
            draws=made.get("draws"),
        )


def _narrowed(deep: Distribution, keep_NK: torch.Tensor, bounds: tuple[int, ...]) -> Distribution:
    """The same with fewer entries, the rest added to the tails, which are rounded to float16."""
    starts_B = torch.tensor(bounds[:-1])
    block_NK = torch.bucketize(deep.ids, starts_B, right=True) - 1
    dropped_NK = deep.logprob.double().exp().masked_fill(keep_NK, 0.0)
    tail_NB = deep.log_tail[:, 0].double().exp().scatter_add(1, block_NK, dropped_NK)
    width = int(keep_NK.sum(1).max())
    return Distribution(
        deep.ids.masked_fill(~keep_NK, -1)[:, :width].contiguous(),
        deep.logprob.masked_fill(~keep_NK, -torch.inf)[:, :width],
        deep.log_z,
        tail_NB.log().half().float()[:, None],
        deep.temperatures,
    )


def _interpolated(given: Distribution) -> Distribution:
    """The same with log-probabilities that are straight lines in log(rank) between `anchors`."""
    k = given.ids.shape[1]
    ranks = anchors(k)
    at = np.log1p(np.arange(k))
    lines = [np.interp(at, at[ranks], row[ranks]) for row in given.logprob.numpy()]
    return replace(given, logprob=torch.from_numpy(np.stack(lines)).float())
