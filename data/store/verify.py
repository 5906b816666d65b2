"""Proves a part of the teacher store: every byte of its files, and that its values can be what a teacher said.

Nothing is written here. `kdpipe.data.store.mend` looks at a whole store and sets aside what is damaged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.store.arrays import StoredArray
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.format import (
    ATTRIBUTE,
    FORMAT,
    OFFSETS,
    PART,
    STORED_AS,
    TOKENS,
    ArraySpec,
    starts_name,
)
from kdpipe.data.store.metadata import array_names, crcs_of, documents_digest, folder_names
from kdpipe.data.store.shard import (
    CRC_BYTES,
    ENTRY_BYTES,
    METADATA,
    Grid,
    array_document,
    as_json,
    group_document,
    shard_file,
)
from kdpipe.data.store.shard_reader import Damaged, OpenShards, ShardReader
from kdpipe.data.store.values import infinite, unit_fault, unshared

_NOT_CANONICAL = "damaged (not the bytes that its content is written as)"
_UNFIT = "damaged (its size or its index is not what was written)"
Told = Callable[[int], object]
"""Is told of bytes as they are done."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a store.

    Attributes:
        file: where.
        what: in a few words.
        part: name of the part that cannot be trusted for it, or None.
        samples: ids of the samples concerned; those of the whole part where it cannot be known better.
        aside: file or folder to set aside; None where nothing has to be moved.
    """

    file: Path
    what: str
    part: str | None = None
    samples: tuple[str, ...] = ()
    aside: Path | None = None


class PartCheck:
    """The checks of one part. Its metadata are read at once, its arrays by the `jobs`.

    Args:
        part: folder of the part.
        samples: ids of the samples by row that the ledger knows; else those that the part names.

    Attributes:
        attributes: what kdpipe says about the part; None where that cannot be trusted.
        damages: what was found in its metadata and in the list of its files.
        bytes: of all its files.

    Raises:
        StoreError: a file may not be read.
    """

    def __init__(self, part: Path, samples: Mapping[int, Sequence[str]] | None = None):
        self.part = part
        self.attributes: Mapping[str, Any] | None = None
        self.damages: list[Damage] = []
        self._samples = samples or {}
        self._documents: dict[str, Any] = {}
        self._specs: dict[str, ArraySpec] = {}
        self._grids: dict[str, Grid] = {}
        self._found = dict(_sizes(part))
        self.bytes = sum(self._found.values())
        self._check_metadata()
        if self.attributes is not None and not self.damages:
            self._check_list()

    @property
    def is_sound(self) -> bool:
        """Whether the part itself was found sound so far, whatever lies in it besides."""
        return not any(damage.aside == self.part for damage in self.damages)

    def jobs(self) -> list[Callable[[Told], list[Damage]]]:
        """Functions that check some arrays each, and may run in several threads. None where the metadata are damaged.

        Each takes a function that is told of bytes as they are done, and gives what it found.
        """
        if self.attributes is None or not self.is_sound:
            return []
        groups: dict[str, list[str]] = {}
        for name in self._specs:
            groups.setdefault(name.rpartition("/")[0], []).append(name)
        return [partial(self._check_group, prefix, names) for prefix, names in groups.items()]

    def samples_of(self, rows: Sequence[int] | range | None = None) -> tuple[str, ...]:
        """Ids of the samples of some units; None: of all."""
        units = self.attributes["units"] if self.attributes is not None else []
        if rows is None:
            rows = range(len(units)) if units else sorted(self._samples)
        named = []
        for row in rows:
            unit = units[row] if row < len(units) else {}
            own = [entry["id"] for entry in unit.get("samples", [unit] if unit else [])]
            named += self._samples.get(row, own)
        return tuple(dict.fromkeys(named))

    def damage(self, file: Path, what: str, rows: Sequence[int] | range | None = None) -> Damage:
        """Damage of this part that some units, or all, are concerned by."""
        return Damage(file, what, self.part.name, self.samples_of(rows), self.part)

    def _check_metadata(self) -> None:
        root = self.part / METADATA
        document = self._read_document("")
        if document is None:
            return
        try:
            attributes = document["attributes"][ATTRIBUTE]
            version, names = attributes["format"], array_names(attributes)
            _look_at_units(attributes["units"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            self.damages.append(self.damage(root, f"damaged (not the metadata of a part: {error!r})"))
            return
        folders = set(folder_names(attributes))
        there = {name.rpartition("/")[0] for name in self._found if name.endswith(f"/{METADATA}")}
        digest_fails = self.damage(root, "damaged (the digest of the metadata does not match)")
        if folders - there and there - folders:
            self.damages.append(digest_fails)
            return
        if gone := [name for name in folders - there if not (self.part / name).is_dir()]:
            self.damages.append(self.damage(root, f"names {', '.join(sorted(gone))}, of which nothing is there"))
            return
        for name in folder_names(attributes):
            self._documents[name] = self._read_document(name)
        if self.damages:
            return
        if documents_digest(document, self._documents) != attributes.get("metadata"):
            # An array that the root does not name speaks against the root.
            found = None if there - folders else self._contradiction(attributes, names)
            self.damages.append(found or digest_fails)
            return
        if version != FORMAT:
            what = f"written in format {version}, and this kdpipe reads format {FORMAT}; left as it is"
            self.damages.append(Damage(root, what, self.part.name, self.samples_of()))
            return
        self.attributes = attributes
        for name in names:
            spec, document = _spec_of(name, attributes), self._documents[name]
            try:
                grid = Grid.of(document)
            except (KeyError, TypeError, ValueError, IndexError, ArithmeticError):
                grid = None
            if grid is None or document != _expected(spec, grid):
                self.damages.append(self.damage(self.part / name / METADATA, "not an array as kdpipe writes it"))
            else:
                self._specs[name], self._grids[name] = spec, grid

    def _read_document(self, name: str) -> Any:
        """`zarr.json` of a group or array, or None with the damage noted."""
        file = self.part / name / METADATA
        try:
            raw = file.read_bytes()
            document = json.loads(raw)
            if as_json(document) == raw:
                return document
            self.damages.append(self.damage(file, _NOT_CANONICAL))
        except FileNotFoundError:
            self.damages.append(self.damage(file, "missing"))
        except IsADirectoryError:
            self.damages.append(self.damage(file, "a folder, not a file"))
        except (ValueError, RecursionError):
            self.damages.append(self.damage(file, "damaged (not JSON)"))
        return None

    def _contradiction(self, attributes: Mapping[str, Any], names: Sequence[str]) -> Damage | None:
        """The metadata below the root that contradict the files of arrays, where the digest of all does not match."""
        for name, document in self._documents.items():
            try:
                fits = self._fits(name, attributes) if name in names else document == group_document()
            except (KeyError, TypeError, ValueError, IndexError, ArithmeticError, OSError):
                fits = False
            if not fits:
                return self.damage(self.part / name / METADATA, "damaged (contradicts the files of the part)")
        return None

    def _fits(self, name: str, attributes: Mapping[str, Any]) -> bool:
        """Whether the metadata of an array can be those of its files, whatever the root says of it."""
        document = self._documents[name]
        grid = Grid.of(document)
        if grid is None:
            return False
        dtype = document["attributes"].get("kdpipe_dtype", document["data_type"])
        spec = ArraySpec(name, tuple(document["shape"][1:]), dtype)
        if document != _expected(spec, grid) or (
            grid.chunk_rows < spec.chunk_rows and grid.chunk_rows != max(1, grid.rows)
        ):
            return False
        axis = attributes["arrays"].get(name, {}).get("axis", TOKENS)
        # Where there is one chunk, its size says how many rows there are.
        if name in attributes["arrays"] and axis != PART and grid.rows > grid.chunk_rows:
            starts = np.fromfile(shard_file(self.part / starts_name(axis), 0, 0), "<i8", len(attributes["units"]) + 1)
            if grid.rows != starts[-1]:
                return False
        full, rest = divmod(-(-grid.rows // grid.chunk_rows), grid.per_shard)
        expected = (full * grid.per_shard + rest) * (grid.chunk_bytes + CRC_BYTES)
        expected += (full + bool(rest)) * (ENTRY_BYTES * grid.per_shard + CRC_BYTES)
        return expected == sum(size for file, size in self._found.items() if file.startswith(f"{name}/c/"))

    def _check_list(self) -> None:
        """Notes files that do not belong to the part; missing ones are found where they are read."""
        assert self.attributes is not None
        known = {METADATA, *(f"{name}/{METADATA}" for name in self._documents)}
        for name, grid in self._grids.items():
            for number in range(-(-grid.rows // (grid.chunk_rows * grid.per_shard))):
                known.add(shard_file(Path(name), number, len(self._specs[name].width)).as_posix())
        for name in sorted(self._found.keys() - known):
            file = self.part / name
            self.damages.append(Damage(file, "not of this part", aside=file))

    def _check_group(self, prefix: str, names: Sequence[str], told: Told) -> list[Damage]:
        found: list[Damage] = []
        for name in names:
            found += self._check_bytes(name, told)
        if found:
            return found
        if OFFSETS in names:
            found += self._check_offsets()
        if f"{prefix}/log_z" in names:
            found += self._check_distribution(prefix)
        return found

    def _check_bytes(self, name: str, told: Told) -> Iterator[Damage]:
        grid, spec, folder = self._grids[name], self._specs[name], self.part / name
        assert self.attributes is not None
        crcs = crcs_of(self.attributes, name)
        verified = bytearray(-(-grid.rows // grid.chunk_rows))
        stored, in_shard = np.dtype(STORED_AS[spec.dtype]), grid.chunk_rows * grid.per_shard
        for number in range(-(-grid.rows // in_shard)):
            file, first = shard_file(folder, number, len(spec.width)), number * in_shard
            rows = min(in_shard, grid.rows - first)
            try:
                shard = ShardReader(file, grid, number * grid.per_shard, verified, crcs)
            except Damaged as error:
                yield self.damage(file, error.what, self._units_at(spec, first, first + rows))
                continue
            except NotImplementedError:
                yield self.damage(file, _UNFIT, self._units_at(spec, first, first + rows))
                continue
            for start in range(0, rows, grid.chunk_rows):
                stop = min(start + grid.chunk_rows, rows)
                try:
                    values = shard.view(start, stop, stored, spec.width)
                except Damaged as error:
                    units = self._units_at(spec, first + start, first + stop)
                    yield self.damage(file, f"{error.what[:-1]}, chunk {error.chunk})", units)
                    continue
                assert values is not None
                bad = infinite(name, spec.dtype, values)
                if bad is not None:
                    at = first + start + int(np.flatnonzero(bad)[0])
                    units = self._units_at(spec, at, at + 1)
                    yield self.damage(file, f"holds a value that is not finite (row {at} of {name})", units)
                told(values.nbytes)

    def _check_offsets(self) -> Iterator[Damage]:
        assert self.attributes is not None
        expected = np.cumsum([0, *(unit["tokens"] for unit in self.attributes["units"])])
        found = self._array(OFFSETS).read(0, self._grids[OFFSETS].rows)
        if not np.array_equal(found, expected):
            yield self.damage(self.part / OFFSETS, "does not agree with the units of the part")
        for name, spec in self._specs.items():
            if spec.axis == TOKENS and name != OFFSETS and self._grids[name].rows != expected[-1]:
                yield self.damage(self.part / name, f"has {self._grids[name].rows} rows for {expected[-1]} tokens")

    def _check_distribution(self, prefix: str) -> Iterator[Damage]:
        assert self.attributes is not None
        units, where = self.attributes["units"], self.part / prefix
        try:
            layout = Layout.of(self.attributes)
            alignment = self.attributes.get("alignment", {"valid": layout.block_bounds[-1], "masked": []})
            table = unshared(layout.bits, alignment["valid"], tuple(alignment["masked"]))
        except (StoreError, ValueError, KeyError, TypeError, IndexError) as error:
            yield self.damage(self.part / METADATA, f"says of its distributions what cannot be ({error})")
            return
        axes = {TOKENS: np.cumsum([0, *(unit["tokens"] for unit in units)])}
        arrays = {spec.name: self._array(spec.name) for spec in layout.specs(prefix) if spec.name in self._specs}
        for name in arrays:
            axis = self._specs[name].axis
            if axis not in axes:
                axes[axis] = starts = self._array(axis).read(0, self._grids[axis].rows)
                ok = len(starts) == len(units) + 1 and starts[0] == 0 and (np.diff(starts) >= 0).all()
                if not ok or starts[-1] != self._grids[name].rows:
                    yield self.damage(self.part / axis, "does not agree with the arrays that it divides")
                    return

        def read(row: int, name: str) -> np.ndarray:
            starts = axes[self._specs[f"{prefix}/{name}"].axis]
            return arrays[f"{prefix}/{name}"].view(int(starts[row]), int(starts[row + 1]))

        for row in range(len(units)):
            spans = {a.rsplit("/", 1)[-1]: int(s[row + 1] - s[row]) for a, s in axes.items() if a != TOKENS}
            try:
                fault = unit_fault(layout, partial(read, row), table, spans)
            except (KeyError, ValueError, IndexError) as error:
                fault = f"arrays that do not fit together ({error!r})"
            if fault is not None:
                yield self.damage(where, f"holds {fault}", [row])

    def _array(self, name: str) -> StoredArray:
        return StoredArray(self.part, name, OpenShards(8), verify=False)

    def _units_at(self, spec: ArraySpec, start: int, stop: int) -> range | None:
        """Units that own rows `[start, stop)` of an array; None: all."""
        assert self.attributes is not None
        if spec.axis != TOKENS:
            return None
        starts = np.cumsum([0, *(unit["tokens"] for unit in self.attributes["units"])])
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        return range(first, last)


def _sizes(part: Path) -> Iterator[tuple[str, int]]:
    """Files below a part, and their sizes (bytes)."""
    folders = [""]
    while folders:
        inner = folders.pop()
        with os.scandir(part / inner) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{inner}{entry.name}/")
                    continue
                if not os.access(entry.path, os.R_OK) and not entry.is_symlink():
                    raise StoreError(f"{entry.path}: may not be read. Mend its permissions and run again.")
                yield inner + entry.name, entry.stat(follow_symlinks=False).st_size


def _look_at_units(units: Any) -> None:
    """Raises KeyError, TypeError, ValueError or AttributeError where units lack what every unit has."""
    for unit in units:
        int(unit["tokens"]), unit["key"], [str(entry["id"]) for entry in (unit, *unit.get("samples", []))]


def _spec_of(name: str, attributes: Mapping[str, Any]) -> ArraySpec:
    about = attributes["arrays"].get(name)
    if about is None:
        return ArraySpec(name, (), "int64", PART)  # the starts of an axis: a row a unit, and one
    return ArraySpec(name, tuple(about["width"]), about["dtype"], about.get("axis", TOKENS))


def _expected(spec: ArraySpec, grid: Grid) -> dict[str, Any]:
    return array_document(spec, grid.rows, grid.chunk_rows, grid.chunk_rows * grid.per_shard)
