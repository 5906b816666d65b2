"""Teacher-forced forward passes over batches of samples, and the arrays of a part that come of them.

Dimension key: N response rows (or audio rows) of a batch, H width of the teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from kdpipe.data.errors import KdpipeError
from kdpipe.data.manifest import Sample
from kdpipe.data.store.codec import Fidelity, decode_states, encode_tensors
from kdpipe.data.store.format import TOP, hidden_prefix, lens_prefix, under
from kdpipe.stages.base import Wanted
from kdpipe.stages.cache_teachers.draws import uniforms
from kdpipe.stages.cache_teachers.head import distribution, refuse_nonfinite
from kdpipe.stages.cache_teachers.shape import Shape
from kdpipe.stages.models.inputs import Batch, Example
from kdpipe.stages.models.loaded import LoadedModel

FIDELITY_ROWS = 256
"""Rows of a layer, evenly spaced, on which a codec is measured in each forward pass."""


@dataclass(frozen=True, slots=True)
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
        shape: what each unit holds.
        over: whether rows are response positions or audio positions.
    """

    def __init__(self, loaded: LoadedModel, shape: Shape, over: Literal["response", "audio"]):
        self._loaded = loaded
        self._shape = shape
        self._over = over
        self._fidelity = {layer: Fidelity() for layer in shape.hidden}

    @property
    def measured(self) -> dict[str, Any]:
        """Attributes known after its last batch: how faithful the states' codec is, by layer."""
        if not self._fidelity:
            return {}
        return {"fidelity": {hidden_prefix(layer): seen.result() for layer, seen in self._fidelity.items()}}

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Callable[[], list[dict[str, np.ndarray]]]:
        """Runs the teacher.

        Args:
            batch: on any device.

        Returns:
            A function that gives the arrays of each example, to be called once, and in the order of the batches; it
            waits for their way to the host, encodes, and may run in another thread while the teacher goes on.

        Raises:
            KdpipeError: the teacher gives NaN or infinity; names the samples. So does the function.
        """
        rows = (batch.response_rows if self._over == "response" else batch.audio_rows).to(self._loaded.device)
        offsets = batch.response_offsets if self._over == "response" else batch.audio_offsets
        shape = self._shape
        with self._loaded.capture([*shape.lens, *shape.hidden], rows) as states_NH:
            last_NH = self._loaded.hidden(batch).flatten(0, 1)[rows]
        made: dict[str, torch.Tensor] = {}
        with self._named(batch):
            if shape.layout is not None:
                made |= self._distribution(TOP, last_NH, batch)
            for layer in shape.lens:
                made |= self._distribution(lens_prefix(layer), self._loaded.final_norm(states_NH[layer]), batch)
            for layer in shape.hidden:
                made |= self._states(layer, states_NH[layer])
        arrived = to_host(made)

        def arrays() -> list[dict[str, np.ndarray]]:
            with self._named(batch):
                return self._cut(arrived(), offsets)

        return arrays

    @contextmanager
    def _named(self, batch: Batch) -> Iterator[None]:
        try:
            yield
        except KdpipeError as error:
            raise KdpipeError(f"{self._loaded.folder.name}, samples {', '.join(batch.ids)}: {error}") from None

    def _distribution(self, prefix: str, hidden_NH: torch.Tensor, batch: Batch) -> dict[str, torch.Tensor]:
        layout, alignment = self._shape.layout, self._shape.alignment
        assert layout is not None and alignment is not None
        draws = {}
        if layout.draws is not None:
            units = zip(batch.ids, pairwise(batch.response_offsets), strict=True)
            numbers = [uniforms(unit, prefix, stop - start, layout.temperatures) for unit, (start, stop) in units]
            draws = {
                "draws": layout.draws["count"],
                "draws_k": layout.draws["k"],
                "uniforms": torch.from_numpy(np.concatenate(numbers)),
            }
        made = distribution(
            hidden_NH,
            self._loaded.head_weight,
            k=layout.kept,
            temperatures=layout.temperatures,
            bounds=layout.block_bounds,
            alignment=alignment,
            chunk=self._shape.config.head_chunk,
            mass=1.0 if layout.mass is None else layout.mass,
            min_k=layout.min_k,
            **draws,
        )
        return under(prefix, made)

    def _states(self, layer: int, states_NH: torch.Tensor) -> dict[str, torch.Tensor]:
        encoded = encode_tensors(states_NH, self._shape.config.states, self._shape.bases.get(layer))
        # `true` is no array of the part: rows to measure the codec on.
        step = max(1, len(states_NH) // FIDELITY_ROWS)
        return under(hidden_prefix(layer), encoded | {"true": states_NH[::step].float()})

    def _cut(self, flat: dict[str, np.ndarray], offsets: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """Arrays of each example, from what the whole batch gave."""
        for prefix in self._shape.prefixes:
            refuse_nonfinite(flat[f"{prefix}/log_z"])
        for layer in self._shape.hidden:
            prefix = hidden_prefix(layer) + "/"
            true = torch.from_numpy(flat.pop(f"{prefix}true"))
            step = max(1, len(flat[f"{prefix}states"]) // FIDELITY_ROWS)
            mine = {name.removeprefix(prefix): a[::step] for name, a in flat.items() if name.startswith(prefix)}
            if layer in self._shape.bases:
                mine["basis"] = self._shape.bases[layer]
            self._fidelity[layer].update(true, decode_states(mine, self._shape.config.states).float())
        return [self._unit({name: array[a:b] for name, array in flat.items()}) for a, b in pairwise(offsets)]

    def _unit(self, flat: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        arrays = {name: array for name, array in flat.items() if name.startswith("hidden/")}
        for prefix in self._shape.prefixes:
            assert self._shape.layout is not None
            mine = {name.removeprefix(f"{prefix}/"): a for name, a in flat.items() if name.startswith(f"{prefix}/")}
            arrays |= under(prefix, self._shape.layout.encode(mine))
        return arrays


def to_host(tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, np.ndarray]]:
    """Starts copying tensors to the host, and gives a function that waits until they are there.

    From a GPU they go to pinned memory while it computes on.
    """
    if not any(tensor.is_cuda for tensor in tensors.values()):
        return lambda: {name: tensor.numpy() for name, tensor in tensors.items()}
    copies = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    done = torch.cuda.Event()
    done.record()

    def arrived() -> dict[str, np.ndarray]:
        done.synchronize()
        return {name: copy.numpy() for name, copy in copies.items()}

    return arrived


def batches(jobs: Sequence[Job], budget: Callable[[], int]) -> Iterator[Sequence[Job]]:
    """Cuts sorted jobs into batches of at most `budget()` tokens, padding included; a longer one stands alone.

    It is asked anew for each batch. Positions of the audio tower count likewise, since a short clip can cost a whole
    window there.
    """
    start = longest = tower = 0
    for stop, job in enumerate(jobs):
        count = stop - start + 1
        if stop > start and max(max(longest, job.example.length) * count, tower + job.tower) > budget():
            yield jobs[start:stop]
            start, longest, tower = stop, 0, 0
        longest, tower = max(longest, job.example.length), tower + job.tower
    if start < len(jobs):
        yield jobs[start:]
