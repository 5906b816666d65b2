"""Reads parts of the teacher store by row, and samples by id.

Everything is fetched in chunks, whose checksums zarr verifies; decoded chunks are kept in a bounded memory, since the
samples of a window of parts come in random order. `PartReader._fetch` is the one place that touches array data.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Row
from kdpipe.data.store.codec import decode_states
from kdpipe.data.store.format import NO_ID, OFFSETS, hidden_prefix
from kdpipe.data.store.metadata import damaged, load_attributes

if TYPE_CHECKING:
    import torch
    import zarr

CACHE_BYTES = 256 << 20
"""Decoded chunks kept in memory by one `Store` (bytes)."""

OPEN_PARTS = 64
"""Parts a `Store` keeps open."""


class _Recent:
    """A memory of the values used last, bounded by their summed size; safe to use from several threads."""

    def __init__(self, limit: int):
        self._limit = limit
        self._size = 0
        self._values: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], tuple[Any, int]]) -> Any:
        """The value under `key`; `make` gives value and size where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key][0]
        value, size = make()
        with self._lock:
            if key not in self._values:
                self._values[key] = value, size
                self._size += size
                while self._size > self._limit and len(self._values) > 1:
                    self._size -= self._values.popitem(last=False)[1][1]
        return value


@dataclass(frozen=True, slots=True)
class StoredDistribution:
    """What a teacher says about each token of a sample. T tokens, k kept entries, n temperatures, B blocks, D draws.

    Attributes:
        ids: int64 [T, k], kept token ids, most likely first.
        logprob: float32 [T, k], their log-probabilities at temperature 1 (nats), falling.
        log_z: float32 [T, n], log sum exp(z / T_n) over the vocabulary (nats).
        log_tail: float32 [T, n, B], log-probability at T_n of block b without the kept ids (nats);
            -inf where nothing is left.
        temperatures: the n temperatures.
        block_bounds: B + 1 ids; block b covers `[block_bounds[b], block_bounds[b + 1])`.
        draws: int64 [T, n, D], ids drawn at T_n from the vocabulary without the kept ids; -1 where nothing is left.
            None unless they were asked for.
    """

    ids: np.ndarray
    logprob: np.ndarray
    log_z: np.ndarray
    log_tail: np.ndarray
    temperatures: tuple[float, ...]
    block_bounds: tuple[int, ...]
    draws: np.ndarray | None = None


