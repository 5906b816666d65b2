"""What a user can say about the weights of the loss: in general, by task, and over the steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kdpipe.stages.config_fields import bounded

Term = Literal["top", "layer", "acoustic", "acoustic_top", "sft"]


@dataclass(frozen=True)
class WeightsConfig:
    """L = top * L_top + layer * sum L_layer + acoustic * L_ac + acoustic_top * L_ac_top + sft * L_sft."""

    top: float = bounded(1.0, 0.0)
    """Textual teacher, last layer."""
    layer: float = bounded(0.05, 0.0)
    """Textual teacher, mapped layers (summed over layers)."""
    acoustic: float = bounded(0.05, 0.0)
    """Acoustic teacher's hidden states at the audio positions (mean over layers)."""
    acoustic_top: float = bounded(0.0, 0.0)
    """Acoustic teacher's distribution over the response."""
    sft: float = bounded(0.5, 0.0)
    """Cross-entropy on the response."""


@dataclass(frozen=True)
class TaskWeightsConfig:
    """Weights of the samples of one task, in place of those of `train.weights`; None keeps those."""

    top: float | None = bounded(None, 0.0)
    """As `train.weights.top`, for samples of this task; null keeps that one."""
    layer: float | None = bounded(None, 0.0)
    """Likewise."""
    acoustic: float | None = bounded(None, 0.0)
    """Likewise."""
    acoustic_top: float | None = bounded(None, 0.0)
    """Likewise."""
    sft: float | None = bounded(None, 0.0)
    """Likewise."""

    def over(self, general: WeightsConfig) -> WeightsConfig:
        """The weights of this task's samples where all others have `general`."""
        named = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return dataclasses.replace(general, **named)


@dataclass(frozen=True)
class ScheduleConfig:
    """A factor of a weight that moves from `start` to `end` while training goes on."""

    kind: Literal["linear", "cosine"] = "linear"
    """Form of the way from `start` to `end`."""
    start: float = bounded(1.0, 0.0)
    """Factor up to `after`."""
    end: float = bounded(0.0, 0.0)
    """Factor from `until` on."""
    after: float = bounded(0.0, 0.0, 1.0)
    """Share of the steps after which the factor leaves `start`."""
    until: float = bounded(1.0, 0.0, 1.0)
    """Share of the steps at which it reaches `end`; where equal to `after`, it jumps."""


def largest(several: Iterable[WeightsConfig]) -> WeightsConfig:
    """The largest weight of each term: above zero where the term counts for any sample."""
    every = [dataclasses.asdict(one) for one in several]
    return WeightsConfig(**{name: max(one[name] for one in every) for name in every[0]})
