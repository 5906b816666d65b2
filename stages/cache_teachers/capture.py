"""Teacher-forced forward passes over many samples, written down part by part.

Dimension key: N response rows (or audio rows) of a batch, H width of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger import Ledger
from kdpipe.data.manifest import Sample
from kdpipe.data.store.codec import Fidelity, decode_states, encode_states
from kdpipe.data.store.format import (
    TOP,
    ArraySpec,
    distribution_attributes,
    distribution_specs,
    hidden_attributes,
    hidden_prefix,
    hidden_specs,
    lens_prefix,
    under,
)
from kdpipe.data.stream import prefetch
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.cache_teachers.blocks import block_bounds
from kdpipe.stages.cache_teachers.draws import uniforms
from kdpipe.stages.cache_teachers.head import distribution
from kdpipe.stages.cache_teachers.parts import building
from kdpipe.stages.cache_teachers.targets import THREADS
from kdpipe.stages.config import TeachersConfig
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.progress import progress

FIDELITY_ROWS = 256
"""Rows of a layer, evenly spaced, on which a codec is measured in each forward pass."""


@dataclass(frozen=True)
class Job:
    """One unit to make.

    Attributes:
        wants: the samples it serves.
        samples: those samples.
        example: prompt and response, without features.
        cover: what to store.
        tower: positions of the audio tower that its clips take.
    """

    wants: tuple[Wanted, ...]
    samples: tuple[Sample, ...]
    example: Example
    cover: Mapping[str, Any]
    tower: int = 0


class Scribe:
    """Turns batches into the arrays of a part.

    Args:
        loaded: the teacher.
        config: the `teachers` section.
        alignment: ids to normalize over; not needed for states alone.
        over: whether rows are response positions or audio positions.
        cover: `k`, `temperatures` and `draws` for distributions, `lens` and `hidden` layers.

    Attributes:
        arrays: what each unit holds.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: TeachersConfig,
        alignment: Alignment | None,
        over: Literal["response", "audio"],
        cover: Mapping[str, Any],
    ):
        self._loaded = loaded
        self._config = config
        self._alignment = alignment
        self._over = over
        self._k: int = cover.get("k", 0)
        self._temperatures: list[float] = cover.get("temperatures", [])
        self._draws: Mapping[str, int] | None = cover.get("draws")
        self._lens: list[int] = cover.get("lens", [])
        self._hidden: list[int] = cover.get("hidden", [])
        self._bounds = block_bounds(alignment.valid, config.tail_blocks) if alignment is not None else ()
        self._fidelity = {layer: Fidelity() for layer in self._hidden}
        prefixes = [TOP, *map(lens_prefix, self._lens)] if self._k else []
        self.arrays: list[ArraySpec] = []
        for prefix in prefixes:
            self.arrays += distribution_specs(
                prefix,
                self._k,
                len(self._temperatures),
                config.tail_blocks,
                config.logprob_dtype,
                draws=0 if self._draws is None else self._draws["count"],
            )
        for layer in self._hidden:
            self.arrays += hidden_specs(layer, loaded.width, config.states)

    @property
    def attributes(self) -> dict[str, Any]:
        """Attributes of a part, known before its first batch."""
        attributes: dict[str, Any] = {"teacher": {"layers": len(self._loaded.layers), "width": self._loaded.width}}
        if self._k:
            assert self._alignment is not None
            attributes |= distribution_attributes(
                k=self._k, temperatures=self._temperatures, block_bounds=self._bounds, draws=self._draws
            )
            attributes["alignment"] = {"valid": self._alignment.valid, "masked": list(self._alignment.masked)}
            attributes["blocks"] = "geometric"
        if self._hidden:
            attributes |= hidden_attributes(codec=self._config.states, layers=self._hidden, width=self._loaded.width)
        return attributes

    @property
    def measured(self) -> dict[str, Any]:
        """Attributes known after its last batch: how faithful the states' codec is, by layer."""
        if not self._hidden:
            return {}
        return {"fidelity": {hidden_prefix(layer): seen.result() for layer, seen in self._fidelity.items()}}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> list[dict[str, np.ndarray]]:
        """Runs the teacher and cuts what it says into the arrays of each example.

        Args:
            batch: on the CPU.

        Raises:
            KdpipeError: the teacher gives NaN or infinity; names the samples.
        """
        batch = batch.to(self._loaded.device)
        response = self._over == "response"
        rows = batch.response_rows if response else batch.audio_rows
        offsets = batch.response_offsets if response else batch.audio_offsets
        with self._loaded.capture([*self._lens, *self._hidden], rows) as states_NH:
            last_NH = self._loaded.hidden(batch).flatten(0, 1)[rows]
        flat: dict[str, np.ndarray] = {}
        try:
            if self._k:
                flat |= self._distribution(TOP, last_NH, batch)
            for layer in self._lens:
                flat |= self._distribution(lens_prefix(layer), self._loaded.final_norm(states_NH[layer]), batch)
            for layer in self._hidden:
                flat |= under(hidden_prefix(layer), self._states(layer, states_NH[layer]))
        except KdpipeError as error:
            raise KdpipeError(f"{self._loaded.folder.name}, samples {', '.join(batch.ids)}: {error}") from None
        return [{name: array[start:stop] for name, array in flat.items()} for start, stop in pairwise(offsets)]

    def _distribution(self, prefix: str, hidden_NH: torch.Tensor, batch: Batch) -> dict[str, np.ndarray]:
        assert self._alignment is not None
        draws = {}
        if self._draws is not None:
            units = zip(batch.ids, pairwise(batch.response_offsets), strict=True)
            numbers = [uniforms(unit, prefix, stop - start, self._temperatures) for unit, (start, stop) in units]
            draws = {
                "draws": self._draws["count"],
                "draws_k": self._draws["k"],
                "uniforms": torch.from_numpy(np.concatenate(numbers)),
            }
        made = distribution(
            hidden_NH,
            self._loaded.head_weight,
            k=self._k,
            temperatures=self._temperatures,
            bounds=self._bounds,
            alignment=self._alignment,
            chunk=self._config.head_chunk,
            **draws,
        )
        # A draw of -1 wraps to `NO_ID`.
        dtypes = {"ids": np.uint32, "draws": np.uint32, "logprob": np.dtype(self._config.logprob_dtype)}
        arrays = {name: value.cpu().numpy().astype(dtypes.get(name, np.float32)) for name, value in made.items()}
        return under(prefix, arrays)

    def _states(self, layer: int, states_NH: torch.Tensor) -> dict[str, np.ndarray]:
        arrays = encode_states(states_NH, self._config.states)
        step = max(1, len(states_NH) // FIDELITY_ROWS)
        seen = {name: array[::step] for name, array in arrays.items()}
        self._fidelity[layer].update(states_NH[::step].cpu(), decode_states(seen, self._config.states))
        return arrays


def batches(jobs: Sequence[Job], budget: int) -> Iterator[Sequence[Job]]:
    """Cuts sorted jobs into batches of at most `budget` tokens, padding included; a longer one stands alone.

    Positions of the audio tower count likewise, since a short clip can cost a whole window there.
    """
    start = longest = tower = 0
    for stop, job in enumerate(jobs):
        count = stop - start + 1
        if stop > start and max(max(longest, job.example.length) * count, tower + job.tower) > budget:
            yield jobs[start:stop]
            start, longest, tower = stop, 0, 0
        longest, tower = max(longest, job.example.length), tower + job.tower
    if start < len(jobs):
        yield jobs[start:]


def write_down(
    ctx: Context,
    ledger: Ledger,
    source: str,
    jobs: Sequence[Job],
    encoder: Encoder,
    scribe_for: Callable[[Mapping[str, Any]], Scribe],
    features: Callable[[Job], Example] | None = None,
) -> None:
    """Runs a teacher over `jobs` and commits each part as it is done.

    Jobs are taken by what they store, then by length, then by id, so that the same jobs give the same bytes, and
    so does the rest after an interruption.

    Args:
        ctx: the run.
        ledger: takes the parts.
        source: `textual`, `acoustic` or `acoustic_top`.
        jobs: in any order.
        encoder: of the teacher.
        scribe_for: makes the scribe of a part from what it stores.
        features: adds the clips' features to a job's example, in threads ahead; None for text.
    """
    if not jobs:
        return
    config = ctx.config.teachers

    def place(job: Job) -> tuple[str, int, str]:
        return repr(sorted(job.cover.items())), job.example.length, job.example.id

    ordered = sorted(jobs, key=place)
    with progress(len(jobs), f"{source} teacher", "sample") as bar:
        for part_jobs in _parts(ordered, config.part_samples):
            scribe = scribe_for(part_jobs[0].cover)
            ready = prefetch(part_jobs, features or _as_is, depth=4 * THREADS, threads=THREADS if features else 0)
            with (
                closing(ready),
                building(ctx, ledger, source, scribe.arrays, scribe.attributes, part_jobs[0].cover) as part,
            ):
                for batch_jobs in batches(part_jobs, config.batch_tokens):
                    examples = [next(ready) for _ in batch_jobs]
                    for job, arrays in zip(batch_jobs, scribe(encoder.collate(examples)), strict=True):
                        part.add(job.wants, arrays)
                    bar.update(len(batch_jobs))
                heard = [sample for job in part_jobs for sample in job.samples] if features else []
                part.commit(heard, attributes=scribe.measured)


def _as_is(job: Job) -> Example:
    return job.example


def _parts(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    start = 0
    for stop in range(1, len(jobs) + 1):
        if stop == len(jobs) or stop - start == size or jobs[stop].cover != jobs[start].cover:
            yield jobs[start:stop]
            start = stop
