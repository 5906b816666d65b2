"""Weights of the terms for the samples at hand: by task, and by step.

The loss of a global batch is

    L(s) = sum over terms k of  f_k(s) / N_k  *  sum over tokens t of  w_k(task of t) * l_k(t)

with l_k(t) the value of term k at token t, w_k the weight for the token's sample, f_k(s) the schedule's factor in step
s, and N_k the number of tokens of the whole global batch (audio tokens for `acoustic`, response tokens for all others),
those of weight 0 included. Nothing in it depends on how the batch is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch

from kdpipe.stages.config_train import ScheduleConfig
from kdpipe.stages.models.inputs import Batch
from kdpipe.stages.train.terms import Terms

OVER_AUDIO = "acoustic"
"""The one term that is a sum over audio tokens; the others are sums over response tokens."""

Factor = float | torch.Tensor
"""Of a term: one number for all tokens, or float32, one number a token."""


def schedule_factor(schedule: ScheduleConfig, step: int, total: int) -> float:
    """Factor of a weight in a step: f = start + (end - start) * g(x), x = (step / total - after) / (until - after).

    x is kept within 0 and 1 (where `after` equals `until`: 0 before it, 1 from it on). linear: g(x) = x; cosine:
    g(x) = (1 - cos(pi x)) / 2.

    Args:
        schedule: start, end, after, until and kind.
        step: from 0.
        total: steps of the whole run.
    """
    share = step / total
    if share >= schedule.until:
        return schedule.end
    if share < schedule.after:
        return schedule.start
    x = (share - schedule.after) / (schedule.until - schedule.after)
    way = x if schedule.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * x))
    return schedule.start + (schedule.end - schedule.start) * way


class Weighting:
    """Weights of the terms by task and step.

    Args:
        terms: of the loss.
        tasks: task of each sample by its id; None for none.
        total_steps: of the whole run, for the schedules.
    """

    def __init__(self, terms: Terms, tasks: Mapping[str, str | None], total_steps: int):
        self._terms = terms
        self._total = total_steps
        self._general = terms.weights
        self._own = {sample: terms.weights_of(task) for sample, task in tasks.items() if task in terms.tasks}

    def schedule(self, step: int) -> dict[str, float]:
        """Factors of the terms whose weight moves, in a step counted from 0."""
        return {name: schedule_factor(one, step, self._total) for name, one in self._terms.schedules.items()}

    def of(self, sample: str) -> dict[str, float]:
        """Weight of each term for a sample, apart from any schedule."""
        return self._own.get(sample, self._general)

    def factors(self, batch: Batch, step: int, normalizer: Callable[[str], int]) -> dict[str, Factor]:
        """Factor of each term in the loss of a micro-batch.

        Args:
            batch: its samples, on the device where the factors are wanted.
            step: from 0.
            normalizer: number of tokens of the global batch that a term is a mean over.
        """
        moved = self.schedule(step)
        weights = [self.of(sample) for sample in batch.ids]
        factors: dict[str, Factor] = {}
        for name in self._general:
            count, factor = normalizer(name), moved.get(name, 1.0)
            values = [own[name] * factor / count for own in weights]
            if len(set(values)) == 1:
                factors[name] = values[0]
                continue
            offsets = torch.tensor(batch.audio_offsets if name == OVER_AUDIO else batch.response_offsets)
            tokens = torch.tensor(values, dtype=torch.float32).repeat_interleave(offsets.diff())
            factors[name] = tokens.to(batch.targets.device)
        return factors


def add(factors: Iterable[Factor]) -> Factor:
    """The sum of factors of the same tokens."""
    total: Factor = 0.0
    for factor in factors:
        total = total + factor
    return total


def split(factor: Factor) -> tuple[float, torch.Tensor | None]:
    """A factor as the losses take it: one number, and numbers a token where there are any."""
    return (1.0, factor) if isinstance(factor, torch.Tensor) else (factor, None)


def weighed(values: Iterable[torch.Tensor], factor: Factor) -> torch.Tensor:
    """Sum over the rows of all values, each row times its factor; rows of factor 0 add nothing, whatever they hold."""
    if not isinstance(factor, torch.Tensor):
        return factor * torch.stack([value.sum() for value in values]).sum()
    return torch.stack([torch.where(factor != 0, value * factor, 0.0).sum() for value in values]).sum()
