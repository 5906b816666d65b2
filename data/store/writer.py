"""Writes one part of the teacher store, shard by shard, as its units come.

The caller gives a path in its `tmp` folder and commits the finished part through `kdpipe.data.ledger`, which flushes
it to the disk and renames it into place. Memory is bounded by about one shard (`format.SHARD_BYTES`) an array, and the
bytes of every file depend on what is appended alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.data.store.format import ATTRIBUTE, FORMAT, OFFSETS, RESERVED, SHARD_BYTES, STORED_AS, ArraySpec
from kdpipe.data.store.metadata import metadata_digest

if TYPE_CHECKING:
    import zarr

_UNIT_FIELDS = frozenset({"id", "key", "tokens"})


class PartWriter:
    """A part being built.

    Args:
        path: where to build it; nothing may stand there.
        source: whose units these are: `targets`, `textual`, `acoustic`, `acoustic_top`.
        arrays: the arrays every unit brings.
        attributes: what a reader must know, e.g. of `format.distribution_attributes`; plain JSON values.
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
        shard_bytes: int = SHARD_BYTES,
    ):
        import zarr

        names = [spec.name for spec in arrays]
        if len(set(names)) != len(names) or OFFSETS in names:
            raise ValueError(f"array names {names} repeat or use {OFFSETS!r}")
        self._attributes = _checked(attributes)
        if path.exists():
            raise FileExistsError(f"{path}: exists already")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.source = source
        self._group = zarr.create_group(path, zarr_format=3)
        self._columns = {spec.name: _Column(self._group, spec, shard_bytes) for spec in arrays}
        self._units: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._offsets = [0]

    def append(
        self, unit_id: str, key: str, arrays: Mapping[str, np.ndarray], info: Mapping[str, Any] | None = None
    ) -> int:
        """Adds one unit.

        Args:
            unit_id: sample id, or digest of a clip.
            key: its key in the ledger.
            arrays: `[tokens, *width]` for each declared array, in its storage dtype, all of one length.
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
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"unit {unit_id!r}: arrays differ in length: {lengths}")
        for name, array in arrays.items():
            self._columns[name].check(unit_id, array)
        unit = _plain(dict(info or {}))
        if clash := _UNIT_FIELDS & unit.keys():
            raise ValueError(f"unit {unit_id!r}: info may not hold {sorted(clash)}")
        tokens = next(iter(lengths.values()), 0)
        for name, array in arrays.items():
            self._columns[name].append(array)
        self._ids.add(unit_id)
        self._units.append({"id": unit_id, "key": key, "tokens": tokens, **unit})
        self._offsets.append(self._offsets[-1] + tokens)
        return len(self._units) - 1

    def close(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Writes what is left, the offsets and the attributes; the part is complete when this returns.

        Args:
            attributes: further attributes, known only now (measured fidelity); they replace those of the same name.
        """
        self._attributes.update(_checked(attributes or {}))
        for column in self._columns.values():
            column.close()
        offsets = _Column(self._group, ArraySpec(OFFSETS, (), "int64"), SHARD_BYTES)
        offsets.append(np.array(self._offsets, np.int64))
        offsets.close()
        record = {
            "format": FORMAT,
            "source": self.source,
            "units": self._units,
            "arrays": {name: {"dtype": c.spec.dtype, "width": list(c.spec.width)} for name, c in self._columns.items()},
            **self._attributes,
        }
        self._group.update_attributes({ATTRIBUTE: record})
        record["metadata"] = metadata_digest(self.path)
        self._group.update_attributes({ATTRIBUTE: record})


class _Column:
    """One array being written: rows wait here until they fill a shard."""

    def __init__(self, group: zarr.Group, spec: ArraySpec, shard_bytes: int):
        self.spec = spec
        self._group = group
        self._stored = np.dtype(STORED_AS[spec.dtype])
        chunks = max(1, shard_bytes // (spec.chunk_rows * spec.row_bytes))
        self._shard_rows = chunks * spec.chunk_rows
        self._array: zarr.Array | None = None
        self._written = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_rows = 0

    def check(self, unit_id: str, array: np.ndarray) -> None:
        if array.shape[1:] != self.spec.width or array.dtype != self._stored:
            raise ValueError(
                f"unit {unit_id!r}: array {self.spec.name} is {array.dtype} {array.shape}, "
                f"declared {self._stored} [tokens, {', '.join(map(str, self.spec.width))}]"
            )

    def append(self, array: np.ndarray) -> None:
        self._waiting.append(np.array(array))
        self._waiting_rows += len(array)
        while self._waiting_rows >= self._shard_rows:
            rows = self._take()
            self._write(rows[: self._shard_rows])
            self._waiting, self._waiting_rows = [rows[self._shard_rows :]], len(rows) - self._shard_rows

    def close(self) -> None:
        rows = self._take()
        if len(rows) or self._array is None:
            self._write(rows)

    def _take(self) -> np.ndarray:
        rows = np.concatenate([np.empty((0, *self.spec.width), self._stored), *self._waiting])
        self._waiting, self._waiting_rows = [], 0
        return rows

    def _write(self, rows: np.ndarray) -> None:
        array, stop = self._array, self._written + len(rows)
        if array is None:
            array = self._array = self._create(stop)
        else:
            array.resize((stop, *self.spec.width))
        array[self._written : stop] = rows
        self._written = stop

    def _create(self, rows: int) -> zarr.Array:
        from zarr.codecs import Crc32cCodec

        chunk_rows = max(1, min(self.spec.chunk_rows, rows))
        shard_rows = chunk_rows * max(1, -(-rows // chunk_rows))
        return self._group.create_array(
            self.spec.name,
            shape=(rows, *self.spec.width),
            dtype=self._stored,
            chunks=(chunk_rows, *self.spec.width),
            shards=(shard_rows, *self.spec.width),
            filters=None,
            compressors=[Crc32cCodec()],
            fill_value=0,
            attributes={"kdpipe_dtype": "bfloat16"} if self.spec.dtype == "bfloat16" else {},
            config={"write_empty_chunks": True},
        )


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


def _checked(attributes: Mapping[str, Any]) -> dict[str, Any]:
    if clash := RESERVED & attributes.keys():
        raise ValueError(f"attributes {sorted(clash)} are the format's own")
    return _plain(dict(attributes))
