"""What the units of a part hold, found without a teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import (
    TOP,
    ArraySpec,
    hidden_attributes,
    hidden_prefix,
    hidden_specs,
    is_low_rank,
    lens_prefix,
)
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.config import TeachersConfig
from kdpipe.stages.models.vocabulary import Alignment

WINDOW_PARTS = 16
"""Parts whose samples are sorted by length together."""


def together(covers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What serves several: the larger numbers, all of the lists, the last of the mappings.

    Only draws are given up for others: a unit has room for one number of them beside one k.
    """
    merged: dict[str, Any] = {}
    for cover in covers:
        for name, value in cover.items():
            have = merged.get(name)
            if isinstance(value, list):
                merged[name] = sorted({*(have or []), *value})
            else:
                merged[name] = value if isinstance(value, Mapping) else max(have or 0, value)
    if merged.get("mass", 0) >= 1:
        merged["min_k"] = merged["k"]
    return merged


@dataclass(frozen=True)
class Shape:
    """What each unit of a part holds, known before its first batch.

    Attributes:
        config: the `teachers` section.
        cover: `k`, `mass`, `min_k`, `temperatures` and `draws` for distributions, `lens` and `hidden` layers.
        width: of the teacher.
        layers: of the teacher.
        alignment: ids to normalize over; None where there are states alone.
        bases: float16 [r, H] by layer, for the low-rank codecs.
    """

    config: TeachersConfig
    cover: Mapping[str, Any]
    width: int
    layers: int
    alignment: Alignment | None
    bases: Mapping[int, np.ndarray]

    @cached_property
    def layout(self) -> Layout | None:
        """How its distributions are stored; None without."""
        cover = self.cover
        if not cover.get("k"):
            return None
        assert self.alignment is not None
        return Layout(
            k=cover["k"],
            kept=min(cover["k"], self.alignment.valid - len(self.alignment.masked)),
            temperatures=tuple(cover["temperatures"]),
            block_bounds=block_bounds(self.alignment.valid, self.config.tail_blocks),
            logprob=self.config.logprob_dtype,
            mass=None if cover["mass"] >= 1 else cover["mass"],
            min_k=cover["min_k"],
            draws=cover.get("draws"),
        )

    @property
    def lens(self) -> Sequence[int]:
        """Inner layers whose lens distributions are wanted."""
        return self.cover.get("lens", [])

    @property
    def hidden(self) -> Sequence[int]:
        """Layers whose states are wanted."""
        return self.cover.get("hidden", [])

    @property
    def prefixes(self) -> list[str]:
        """Of its distributions."""
        return [TOP, *map(lens_prefix, self.lens)] if self.layout is not None else []

    @property
    def _rank(self) -> int:
        return self.config.rank if is_low_rank(self.config.states) else 0

    @property
    def arrays(self) -> list[ArraySpec]:
        """All arrays."""
        made: list[ArraySpec] = []
        for prefix in self.prefixes:
            assert self.layout is not None
            made += self.layout.specs(prefix)
        for layer in self.hidden:
            made += hidden_specs(layer, self.width, self.config.states, self._rank)
        return made

    @property
    def constants(self) -> dict[str, np.ndarray]:
        """Arrays of the part as a whole."""
        return {f"{hidden_prefix(layer)}/basis": self.bases[layer] for layer in self.hidden if layer in self.bases}

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of the part."""
        made: dict[str, Any] = {"teacher": {"layers": self.layers, "width": self.width}}
        if self.layout is not None:
            assert self.alignment is not None
            made |= self.layout.attributes()
            made["alignment"] = {"valid": self.alignment.valid, "masked": list(self.alignment.masked)}
            made["blocks"] = "geometric"
        if self.hidden:
            made |= hidden_attributes(codec=self.config.states, layers=self.hidden, width=self.width, rank=self._rank)
        return made
