"""Held-out loss: what the student makes of samples it is never trained on.

Every term is a mean over the tokens of all held-out samples, as in training: without gradients, in evaluation mode, in
the same order each time. Weights are those of the samples' tasks without any schedule, so that the losses of all steps
can be compared. Neither the random states nor the stream of training see anything of it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger_rows import Row
from kdpipe.data.stream import StreamState, prefetch
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.train.data import GlobalBatch, Reader
from kdpipe.stages.train.held_out import NO_TASK, held_out
from kdpipe.stages.train.objective import Objective
from kdpipe.stages.train.stage import AUDIO, usable
from kdpipe.stages.train.weights import OVER_AUDIO, Weighting
from kdpipe.stages.train.world import World

NOWHERE = StreamState("", 0, 0, 0)
"""Place in the stream of samples that are not read from it."""


def held_out_targets(ctx: Context, plans: Mapping[str, StagePlan]) -> dict[str, Row]:
    """Rows of the targets of all held-out samples that nothing upstream rejected, by id.

    Raises:
        KdpipeError: teachers are not cached for some of them.
    """
    cache, fraction = plans["cache-teachers"], ctx.config.train.validation_fraction
    rows: dict[str, Row] = {}
    waiting = 0
    for sample, heard, wants in usable(ctx, cache) if fraction > 0 else ():
        if not held_out(heard[AUDIO], fraction):
            continue
        row = cache.ledger.get(sample.id, "targets")
        if row is None or any((want.id, want.source) not in cache.fresh for want in wants):
            waiting += 1
        else:
            rows[sample.id] = row
    if waiting:
        raise KdpipeError(
            f"train: cache-teachers is not done for {waiting} held-out samples. Run `kdpipe train`, which runs what it "
            "needs."
        )
    return rows


@dataclass
class _Tally:
    """Sums over the samples of one task.

    Attributes:
        terms: by term, sum over tokens.
        sources: by source and name, likewise; see `objective.Sums`.
        samples, response_tokens, audio_tokens: how many.
    """

    terms: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    sources: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    samples: int = 0
    response_tokens: int = 0
    audio_tokens: int = 0

    def normalizer(self, name: str) -> int:
        """Tokens that a term is a mean over."""
        return max(1, self.audio_tokens if name.split("/")[0] == OVER_AUDIO else self.response_tokens)

    def add(self, other: _Tally) -> None:
        """Adds the sums of other samples."""
        for term, value in other.terms.items():
            self.terms[term] += value
        for place, value in other.sources.items():
            self.sources[place] += value
        self.samples += other.samples
        self.response_tokens += other.response_tokens
        self.audio_tokens += other.audio_tokens

    def as_list(self) -> list[Any]:
        """The same as JSON has it."""
        sources = [[*place, value] for place, value in self.sources.items()]
        return [self.terms, sources, self.samples, self.response_tokens, self.audio_tokens]

    @staticmethod
    def of_list(values: list[Any]) -> _Tally:
        """What `as_list` made."""
        terms, sources, *counts = values
        tally = _Tally(defaultdict(float, terms), defaultdict(float), *counts)
        tally.sources.update({(source, name): value for source, name, value in sources})
        return tally

    def means(self) -> dict[str, Any]:
        """Terms and sources, a token."""
        sources: dict[str, dict[str, float]] = {}
        for (source, name), value in self.sources.items():
            sources.setdefault(source, {})[name] = value / self.normalizer(source)
        terms = {name: value / self.normalizer(name) for name, value in self.terms.items()}
        return {"terms": terms, "sources": sources}


class Validation:
    """Measures the held-out loss, and remembers the best.

    Args:
        model: the student.
        objective: gives the terms of a micro-batch.
        weights: of the terms.
        reader: loads samples.
        targets: rows of the held-out samples' targets, by id; at least one.
        tasks: task of each sample by its id.
        batch_tokens: sequence tokens loaded at once.
        every: steps between two measurements.
        world: the ranks, each of which measures its share of the samples.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        weights: Weighting,
        reader: Reader,
        targets: Mapping[str, Row],
        tasks: Mapping[str, str | None],
        *,
        batch_tokens: int,
        every: int,
        world: World,
    ):
        self._world = world
        self._model = model
        self._objective = objective
        self._weights = weights
        self._reader = reader
        self._every = every
        self._best: tuple[float, int] | None = None
        by_task: dict[str, list[str]] = defaultdict(list)
        for sample in sorted(targets, key=lambda sample: (-targets[sample].length, sample)):
            by_task[tasks[sample] or NO_TASK].append(sample)
        self._groups = [(task, ids) for task in sorted(by_task) for ids in _cut(by_task[task], targets, batch_tokens)]
        self._task_weights = {task: weights.of(ids[0]) for task, ids in by_task.items()}

    def recall(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Takes the best step from lines of metrics.jsonl."""
        self._best = None
        for line in lines:
            if "validation" in line:
                self._note(line["validation"]["loss"], line["step"])

    def due(self, step: int) -> bool:
        """Whether to measure after this many steps (the last step apart)."""
        return step % self._every == 0

    @property
    def best_step(self) -> int | None:
        """Step after which the loss was lowest."""
        return None if self._best is None else self._best[1]

    def line(self, step: int) -> dict[str, Any]:
        """Measures after this many steps, as every rank does together; the line for metrics.jsonl."""
        start = time.perf_counter()
        tallies = self._measure()
        whole = _Tally()
        for tally in tallies.values():
            whole.add(tally)
        loss = sum(self._loss(task, tally, whole) for task, tally in tallies.items())
        self._note(loss, step)
        found: dict[str, Any] = {"loss": loss, **whole.means()}
        if set(tallies) != {NO_TASK}:
            found["tasks"] = {
                task: {
                    "loss": self._loss(task, tally, tally),
                    "terms": tally.means()["terms"],
                    "samples": tally.samples,
                }
                for task, tally in tallies.items()
            }
        found |= {"samples": whole.samples, "response_tokens": whole.response_tokens}
        if self._best is not None:
            found |= {"best_loss": self._best[0], "best_step": self._best[1]}
        return {"step": step, "validation": found, "seconds": round(time.perf_counter() - start, 4)}

    def _note(self, loss: float, step: int) -> None:
        if loss < float("inf") and (self._best is None or loss < self._best[0]):
            self._best = (loss, step)

    def _loss(self, task: str, tally: _Tally, over: _Tally) -> float:
        """What the samples of a task add to the mean over the tokens of `over`."""
        weights = self._task_weights[task]
        return sum(weight * tally.terms[name] / over.normalizer(name) for name, weight in weights.items())

    def _measure(self) -> dict[str, _Tally]:
        """Sums by task, over the samples of all ranks."""
        own: dict[str, _Tally] = defaultdict(_Tally)
        groups = self._groups[self._world.rank :: self._world.size]
        items = ((NOWHERE, ids) for _, ids in groups)
        with (
            _undisturbed(self._model, self._objective.device),
            closing(prefetch(items, self._reader.load, depth=1, threads=1)) as batches,
        ):
            for number in range(-(-len(self._groups) // self._world.size)):
                batch = next(batches) if number < len(groups) else None
                micros = () if batch is None else batch.micros
                with self._world.others_there():
                    if self._objective.is_sharded:
                        self._objective.idle(max(self._world.exchange(len(micros))) - len(micros))
                    if batch is not None:
                        own[groups[number][0]].add(self._sums(batch))
                        batch.release()
        tallies: dict[str, _Tally] = {task: _Tally() for task, _ in self._groups}
        for said in self._world.exchange([[task, tally.as_list()] for task, tally in own.items()]):
            for task, values in said:
                tallies[task].add(_Tally.of_list(values))
        return tallies

    def _sums(self, batch: GlobalBatch) -> _Tally:
        tally = _Tally(response_tokens=batch.response_tokens, audio_tokens=batch.audio_tokens)
        for micro in batch.micros:
            made = self._objective(micro.to(self._objective.device), {})
            pairs = {(source, name): value for source, seen in made.sources.items() for name, value in seen.items()}
            values = torch.stack([*made.terms.values(), *pairs.values()]).tolist()
            one = _Tally(samples=len(micro.batch.ids))
            one.terms.update(zip(made.terms, values, strict=False))
            one.sources.update(zip(pairs, values[len(made.terms) :], strict=True))
            tally.add(one)
        return tally


def _cut(ids: Sequence[str], targets: Mapping[str, Row], budget: int) -> list[list[str]]:
    """Cuts a list of samples into pieces of at most `budget` sequence tokens, or of one sample."""
    pieces: list[list[str]] = []
    tokens = 0
    for sample in ids:
        length = targets[sample].length
        if not pieces or tokens + length > budget:
            pieces.append([])
            tokens = 0
        pieces[-1].append(sample)
        tokens += length
    return pieces


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; each module's mode and the random states are as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