class PartReader:
    """One part, opened once; reads are safe from several threads.

    Args:
        path: folder of the part.
        cache: memory of decoded chunks to share with other parts; None: one of its own.

    Attributes:
        attributes: what kdpipe says about the part; see `docs/format.md`.
        source: whose units these are.
        units: one mapping a unit, with `id`, `key`, `tokens` and what the writer added.

    Raises:
        StoreError: the part is missing, damaged, or of another format version.
    """

    def __init__(self, path: Path, cache: _Recent | None = None):
        import zarr

        self.path = path
        self.attributes: Mapping[str, Any] = load_attributes(path)
        self.source: str = self.attributes["source"]
        self.units: Sequence[Mapping[str, Any]] = self.attributes["units"]
        self._cache = cache if cache is not None else _Recent(CACHE_BYTES)
        self._arrays: dict[str, zarr.Array] = {}
        self._lock = threading.Lock()
        self._rows = {unit["id"]: row for row, unit in enumerate(self.units)}
        self._group = zarr.open_group(path, mode="r", zarr_format=3)
        tokens = [unit["tokens"] for unit in self.units]
        self._offsets = self._span(OFFSETS, 0, len(tokens) + 1, None)
        if not np.array_equal(self._offsets, np.cumsum([0, *tokens])):
            raise damaged(path, f"{path / OFFSETS}: does not agree with the units of the part")

    def row_of(self, unit_id: str) -> int:
        """Row of a unit (a sample's id, or for clips the clip's).

        Raises:
            StoreError: the part does not hold it.
        """
        try:
            return self._rows[unit_id]
        except KeyError:
            raise StoreError(f"{self.path}: holds no unit {unit_id!r}") from None

    def tokens(self, row: int) -> int:
        """Tokens of a unit."""
        return int(self._offsets[row + 1] - self._offsets[row])

    def read(self, row: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of one unit as they are stored.

        Args:
            row: the unit's row.
            names: array names; None: all.

        Returns:
            `[tokens, *width]` each, writable, in the storage dtype (bfloat16 as its uint16 bits).

        Raises:
            StoreError: an array is not in the part, or what is read is damaged or missing; names file, part and unit.
        """
        unit = self.units[row]
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        known = self.attributes["arrays"]
        arrays = {}
        for name in known if names is None else names:
            if name not in known:
                raise StoreError(f"{self.path}: holds no array {name!r}; it has {', '.join(known)}")
            arrays[name] = self._span(name, start, stop, unit)
        return arrays

    def distribution(
        self,
        row: int,
        prefix: str,
        *,
        k: int | None = None,
        temperatures: Sequence[float] | None = None,
        draws: bool = False,
    ) -> StoredDistribution:
        """A distribution of one unit, narrowed to what is asked for.

        A smaller k is served exactly: each entry dropped adds its probability to the tail block of its id, at every
        temperature T, as `log p_T = (logprob + log_z[1]) / T - log_z[T]`.

        Args:
            row: the unit's row.
            prefix: `top`, or `format.lens_prefix(layer)`.
            k: entries wanted; None: all that are kept. Where the whole vocabulary is kept there may be fewer.
            temperatures: temperatures wanted, in this order; None: all that were declared.
            draws: whether the draws are wanted. They are from the tail that one k leaves, and k must be that.

        Raises:
            StoreError: more entries or another temperature are asked for than the part holds, or draws that it does
                not hold for this k; or it is damaged.
        """
        about = self.attributes.get("distributions", {})
        if about.get("layout") != "fixed":
            raise StoreError(
                f"{self.path}: holds no distributions that this kdpipe reads (layout {about.get('layout')!r})"
            )
        declared = about["temperatures"]
        wanted = declared if temperatures is None else list(temperatures)
        for temperature in wanted:
            if temperature not in declared:
                raise StoreError(
                    f"{self.path}: temperature {temperature} was not declared when the teachers were cached "
                    f"({', '.join(map(str, declared))} were). "
                    "Add it to `teachers.temperatures` and run `kdpipe cache-teachers`."
                )
        if k is not None and not 1 <= k <= about["k"]:
            raise StoreError(
                f"{self.path}: k = {k} was asked for and k = {about['k']} is stored. "
                "Raise `teachers.k` and run `kdpipe cache-teachers`."
            )
        names = [f"{prefix}/{name}" for name in ("ids", "logprob", "log_z", "log_tail")]
        ids, logprob, log_z, log_tail = self.read(row, names).values()
        columns = [declared.index(temperature) for temperature in wanted]
        log_z_1 = log_z[:, declared.index(1.0)]
        log_z, log_tail = log_z[:, columns], log_tail[:, columns]
        bounds = tuple(about["block_bounds"])
        kept = ids.shape[1] if k is None else min(k, ids.shape[1])
        if kept < ids.shape[1]:
            log_tail = _with_dropped(ids[:, kept:], logprob[:, kept:], log_z_1, log_z, log_tail, wanted, bounds)
        drawn = self._draws(row, prefix, kept, ids.shape[1])[:, columns] if draws else None
        return StoredDistribution(
            ids[:, :kept].astype(np.int64),
            logprob[:, :kept].astype(np.float32),
            log_z,
            log_tail,
            tuple(wanted),
            bounds,
            drawn,
        )

    def _draws(self, row: int, prefix: str, kept: int, stored: int) -> np.ndarray:
        """Draws [tokens, temperatures, draws] from the tail that `kept` of `stored` entries leave, or StoreError."""
        about = self.attributes["distributions"].get("draws")
        if about is None:
            raise StoreError(
                f"{self.path}: holds no draws from the tails. Set `teachers.draws` and run `kdpipe cache-teachers`."
            )
        if min(about["k"], stored) != kept:
            raise StoreError(
                f"{self.path}: its draws are from the tails that k = {about['k']} leaves; k = {kept} was asked for. "
                f"Set `teachers.k` to {about['k']}, or run `kdpipe cache-teachers`."
            )
        found = self.read(row, [f"{prefix}/draws"])[f"{prefix}/draws"].astype(np.int64)
        return np.where(found == NO_ID, -1, found)

    def hidden(self, row: int, layer: int) -> torch.Tensor:
        """Hidden states [tokens, width] of one unit at a teacher layer (counted from 1), decoded on the CPU.

        Returns:
            bfloat16 for the codec `bfloat16`, else float32.

        Raises:
            StoreError: the layer is not in the part, or what is read is damaged.
        """
        return decode_states(self.states(row, layer), self.attributes["states"]["codec"])

    def states(self, row: int, layer: int) -> dict[str, np.ndarray]:
        """What is stored of the hidden states of one unit at a teacher layer (counted from 1), not decoded.

        Returns:
            `states` [tokens, width] (bfloat16 as its uint16 bits), and for int8 `scale` float32 [tokens].

        Raises:
            StoreError: the layer is not in the part, or what is read is damaged.
        """
        about = self.attributes.get("states", {"layers": []})
        if layer not in about["layers"]:
            raise StoreError(f"{self.path}: holds no hidden states of layer {layer}; it has {about['layers']}")
        prefix = hidden_prefix(layer) + "/"
        names = [name for name in self.attributes["arrays"] if name.startswith(prefix)]
        return {name.removeprefix(prefix): array for name, array in self.read(row, names).items()}

    def _span(self, name: str, start: int, stop: int, unit: Mapping[str, Any] | None) -> np.ndarray:
        """Rows [start, stop) of an array, put together from its chunks."""
        array = self._open(name)
        rows = array.chunks[0]
        pieces = [np.empty((0, *array.shape[1:]), array.dtype)]
        for chunk in range(start // rows, -(-stop // rows) if stop > start else 0):
            data = self._cache.get((self.path, name, chunk), lambda chunk=chunk: self._fetch(name, chunk, unit))
            first = chunk * rows
            pieces.append(data[max(start - first, 0) : stop - first])
        return np.concatenate(pieces)

    def _fetch(self, name: str, chunk: int, unit: Mapping[str, Any] | None) -> tuple[np.ndarray, int]:
        """One decoded chunk and its size in bytes."""
        array = self._open(name)
        rows = array.chunks[0]
        assert array.shards is not None
        file = self.path.joinpath(name, "c", str(chunk * rows // array.shards[0]), *("0" for _ in array.shape[1:]))
        where = f"part {self.path.name}, array {name}, chunk {chunk}"
        if unit is not None:
            where += f", read for sample {', '.join(map(repr, _samples_of(unit)))}"
        # zarr would take either for a chunk that was never written, and give zeros.
        if not file.exists() or not file.stat().st_size:
            raise damaged(self.path, f"{file}: missing or empty ({where})")
        try:
            data = np.asarray(array[chunk * rows : (chunk + 1) * rows])
        except MemoryError:
            raise
        except Exception as error:
            raise damaged(self.path, f"{file}: damaged ({where}): {error}") from error
        return data, data.nbytes

    def _open(self, name: str) -> zarr.Array:
        with self._lock:
            if name not in self._arrays:
                self._arrays[name] = cast("zarr.Array", self._group[name])
            return self._arrays[name]


class _Ledger(Protocol):
    def get(self, sample: str, source: str) -> Row | None: ...


class Store:
    """Samples of a teacher store by id; keeps the parts used last open. Safe to use from several threads.

    Args:
        parts: folder of the parts.
        ledger: says in which part and row a sample lies (`kdpipe.data.ledger.Ledger`).
        open_parts: parts kept open.
        cache_bytes: decoded chunks kept in memory (bytes).
    """

    def __init__(self, parts: Path, ledger: _Ledger, *, open_parts: int = OPEN_PARTS, cache_bytes: int = CACHE_BYTES):
        self._parts = parts
        self._ledger = ledger
        self._open = _Recent(open_parts)
        self._chunks = _Recent(cache_bytes)

    def get(self, sample_id: str, source: str) -> tuple[PartReader, int]:
        """The part that holds a source of a sample, and its row there.

        Raises:
            StoreError: the store does not hold it, or its part is damaged.
        """
        row = self._ledger.get(sample_id, source)
        if row is None:
            raise StoreError(f"{self._parts}: holds no {source} of sample {sample_id!r}. Run `kdpipe cache-teachers`.")
        path = self._parts / row.part
        part: PartReader = self._open.get(path, lambda: (PartReader(path, self._chunks), 1))
        # Ids are not compared: a sample that came later may share a clip's unit without being listed there.
        unit = part.units[row.row] if row.row < len(part.units) else {}
        if part.source != source or unit.get("key") != row.key:
            raise damaged(
                path, f"{path}: row {row.row} is not {source} of sample {sample_id!r} under the key {row.key}"
            )
        return part, row.row
        return part, row.row


def _samples_of(unit: Mapping[str, Any]) -> list[str]:
    """Ids of the samples that a unit serves: its own, or those a clip's unit lists."""
    return [sample["id"] for sample in unit["samples"]] if "samples" in unit else [unit["id"]]


def _with_dropped(
    ids: np.ndarray,
    logprob: np.ndarray,
    log_z_1: np.ndarray,
    log_z: np.ndarray,
    log_tail: np.ndarray,
    temperatures: Sequence[float],
    bounds: Sequence[int],
) -> np.ndarray:
    """Tails [T, n, B] with the entries `ids` [T, d] that are no longer kept added to their blocks."""
    logits = logprob.astype(np.float64) + log_z_1.astype(np.float64)[:, None]
    block = np.searchsorted(np.asarray(bounds), ids, side="right") - 1
    tail = log_tail.astype(np.float64)
    for column, temperature in enumerate(temperatures):
        dropped = logits / temperature - log_z[:, column, None]
        for b in range(tail.shape[2]):
            in_block = np.where(block == b, dropped, -np.inf)
            tail[:, column, b] = np.logaddexp(tail[:, column, b], np.logaddexp.reduce(in_block, axis=1))
    return tail.astype(np.float32)
