"""One array of a part as it is read: by `kdpipe.data.store.shard_reader`, or by zarr where its codecs are not ours."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdpipe.data.errors import StoreError
from kdpipe.data.store.metadata import damaged, raise_if_scarce
from kdpipe.data.store.shard import METADATA, Grid, shard_file
from kdpipe.data.store.shard_reader import Damaged, OpenShards, ShardReader

if TYPE_CHECKING:
    import zarr


class StoredArray:
    """Rows of an array by number. Safe to use from several threads.

    Args:
        part: folder of the part.
        name: of the array.
        shards: files kept open.
        verify: whether the checksum of each chunk is verified when it is first touched.
        crcs: checksums of its chunks, 4 bytes each, as the part says them; None: they are not known.

    Attributes:
        shape: whole shape, rows first.
        dtype: in the file.

    Raises:
        StoreError: its metadata cannot be read.
    """

    def __init__(self, part: Path, name: str, shards: OpenShards, *, verify: bool = True, crcs: bytes | None = None):
        self._crcs = crcs
        self._part = part
        self._name = name
        self._folder = part / name
        self._key = str(self._folder)
        self._shards = shards
        try:
            document = json.loads((self._folder / METADATA).read_bytes())
            self.shape: tuple[int, ...] = tuple(document["shape"])
            self.dtype = np.dtype(document["data_type"])
            self._grid = Grid.of(document)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise_if_scarce(error)
            raise damaged(part, f"{self._folder / METADATA}: cannot be read ({error!r})") from None
        self._width = self.shape[1:]
        self._chunk_rows = 0 if self._grid is None else self._grid.chunk_rows
        self._shard_rows = 1 if self._grid is None else self._grid.chunk_rows * self._grid.per_shard
        self._zarr: zarr.Array | None = None
        self._otherwise: set[int] = set()
        self._lock = threading.Lock()
        self._verified: bytearray | None = None
        if verify and self._grid is not None:
            self._verified = bytearray(-(-self._grid.rows // self._grid.chunk_rows))

    @property
    def is_direct(self) -> bool:
        """Whether its files, as far as they have been opened, are read as they lie, without zarr."""
        return self._grid is not None and not self._otherwise

    def view(self, start: int, stop: int, unit: Mapping[str, Any] | None = None) -> np.ndarray:
        """Rows `[start, stop)`, read-only: of the file itself where they lie in one chunk, else a copy.

        Args:
            start, stop: rows, within the array.
            unit: whom they are read for, for errors.

        Raises:
            StoreError: what is read is damaged or missing; names file, part, array, chunk and sample.
        """
        if start < stop <= start + self._chunk_rows:
            number, at = divmod(start, self._shard_rows)
            try:
                shard = self._shard(number)
                found = shard.view(at, at + stop - start, self.dtype, self._width) if shard is not None else None
            except Damaged as error:
                raise self._error(error, unit) from None
            if found is not None:
                return found
        out = self.read(start, stop, unit)
        out.flags.writeable = False
        return out

    def read(self, start: int, stop: int, unit: Mapping[str, Any] | None = None) -> np.ndarray:
        """Rows `[start, stop)` in memory of their own; otherwise like `view`."""
        out = np.empty((stop - start, *self._width), self.dtype)
        self.read_into(out, start, stop, unit)
        return out

    def read_into(self, out: np.ndarray, start: int, stop: int, unit: Mapping[str, Any] | None = None) -> None:
        """Reads rows `[start, stop)` into `out`, contiguous, of the array's dtype; otherwise like `view`."""
        if out.shape != (stop - start, *self._width) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ValueError(f"{self._name}: {out.dtype} {out.shape} does not take rows {start} to {stop}")
        if stop <= start:
            return
        if self._grid is None:
            self._from_zarr(out, start, stop, unit)
            return
        grid = self._grid
        flat, in_shard = out.reshape(-1).view(np.uint8), self._shard_rows
        try:
            for number in range(start // in_shard, (stop - 1) // in_shard + 1):
                low, high = max(start, number * in_shard), min(stop, (number + 1) * in_shard)
                shard = self._shard(number)
                if shard is None:
                    self._from_zarr(out[low - start : high - start], low, high, unit)
                    continue
                piece = flat[(low - start) * grid.row_bytes : (high - start) * grid.row_bytes]
                shard.read_into(piece, low - number * in_shard, high - number * in_shard)
        except Damaged as error:
            raise self._error(error, unit) from None

    def _shard(self, number: int) -> ShardReader | None:
        """The reader of a shard file, or None where its chunks lie otherwise than kdpipe writes them."""
        key = (self._key, number)
        found = self._shards.get(key)
        if found is None and number not in self._otherwise:
            grid = self._grid
            assert grid is not None
            file = shard_file(self._folder, number, len(self._width))
            try:
                found = ShardReader(file, grid, number * grid.per_shard, self._verified, self._crcs)
            except NotImplementedError:
                self._otherwise.add(number)
                return None
            self._shards.put(key, found)
        return found

    def _open_zarr(self) -> zarr.Array:
        import zarr

        with self._lock:
            if self._zarr is None:
                found = zarr.open_array(self._folder, mode="r", zarr_format=3)
                self._zarr = found
            return self._zarr

    def _from_zarr(self, out: np.ndarray, start: int, stop: int, unit: Mapping[str, Any] | None) -> None:
        try:
            out[...] = np.asarray(self._open_zarr()[start:stop])
        except MemoryError:
            raise
        except Exception as error:
            what = f"damaged (part {self._part.name}, array {self._name}, rows {start} to {stop}{_read_for(unit)})"
            raise damaged(self._part, f"{self._folder}: {what}: {error}") from error

    def _error(self, error: Damaged, unit: Mapping[str, Any] | None) -> StoreError:
        chunk = "" if error.chunk is None else f", chunk {error.chunk}"
        where = f"part {self._part.name}, array {self._name}{chunk}{_read_for(unit)}"
        return damaged(self._part, f"{error.file}: {error.what} ({where})")


def _read_for(unit: Mapping[str, Any] | None) -> str:
    if unit is None:
        return ""
    samples = [sample["id"] for sample in unit["samples"]] if "samples" in unit else [unit["id"]]
    return f", read for sample {', '.join(map(repr, samples))}"
