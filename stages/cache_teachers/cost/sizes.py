"""What parts of the teacher store weigh on disk, from the shapes of their arrays alone.

A byte is counted as the writer lays it down: rows, the filling of the last chunk, checksums and index of each shard,
`zarr.json` of every array and group, and what the part's own `zarr.json` says of each unit.

Shape suffix: P parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdpipe.data.ledger_rows import Row, Rows
from kdpipe.data.store.format import ATTRIBUTE, FORMAT, PART, SHARD_BYTES, TOKENS, ArraySpec, starts_name
from kdpipe.data.store.shard import CRC_BYTES, ENTRY_BYTES, array_document, as_json, group_document
from kdpipe.data.store.shard_writer import HELD_CHUNKS
from kdpipe.stages.base import Wanted

_DIGEST = "0" * 32
_PART = "0" * 16 + ".zarr"
_HALF_OPEN_BYTE = 7 / 16
"""Mean bytes that the packed ids of a unit are filled up with, in the layout `mass`."""


@dataclass(frozen=True)
class PartShape:
    """What the parts of one source look like.

    Attributes:
        source: whose units they hold.
        arrays: as `PartWriter` is told.
        attributes: as `PartWriter` is told, those known last included.
        unit: what stands in the attributes of one unit, a typical one.
        entries: mean entries of a token by prefix, of distributions in the layout `mass`.
        id_bits: bits of a packed id.
        rank: rows of the arrays of the axis `part`.
    """

    source: str
    arrays: Sequence[ArraySpec]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    unit: Mapping[str, Any] = field(default_factory=dict)
    entries: Mapping[str, float] = field(default_factory=dict)
    id_bits: int = 0
    rank: int = 0

    def all_arrays(self) -> list[ArraySpec]:
        """The arrays, and those of the starts of their axes."""
        axes = dict.fromkeys([TOKENS, *(spec.axis for spec in self.arrays if spec.axis != PART)])
        return [*self.arrays, *(ArraySpec(starts_name(axis), (), "int64", f"starts of {axis}") for axis in axes)]

    def rows(self, spec: ArraySpec, units_P: np.ndarray, tokens_P: np.ndarray) -> np.ndarray:
        """Rows of an array in parts of so many units and tokens: int64 [P]."""
        if spec.axis == TOKENS:
            return tokens_P
        if spec.axis == PART:
            return np.full_like(units_P, self.rank)
        if spec.axis.startswith("starts of "):
            return units_P + 1
        prefix, kind = spec.axis.rsplit("/", 1)
        entries_P = tokens_P * self.entries[prefix]
        if kind == "bytes":
            entries_P = entries_P * self.id_bits / 8 + units_P * _HALF_OPEN_BYTE
        return np.rint(entries_P).astype(np.int64)


def array_bytes(spec: ArraySpec, rows_P: np.ndarray, shard_bytes: int = SHARD_BYTES) -> np.ndarray:
    """Bytes of the shard files of one array in each part: int64 [P]; see `data.store.shard_writer`."""
    chunk_rows, row = spec.chunk_rows, spec.row_bytes
    per_shard = max(1, shard_bytes // (chunk_rows * row))
    chunks_P = -(-rows_P // chunk_rows)
    shards_P = -(-chunks_P // per_shard)
    even_P = chunks_P * -(-rows_P // np.maximum(chunks_P, 1))
    stored_P = np.where(chunks_P <= HELD_CHUNKS, even_P, chunks_P * chunk_rows)
    indexed_P = np.where(shards_P > 1, shards_P * per_shard, chunks_P)
    return stored_P * row + chunks_P * CRC_BYTES + indexed_P * ENTRY_BYTES + shards_P * CRC_BYTES


def part_bytes(shape: PartShape, units_P: np.ndarray, tokens_P: np.ndarray) -> dict[str, int]:
    """Bytes of parts by array name, their metadata included; what belongs to no one array stands under `""`.

    Args:
        shape: of all of them.
        units_P: int64 [P], units of each part, at least one.
        tokens_P: int64 [P], tokens of each part.
    """
    parts, found = len(units_P), {"": 0}
    if not parts:
        return found
    folders: set[str] = set()
    for spec in shape.all_arrays():
        rows_P = shape.rows(spec, units_P, tokens_P)
        rows = int(rows_P.mean())
        document = array_document(spec, rows, min(spec.chunk_rows, max(1, rows)), max(1, rows))
        chunks = int((-(-rows_P // spec.chunk_rows)).sum())
        found[spec.name] = int(array_bytes(spec, rows_P).sum()) + parts * len(as_json(document))
        found[spec.name] += 2 * CRC_BYTES * chunks  # in hexadecimal, in the attributes
        steps = spec.name.split("/")
        folders.update("/".join(steps[:depth]) for depth in range(1, len(steps)))
    found[""] = parts * (len(folders) * len(as_json(group_document())) + _root_bytes(shape, 1))
    found[""] += int((units_P - 1).sum()) * (_root_bytes(shape, 2) - _root_bytes(shape, 1))
    return found


def _root_bytes(shape: PartShape, units: int) -> int:
    """Bytes of the `zarr.json` of a part with so many units."""
    arrays = {
        spec.name: {"dtype": spec.dtype, "width": list(spec.width)}
        | ({} if spec.axis == TOKENS else {"axis": spec.axis})
        | {"crc32c": ""}
        for spec in shape.arrays
    }
    axes = dict.fromkeys([TOKENS, *(spec.axis for spec in shape.arrays if spec.axis != PART)])
    starts = {starts_name(axis): {"crc32c": ""} for axis in axes}
    record = {"format": FORMAT, "source": shape.source, "units": [dict(shape.unit)] * units, "arrays": arrays}
    record["starts"] = starts
    return len(as_json(group_document({ATTRIBUTE: record | dict(shape.attributes) | {"metadata": _DIGEST}})))


def unit_entry(source: str, want: Wanted, *, tokens: int, sharing: float = 1.0) -> dict[str, Any]:
    """What the attributes of a part say of a unit that serves `want`.

    Args:
        source: of the unit.
        want: a typical one.
        tokens: a typical number.
        sharing: samples that share a unit, on average (`acoustic`).
    """
    about = {"fields": dict(want.fields), "cover": dict(want.cover), "length": 10 * tokens, "content": ""}
    if source == "targets":
        about |= {"content": _DIGEST, "frames": [160_000]}
    if source == "acoustic":
        about["samples"] = [{"id": want.id}] * max(1, round(sharing))
    return {"id": _DIGEST if source == "acoustic" else want.id, "key": _DIGEST, "tokens": tokens, **about}


def cut(lengths: np.ndarray, part_samples: int, windows: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Units int64 [P] and tokens int64 [P] of the parts that units make.

    Args:
        lengths: int64 [units], tokens of each, in the order they are taken.
        part_samples: units of a part.
        windows: int64 [units], rising: units of one window are sorted by length, and no part crosses two.
    """
    if not len(lengths):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    lengths = lengths.astype(np.int64)
    place = np.arange(len(lengths))
    if windows is not None:
        lengths = lengths[np.lexsort((lengths, windows))]
        first = np.flatnonzero(np.diff(windows, prepend=windows[0] - 1))
        place = place - np.repeat(first, np.diff(np.append(first, len(lengths))))
    starts = np.flatnonzero(place % part_samples == 0)
    return np.diff(np.append(starts, len(lengths))), np.add.reduceat(lengths, starts)


def ledger_bytes(wants: Iterable[Wanted], rows: int) -> int:
    """Bytes that so many new rows add to the manifest of a ledger.

    Args:
        wants: some hundreds of those they are for; a table of them is written into memory and measured.
        rows: of all sources together.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    some = [
        Row(
            want.id,
            want.source,
            want.key,
            want.fields,
            _PART,
            place,
            place,
            place,
            content=want.key[::-1] if want.source == "targets" else "",
            cover=want.cover,
        )
        for place, want in enumerate(wants)
    ]
    if not some:
        return 0

    def written(count: int) -> int:
        sink = pa.BufferOutputStream()
        (table,) = Rows.of(some[:count]).tables(max(count, 1))
        pq.write_table(table, sink)
        return sink.getvalue().size

    fixed, full = written(0), written(len(some))
    each = (full - fixed) / len(some)
    return round(fixed + each * rows)
