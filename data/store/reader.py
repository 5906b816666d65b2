"""Reads parts of the teacher store by row, and samples by id.

Rows come from the files as they lie (`kdpipe.data.store.arrays`): the checksum of a chunk is verified when it is first
touched, once in the life of a reader. Everything here is safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.hashing import digest_bytes
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.arrays import StoredArray
from kdpipe.data.store.codec import decode_states
from kdpipe.data.store.distributions import Layout, StoredDistribution, narrowed
from kdpipe.data.store.format import NO_ID, OFFSETS, PART, TOKENS, hidden_prefix, starts_name
from kdpipe.data.store.metadata import crcs_of, damaged, load_attributes
from kdpipe.data.store.shard_reader import OpenShards

if TYPE_CHECKING:
    import torch

OPEN_PARTS = 64
"""Parts a `Store` keeps open."""

OPEN_FILES = max(8, min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
"""Shard files a `Store` keeps open, at a file descriptor each: a quarter of what the system allows at most."""


_OF_LEDGER = frozenset({"fields", "cover", "content"})


class _Recent:
    """The values used last, at most `limit`; safe to use from several threads."""

    def __init__(self, limit: int):
        self._limit = limit
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value under `key`; `make` gives it where there is none."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = make()
        with self._lock:
            # Of two threads that made it, both go on with one: a part remembers what it has verified.
            value = self._values.setdefault(key, value)
            self._values.move_to_end(key)
            while len(self._values) > self._limit:
                self._values.popitem(last=False)
        return value


class PartReader:
    """One part, opened once.

    Args:
        path: folder of the part.
        verify: whether the checksum of each chunk is verified when it is first touched.
        shards: files kept open, to share with other parts; None: of its own.

    Attributes:
        attributes: what kdpipe says about the part but for its units; see `docs/format.md`.
        source: whose units these are.
        units: one mapping a unit, with `id`, `key`, `tokens` and what the writer added, but for what says nothing of
            arrays and is for the ledger alone: `fields`, `cover` and `content` are most of it.

    Raises:
        StoreError: the part is missing, damaged, or of another format version.
    """

    def __init__(self, path: Path, *, verify: bool = True, shards: OpenShards | None = None):
        self.path = path
        attributes = load_attributes(path)
        self.attributes: Mapping[str, Any] = {name: attributes[name] for name in attributes if name != "units"}
        self.source: str = attributes["source"]
        self.units: Sequence[Mapping[str, Any]] = [
            {name: value for name, value in unit.items() if name not in _OF_LEDGER} for unit in attributes["units"]
        ]
        self._verify = verify
        self._shards = shards if shards is not None else OpenShards(OPEN_FILES)
        self._arrays: dict[str, StoredArray] = {}
        self._axes: dict[str, list[int]] = {}
        self._constants: dict[str, np.ndarray] = {}
        self._digests: dict[str, str] = {}
        self._layout: Layout | None = None
        self._lock = threading.Lock()
        self._rows = {unit["id"]: row for row, unit in enumerate(self.units)}
        tokens = [unit["tokens"] for unit in self.units]
        if not np.array_equal(self._starts(TOKENS), np.cumsum([0, *tokens])):
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
        starts = self._starts(TOKENS)
        return starts[row + 1] - starts[row]

    def read(self, row: int, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of one unit as they are stored.

        Args:
            row: the unit's row.
            names: array names; None: all.

        Returns:
            `[rows, *width]` each, writable, in the storage dtype (bfloat16 as its uint16 bits, float8 as uint8). Rows
            are tokens, but for the axes that `format` names; arrays of the axis `part` come whole.

        Raises:
            StoreError: an array is not in the part, or what is read is damaged or missing; names file, part and unit.
        """
        asked = self.attributes["arrays"] if names is None else names
        spans = {name: self._span(name, row) for name in asked}
        return {name: self._stored(name).read(*span, self.units[row]) for name, span in spans.items()}

    def read_into(self, row: int, name: str, out: np.ndarray) -> None:
        """Reads one array of one unit into memory that is there.

        Args:
            row: the unit's row.
            name: array name.
            out: `[rows, *width]`, contiguous, in the storage dtype.

        Raises:
            StoreError: as `read`.
            ValueError: `out` has another shape or dtype.
        """
        start, stop = self._span(name, row)
        self._stored(name).read_into(out, start, stop, self.units[row])

    @property
    def layout(self) -> Layout:
        """How its distributions are stored.

        Raises:
            StoreError: it has none that this kdpipe reads.
        """
        if self._layout is None:
            try:
                self._layout = Layout.of(self.attributes)
            except StoreError as error:
                raise StoreError(f"{self.path}: holds {error}") from None
        return self._layout

    def distribution(
        self,
        row: int,
        prefix: str,
        *,
        k: int | None = None,
        mass: float | None = None,
        min_k: int = 1,
        temperatures: Sequence[float] | None = None,
        draws: bool = False,
    ) -> StoredDistribution:
        """A distribution of one unit, narrowed to what is asked for.

        Fewer entries are served exactly: each one dropped adds its probability to the tail block of its id, at every
        temperature.

        Args:
            row: the unit's row.
            prefix: `top`, or `format.lens_prefix(layer)`.
            k: most entries wanted; None: all that are kept. Where the whole vocabulary is kept there may be fewer.
            mass: mass that the entries of a token shall reach, at most k of them; None: that of the part.
            min_k: with a mass, the fewest entries.
            temperatures: temperatures wanted, in this order; None: all that were declared.
            draws: whether the draws are wanted. They are from the tail that one k leaves, and k must be that.

        Raises:
            StoreError: more entries or another temperature are asked for than the part holds, or draws that it does
                not hold for this k; or it is damaged.
        """
        layout = self.layout
        wanted = layout.temperatures if temperatures is None else tuple(temperatures)
        self._refuse_more(layout, k, mass, min_k, wanted)
        shape = f"{prefix}/"
        names = ("ids", "logprob", "log_z", "log_tail")
        names += () if layout.mass is None else ("count",)
        names += ("range",) if layout.logprob == "uint8" else ()
        stored = {name: self._view(shape + name, row) for name in names}
        kept = layout.kept if k is None else min(k, layout.kept)
        made = narrowed(layout.decode(stored), layout, k=kept, mass=mass, min_k=min_k, temperatures=wanted)
        if not draws:
            return made
        columns = [layout.temperatures.index(temperature) for temperature in wanted]
        return dataclasses.replace(made, draws=self._draws(row, prefix, kept)[:, columns])

    def _refuse_more(
        self, layout: Layout, k: int | None, mass: float | None, min_k: int, wanted: Sequence[float]
    ) -> None:
        for temperature in wanted:
            if temperature not in layout.temperatures:
                raise StoreError(
                    f"{self.path}: temperature {temperature} was not declared when the teachers were cached "
                    f"({', '.join(map(str, layout.temperatures))} were). "
                    "Add it to `teachers.temperatures` and run `kdpipe cache-teachers`."
                )
        if k is not None and not 1 <= k <= layout.k:
            raise StoreError(
                f"{self.path}: k = {k} was asked for and k = {layout.k} is stored. "
                "Raise `teachers.k` and run `kdpipe cache-teachers`."
            )
        if mass is not None and layout.mass is not None and mass > layout.mass:
            raise StoreError(
                f"{self.path}: entries that reach a mass of {mass:g} were asked for and {layout.mass:g} is stored. "
                "Raise `teachers.mass` and run `kdpipe cache-teachers`."
            )
        if mass is not None and layout.mass is not None and min_k > layout.min_k:
            raise StoreError(
                f"{self.path}: at least {min_k} entries of each token were asked for and {layout.min_k} are stored. "
                "Raise `teachers.min_k` and run `kdpipe cache-teachers`."
            )

    def _draws(self, row: int, prefix: str, kept: int) -> np.ndarray:
        """Draws [tokens, temperatures, draws] from the tail that `kept` entries leave, or StoreError."""
        about, stored = self.layout.draws, self.layout.kept
        if about is None:
            raise StoreError(
                f"{self.path}: holds no draws from the tails. Set `teachers.draws` and run `kdpipe cache-teachers`."
            )
        if min(about["k"], stored) != kept:
            raise StoreError(
                f"{self.path}: its draws are from the tails that k = {about['k']} leaves; k = {kept} was asked for. "
                f"Set `teachers.k` to {about['k']}, or run `kdpipe cache-teachers`."
            )
        found = self._view(f"{prefix}/draws", row).astype(np.int64)
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
            `states` [tokens, C] (bfloat16 as its uint16 bits, float8 as uint8), and with the codecs that have them
            `scale` float32 [tokens] and `basis` float16 [C, width], one for the part and not to be written to.

        Raises:
            StoreError: the layer is not in the part, or what is read is damaged.
        """
        prefix = hidden_prefix(layer) + "/"
        found = {}
        for name in self.state_arrays(layer):
            short = name.removeprefix(prefix)
            found[short] = self.constant(name) if short == "basis" else self.read(row, [name])[name]
        return found

    def state_arrays(self, layer: int) -> list[str]:
        """Names of the arrays of a teacher layer's hidden states.

        Raises:
            StoreError: the layer is not in the part.
        """
        about = self.attributes.get("states", {"layers": []})
        if layer not in about["layers"]:
            raise StoreError(f"{self.path}: holds no hidden states of layer {layer}; it has {about['layers']}")
        prefix = hidden_prefix(layer) + "/"
        return [name for name in self.attributes["arrays"] if name.startswith(prefix)]

    def constant(self, name: str) -> np.ndarray:
        """An array of the axis `part`, read once; not to be written to."""
        if name not in self._constants:
            array = self._stored(name)
            self._constants[name] = array.read(0, array.shape[0])
        return self._constants[name]

    def digest_of(self, name: str) -> str:
        """Digest of an array of the axis `part`, made once."""
        if name not in self._digests:
            self._digests[name] = digest_bytes(self.constant(name).tobytes())
        return self._digests[name]

    def _view(self, name: str, row: int) -> np.ndarray:
        start, stop = self._span(name, row)
        return self._stored(name).view(start, stop, self.units[row])

    def _span(self, name: str, row: int) -> tuple[int, int]:
        """Rows of an array that belong to a unit."""
        known = self.attributes["arrays"]
        if name not in known:
            raise StoreError(f"{self.path}: holds no array {name!r}; it has {', '.join(known)}")
        axis = known[name].get("axis", TOKENS)
        if axis == PART:
            return 0, self._stored(name).shape[0]
        starts = self._starts(axis)
        return starts[row], starts[row + 1]

    def _starts(self, axis: str) -> Sequence[int]:
        """First row of each unit on an axis, and the end."""
        if axis not in self._axes:
            self._axes[axis] = self._stored(starts_name(axis)).read(0, len(self.units) + 1).tolist()
        return self._axes[axis]

    def _stored(self, name: str) -> StoredArray:
        found = self._arrays.get(name)
        if found is None:
            with self._lock:
                found = self._arrays.get(name)
                if found is None:
                    crcs = crcs_of(self.attributes, name)
                    found = StoredArray(self.path, name, self._shards, verify=self._verify, crcs=crcs)
                    self._arrays[name] = found
        return found


class _Ledger(Protocol):
    def get(self, sample: str, source: str) -> Row | None: ...


class Store:
    """Samples of a teacher store by id; keeps the parts used last open. Safe to use from several threads.

    Args:
        parts: folder of the parts.
        ledger: says in which part and row a sample lies (`kdpipe.data.ledger.Ledger`).
        open_parts: parts kept open.
        verify: whether checksums are verified, each once; see `PartReader`.
    """

    def __init__(self, parts: Path, ledger: _Ledger, *, open_parts: int = OPEN_PARTS, verify: bool = True):
        self._parts = parts
        self._ledger = ledger
        self._verify = verify
        self._open = _Recent(open_parts)
        self._shards = OpenShards(OPEN_FILES)

    def get(self, sample_id: str, source: str) -> tuple[PartReader, int]:
        """The part that holds a source of a sample, and its row there.

        Raises:
            StoreError: the store does not hold it, or its part is damaged.
        """
        row = self._ledger.get(sample_id, source)
        if row is None:
            raise StoreError(f"{self._parts}: holds no {source} of sample {sample_id!r}. Run `kdpipe cache-teachers`.")
        part: PartReader = self._open.get(row.part, lambda: self._open_part(row.part))
        # Ids are not compared: a sample that came later may share a clip's unit without being listed there.
        unit = part.units[row.row] if row.row < len(part.units) else {}
        if part.source != source or unit.get("key") != row.part_key:
            path = self._parts / row.part
            raise damaged(
                path, f"{path}: row {row.row} is not {source} of sample {sample_id!r} under the key {row.part_key}"
            )
        return part, row.row

    def _open_part(self, name: str) -> PartReader:
        return PartReader(self._parts / name, verify=self._verify, shards=self._shards)
