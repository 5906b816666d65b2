"""Writes one part of the teacher store as its units come.

The caller gives a path in its `tmp` folder and commits the finished part through `kdpipe.data.ledger`, which flushes
it to the disk and renames it into place. Memory is bounded by a few chunks an array, and the bytes of every file
depend on what is appended alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.store.format import (
    ATTRIBUTE,
    FORMAT,
    PART,
    RESERVED,
    SHARD_BYTES,
    TOKENS,
    ArraySpec,
    starts_name,
)
from kdpipe.data.store.metadata import metadata_digest
from kdpipe.data.store.shard import METADATA, as_json, group_document
from kdpipe.data.store.shard_writer import ArrayWriter

_UNIT_FIELDS = frozenset({"id", "key", "tokens"})


class PartWriter:
    """A part being built.

    Args:
        path: where to build it; nothing may stand there.
        source: whose units these are: `targets`, `textual`, `acoustic`, `acoustic_top`.
        arrays: the arrays that every unit brings, and those of the axis `part`.
        constants: the arrays of the axis `part`, by name, in their storage dtype.
        attributes: what a reader must know, e.g. of `distributions.Layout.attributes`; plain JSON values.
        shard_bytes: upper bound of a shard's data (bytes).

    Raises:
        ValueError: two arrays share a name, or an attribute has a name the format needs for itself.
        FileExistsError: something stands at `path`.
    """

    def __init__(
        self,
        path: Path,
        *,
        source: str,
        arrays: Sequence[ArraySpec],
        attributes: Mapping[str, Any],
        constants: Mapping[str, np.ndarray] | None = None,
        shard_bytes: int = SHARD_BYTES,
    ):
        constants = constants or {}
        axes = dict.fromkeys([TOKENS, *(spec.axis for spec in arrays if spec.axis != PART)])
        names = [*(spec.name for spec in arrays), *map(starts_name, axes)]
        if len(set(names)) != len(names):
            raise ValueError(f"array names {names} repeat")
        if constants.keys() != {spec.name for spec in arrays if spec.axis == PART}:
            raise ValueError(f"constants {list(constants)} are not the arrays of the axis {PART!r}")
        self._attributes = _checked(attributes)
        if path.exists():
            raise FileExistsError(f"{path}: exists already")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.source = source
        path.mkdir()
        self._shard_bytes = shard_bytes
        self._all = {spec.name: ArrayWriter(path / spec.name, spec, shard_bytes) for spec in arrays}
        self._columns = {spec.name: self._all[spec.name] for spec in arrays if spec.axis != PART}
        for name, array in constants.items():
            self._all[name].check("of the part", array)
            self._all[name].append(array)
        self._units: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._starts: dict[str, list[int]] = {axis: [0] for axis in axes}

    def append(
        self, unit_id: str, key: str, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None
    ) -> int:
        """Adds one unit.

        Args:
            unit_id: sample id, or digest of a clip.
            key: its key in the ledger.
            arrays: `[rows, *width]` for each declared array, in its storage dtype; those of one axis are of one length.
            info: JSON values kept beside id and key. For the ledger to be rebuilt from parts: `fields`, `cover`,
                `length`, `content` as in `kdpipe.data.ledger.Row`, or, where one unit serves several samples,
                `samples`, a list of such mappings with an `id` each, all under the unit's key.

        Returns:
            The unit's row in the part.

        Raises:
            ValueError: the unit is there already, or its arrays are not what was declared.
            OSError: the disk is full; the part must be thrown away.
        """
        if unit_id in self._ids:
            raise ValueError(f"unit {unit_id!r} is already in {self.path}")
        if arrays.keys() != self._columns.keys():
            odd = sorted(arrays.keys() ^ self._columns.keys())
            raise ValueError(f"unit {unit_id!r}: arrays {odd} are missing or were not declared")
        lengths: dict[str, int] = dict.fromkeys(self._starts, 0)
        for axis in self._starts:
            found = {name: len(a) for name, a in arrays.items() if self._columns[name].spec.axis == axis}
            if len(set(found.values())) > 1:
                raise ValueError(f"unit {unit_id!r}: arrays differ in length: {found}")
            lengths[axis] = next(iter(found.values()), 0)
        for name, array in arrays.items():
            self._columns[name].check(unit_id, array)
        unit = _plain(dict(info or {}))
        if clash := _UNIT_FIELDS & unit.keys():
            raise ValueError(f"unit {unit_id!r}: info may not hold {sorted(clash)}")
        for name, array in arrays.items():
            self._columns[name].append(array)
        self._ids.add(unit_id)
        self._units.append({"id": unit_id, "key": key, "tokens": lengths[TOKENS], **unit})
        for axis, starts in self._starts.items():
            starts.append(starts[-1] + lengths[axis])
        return len(self._units) - 1

    def tokens(self, row: int) -> int:
        """Tokens of a unit that was added."""
        return self._units[row]["tokens"]

    def close(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Writes what is left, the offsets and the attributes; the part is complete when this returns.

        Args:
            attributes: further attributes, known only now (measured fidelity); they replace those of the same name.
        """
        self._attributes.update(_checked(attributes or {}))
        of_axes = {}
        for axis, starts in self._starts.items():
            column = ArrayWriter(
                self.path / starts_name(axis), ArraySpec(starts_name(axis), (), "int64"), self._shard_bytes
            )
            column.append(np.array(starts, np.int64))
            column.close()
            of_axes[starts_name(axis)] = {"crc32c": column.crcs.hex()}
        for column in self._all.values():
            column.close()
        record = {
            "format": FORMAT,
            "source": self.source,
            "units": self._units,
            "arrays": {name: _declared(column) for name, column in self._all.items()},
            "starts": of_axes,
            **self._attributes,
        }
        for folder in self._groups():
            (folder / METADATA).write_bytes(as_json(group_document()))
        root = self.path / METADATA
        root.write_bytes(as_json(group_document({ATTRIBUTE: record})))
        record["metadata"] = metadata_digest(self.path)
        root.write_bytes(as_json(group_document({ATTRIBUTE: record})))

    def _groups(self) -> set[Path]:
        """Folders between the part and its arrays, which Zarr wants to be groups."""
        names = [*self._all, *map(starts_name, self._starts)]
        return {folder for name in names for folder in (self.path / name).parents if folder.is_relative_to(self.path)}


def _declared(column: ArrayWriter) -> dict[str, Any]:
    spec = column.spec
    axis = {} if spec.axis == TOKENS else {"axis": spec.axis}
    return {"dtype": spec.dtype, "width": list(spec.width), **axis, "crc32c": column.crcs.hex()}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def _checked(attributes: Mapping[str, Any]) -> dict[str, Any]:
    if clash := RESERVED & attributes.keys():
        raise ValueError(f"attributes {sorted(clash)} are the format's own")
    return _plain(dict(attributes))
