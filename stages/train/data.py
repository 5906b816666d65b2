"""What a training step reads: clips and prompts for the student, and what the teachers said, from the store.

Everything here runs in threads ahead of the step. No teacher's weights are needed, and none are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kdpipe.data.audio import decode
from kdpipe.data.errors import KdpipeError, Rejected, StoreError
from kdpipe.data.manifest import Sample
from kdpipe.data.store.arena import Arena, Ring
from kdpipe.data.store.distributions import StoredDistribution
from kdpipe.data.store.format import STORED_AS, TARGET_IDS, TOP, hidden_prefix, lens_prefix
from kdpipe.data.store.reader import PartReader, Store
from kdpipe.data.stream import StreamState
from kdpipe.stages.config import Config
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.packing import pack, split_by_size
from kdpipe.stages.models.prompt import fill
from kdpipe.stages.train.losses import Distribution, StoredStates
from kdpipe.stages.train.objective import MicroBatch
from kdpipe.stages.train.terms import Terms


@dataclass(frozen=True)
class GlobalBatch:
    """The samples of one optimizer step.

    Attributes:
        after: the stream's state once the step is done.
        micros: its micro-batches.
        response_tokens: of all micro-batches together; the normalizer of most terms.
        audio_tokens: likewise; the normalizer of the acoustic term.
        tokens: whole sequences, without padding.
        release: gives the memory of the teachers' states back; call it when the step is done.
    """

    after: StreamState
    micros: tuple[MicroBatch, ...]
    response_tokens: int
    audio_tokens: int
    tokens: int
    release: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class _Read:
    """One sample with what is known about it; states are only found, and read when it is known where they go.

    Attributes:
        example, textual, acoustic_top: as in `MicroBatch`, for one sequence.
        places: part and row of the textual and of the acoustic teacher's states, by source.
    """

    example: Example
    textual: Mapping[int, StoredDistribution]
    acoustic_top: StoredDistribution | None
    places: Mapping[str, tuple[PartReader, int]]


class Reader:
    """Loads global batches.

    Args:
        config: the configuration.
        terms: what the objective needs of the teachers.
        encoder: the student's tokenizer and feature extractor.
        samples: samples by id.
        store: the teacher store.
        lengths: tokens of each sample's whole sequence when it was cached.
        teacher_layers: depth of the textual teacher, whose last layer's lens is stored as the top; 0 without one.
        pinned: read states into pinned memory, for a GPU.
    """

    def __init__(
        self,
        config: Config,
        terms: Terms,
        encoder: Encoder,
        samples: Mapping[str, Sample],
        store: Store,
        lengths: Mapping[str, int],
        teacher_layers: int,
        *,
        pinned: bool = False,
    ):
        self._ring = Ring(pinned=pinned)
        self._config = config
        self._terms = terms
        self._encoder = encoder
        self._samples = samples
        self._store = store
        self._lengths = lengths
        self._teacher_layers = teacher_layers
        taught = set(terms.layers.values())
        lens = taught if terms.match == "lens" else set()
        self._lens = tuple(sorted(lens | ({teacher_layers} if terms.on("top") else set())))
        self._states = tuple(sorted(taught)) if terms.match == "hidden" else ()
        temperature = 1.0 if terms.compared is None else terms.compared.temperature
        self._temperatures = (1.0,) if temperature == 1.0 else (1.0, temperature)

    def load(self, item: tuple[StreamState, Sequence[str]]) -> GlobalBatch:
        """Reads the samples of a global batch and forms its micro-batches.

        Raises:
            StoreError: something cached is damaged or missing.
            KdpipeError: a clip that could be decoded when it was cached cannot be decoded now.
        """
        after, ids = item
        reads = [self._read(self._samples[sample]) for sample in ids]
        split = split_by_size if self._config.train.packing else split_by_padded_size
        groups = split([read.example.length for read in reads], self._config.train.micro_batch_tokens)
        arena = self._ring.acquire()
        micros = tuple(self._collate([reads[place] for place in group], arena) for group in groups)
        return GlobalBatch(
            after,
            micros,
            sum(len(micro.batch.targets) for micro in micros),
            sum(len(micro.batch.audio_rows) for micro in micros),
            sum(read.example.length for read in reads),
            partial(self._ring.release, arena),
        )

    def _read(self, sample: Sample) -> _Read:
        example = self._example(sample)
        textual: dict[int, StoredDistribution] = {}
        places: dict[str, tuple[PartReader, int]] = {}
        if self._lens or self._states:
            part, row = places["textual"] = self._store.get(sample.id, "textual")
            for layer in self._lens:
                prefix = TOP if layer == self._teacher_layers else lens_prefix(layer)
                textual[layer] = self._distribution(part, row, prefix)
        acoustic_top = None
        if self._terms.on("acoustic_top"):
            part, row = self._store.get(sample.id, "acoustic_top")
            acoustic_top = self._distribution(part, row, TOP)
        if self._terms.acoustic_layers:
            places["acoustic"] = self._store.get(sample.id, "acoustic")
        return _Read(example, textual, acoustic_top, places)

    def _distribution(self, part: PartReader, row: int, prefix: str) -> StoredDistribution:
        compared = self._terms.compared
        assert compared is not None
        return part.distribution(
            row,
            prefix,
            k=compared.k,
            mass=compared.mass if compared.mass < 1 else None,
            min_k=compared.min_k,
            temperatures=self._temperatures,
            draws=compared.draws > 0,
        )

    def _example(self, sample: Sample) -> Example:
        student = self._config.student
        try:
            clips = [
                decode(
                    ref,
                    rate=self._encoder.rate,
                    start=sample.start,
                    end=sample.end,
                    max_seconds=self._config.data.max_seconds,
                )
                for ref in sample.audio
            ]
            prompt = self._encoder.prompt_text(fill(student.prompt, sample), system=student.system, clips=len(clips))
            prompt_ids = self._encoder.prompt_ids(prompt, [len(clip) for clip in clips])
            features = self._encoder.features(clips)
        except Rejected as rejected:
            raise KdpipeError(
                f"sample {sample.id!r}: {rejected.detail} ({rejected.reason}); it could be read when the teachers "
                "were cached. Restore the clip, or run `kdpipe cache-teachers`."
            ) from None
        part, row = self._store.get(sample.id, "targets")
        example = Example(sample.id, prompt_ids, part.read(row, [TARGET_IDS])[TARGET_IDS].tolist(), features)
        if example.length != self._lengths[sample.id]:
            raise StoreError(
                f"sample {sample.id!r}: {example.length} tokens, but {self._lengths[sample.id]} when it was cached. "
                "The tokenizer library changed its ways, or another clip was accepted; remove the cache-teachers "
                "folder and run `kdpipe cache-teachers`."
            )
        return example

    def _collate(self, reads: Sequence[_Read], arena: Arena) -> MicroBatch:
        batch = self._encoder.collate([read.example for read in reads])
        if self._config.train.packing:
            batch = pack(batch, self._encoder.folder.family)
        first = reads[0]
        acoustic_top = [read.acoustic_top for read in reads if read.acoustic_top is not None]
        given = [*first.textual.values(), *acoustic_top]
        return MicroBatch(
            batch,
            {layer: Distribution.from_store([read.textual[layer] for read in reads]) for layer in first.textual},
            Distribution.from_store(acoustic_top) if acoustic_top else None,
            {layer: stored_states([r.places["textual"] for r in reads], layer, arena) for layer in self._states},
            {
                layer: stored_states([r.places["acoustic"] for r in reads], layer, arena)
                for layer in self._terms.acoustic_layers
            },
            given[0].block_bounds[:-1] if given else (0,),
        )


def stored_states(places: Sequence[tuple[PartReader, int]], layer: int, arena: Arena) -> StoredStates:
    """A teacher's states of several units, one after the other, read straight to where they stay.

    Args:
        places: part and row of each.
        layer: of the teacher.
        arena: gives the memory.

    Raises:
        StoreError: something cached is damaged or missing.
    """
    first = places[0][0]
    prefix = hidden_prefix(layer) + "/"
    starts = np.cumsum([0, *(part.tokens(row) for part, row in places)])
    arrays: dict[str, np.ndarray] = {}
    for name in first.state_arrays(layer):
        short = name.removeprefix(prefix)
        if short == "basis":
            arrays[short] = first.constant(name)
            if any(part.digest_of(name) != first.digest_of(name) for part, _ in places):
                return _decoded(places, layer)
            continue
        about = first.attributes["arrays"][name]
        arrays[short] = arena.take((int(starts[-1]), *about["width"]), STORED_AS[about["dtype"]])
        for (part, row), start, stop in zip(places, starts, starts[1:], strict=False):
            part.read_into(row, name, arrays[short][start:stop])
    return StoredStates.from_store(arrays)


def _decoded(places: Sequence[tuple[PartReader, int]], layer: int) -> StoredStates:
    """The same from parts whose bases differ, as happens where parts of two caches were put together."""
    return StoredStates(torch.cat([part.hidden(row, layer).float() for part, row in places]))


def split_by_padded_size(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Groups sequences so that each group, padded to its longest, has at most `budget` tokens.

    From long to short, so that little is padded; a sequence beyond the budget is a group of its own.

    Args:
        lengths: tokens of each sequence.
        budget: tokens of a group, padding included.

    Returns:
        Places in `lengths`.
    """
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= budget:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups
