"""Reads the shard files of an array: proves each chunk once, and copies rows no more often than needed."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Hashable
from pathlib import Path

import numpy as np

from kdpipe.data.store.shard import CRC_BYTES, EMPTY, ENTRY_BYTES, Grid, crc_of

_IOV = 64  # buffers handed to one system call
_READ_BYTES = 2 << 20  # read and proven at a time: what a processor's cache holds


class Damaged(Exception):
    """A file is not what it was written as; `chunk` is the chunk concerned, or None where it is the index."""

    def __init__(self, file: Path, what: str, chunk: int | None = None):
        self.file = file
        self.what = what
        self.chunk = chunk
        super().__init__(f"{file}: {what}")


class ShardReader:
    """One shard file, mapped into memory. Safe to use from several threads.

    A chunk's checksum is verified when it is first touched. Rows are read by `preadv` then, and after that copied from
    the map.

    Args:
        file: the shard.
        grid: of its array.
        first: number of its first chunk in the array.
        verified: bool, one a chunk of the array, set as they are; None: checksums are not looked at.
        crcs: checksums of the array's chunks, 4 bytes each, that those in the file must equal: they bind a file to its
            place. None: they are not known.

    Raises:
        Damaged: the file is missing, cut, or its index is damaged.
        NotImplementedError: its chunks lie otherwise than kdpipe writes them.
    """

    def __init__(self, file: Path, grid: Grid, first: int, verified: np.ndarray | None, crcs: bytes | None = None):
        self.file = file
        self._grid = grid
        self._first = first
        self._verified = verified
        self._crcs = crcs
        there = min(grid.per_shard, -(-grid.rows // grid.chunk_rows) - first)
        index_bytes = grid.per_shard * ENTRY_BYTES + CRC_BYTES
        stride = grid.chunk_bytes + CRC_BYTES
        try:
            self._handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # or a named pipe would be waited for
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the file may be whole
            raise Damaged(file, f"missing or cannot be read ({error.strerror})") from None
        try:
            found = os.fstat(self._handle)
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                raise Damaged(file, "not a regular file")
            if size < index_bytes:
                raise Damaged(file, "missing or empty" if not size else f"cut to {size} bytes")
            self._map = mmap.mmap(self._handle, 0, prot=mmap.PROT_READ)
            self.bytes = np.frombuffer(self._map, np.uint8)
            index = self.bytes[size - index_bytes : size - CRC_BYTES]
            if crc_of(index) != self.bytes[size - CRC_BYTES :].tobytes():
                raise Damaged(file, "damaged (the checksum of its index does not match)")
            entries = index.copy().view("<u8").reshape(-1, 2)
            expected = np.full((grid.per_shard, 2), EMPTY, "<u8")
            expected[:there, 0], expected[:there, 1] = np.arange(there) * stride, stride
            if not np.array_equal(entries, expected):
                raise NotImplementedError(file)
            if size != there * stride + index_bytes:
                raise Damaged(file, f"of {size} bytes, not the {there * stride + index_bytes} that its index describes")
        except BaseException:
            os.close(self._handle)
            del self._handle
            raise

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            os.close(self._handle)

    def view(self, start: int, stop: int, dtype: np.dtype, width: tuple[int, ...]) -> np.ndarray | None:
        """Rows `[start, stop)` of the shard without copying, read-only, or None where they cross chunks."""
        grid = self._grid
        chunk = start // grid.chunk_rows
        if (stop - 1) // grid.chunk_rows != chunk:
            return None
        self._verify(chunk)
        at = start * grid.row_bytes + chunk * CRC_BYTES
        return np.ndarray((stop - start, *width), dtype, self._map, at)

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Copies rows `[start, stop)` of the shard into contiguous uint8 `out`.

        Raises:
            Damaged: names the chunk whose checksum does not match.
        """
        grid = self._grid
        first, last = start // grid.chunk_rows, (stop - 1) // grid.chunk_rows + 1
        if self._verified is None or self._verified[self._first + first : self._first + last].all():
            self._copy(out, start, stop)
            return
        together = min(max(1, _READ_BYTES // grid.chunk_bytes), _IOV // 2)
        place = start
        while place < stop:
            chunk = place // grid.chunk_rows
            until = chunk + 1
            known = self._verified[self._first + chunk]
            while until < last and self._verified[self._first + until] == known and (known or until - chunk < together):
                until += 1
            end = min(stop, until * grid.chunk_rows)
            piece = out[(place - start) * grid.row_bytes : (end - start) * grid.row_bytes]
            if known:
                self._copy(piece, place, end)
            else:
                self._read_verified(piece, place, end)
            place = end

    def _copy(self, out: np.ndarray, start: int, stop: int) -> None:
        """Copies rows from the map: the end of a chunk, whole chunks by one strided copy, the beginning of one."""
        grid = self._grid
        stride, chunk, at = grid.chunk_bytes + CRC_BYTES, start // grid.chunk_rows, 0
        if start > chunk * grid.chunk_rows:
            size = (min(stop, (chunk + 1) * grid.chunk_rows) - start) * grid.row_bytes
            place = start * grid.row_bytes + chunk * CRC_BYTES
            out[:size] = self.bytes[place : place + size]
            at, chunk = size, chunk + 1
        whole = stop // grid.chunk_rows - chunk
        if whole > 0:
            size = whole * grid.chunk_bytes
            chunks = np.ndarray((whole, grid.chunk_bytes), np.uint8, self._map, chunk * stride, (stride, 1))
            out[at : at + size].reshape(whole, -1)[...] = chunks
            at, chunk = at + size, chunk + whole
        if at < len(out):
            out[at:] = self.bytes[chunk * stride : chunk * stride + len(out) - at]

    def _read_verified(self, out: np.ndarray, start: int, stop: int) -> None:
        """Reads rows by one system call and proves their chunks: what was read in `out`, where it is hot in the
        processor's cache, and what the chunks hold before and behind it in the map."""
        grid = self._grid
        stride, first, last = grid.chunk_bytes + CRC_BYTES, start // grid.chunk_rows, (stop - 1) // grid.chunk_rows
        before = (start - first * grid.chunk_rows) * grid.row_bytes
        behind = ((last + 1) * grid.chunk_rows - stop) * grid.row_bytes
        pieces, buffers, at = [], [], 0
        crcs = np.empty((last - first + 1, CRC_BYTES), np.uint8)
        for number in range(last - first + 1):
            size = grid.chunk_bytes - (before if number == 0 else 0) - (behind if first + number == last else 0)
            pieces.append(out[at : at + size])
            buffers += [pieces[-1], crcs[number]]
            at += size
        if behind:
            buffers.pop()
        wanted = sum(map(len, buffers))
        if os.preadv(self._handle, buffers, first * stride + before) < wanted:  # type: ignore[arg-type]
            # A file system may give less than was asked for.
            for chunk in range(first, last + 1):
                self._verify(chunk)
            self._copy(out, start, stop)
            return
        for number, piece in enumerate(pieces):
            base = (first + number) * stride
            parts = [self.bytes[base : base + before]] if number == 0 and before else []
            parts.append(piece)
            crc = crcs[number]
            if behind and first + number == last:
                end = base + grid.chunk_bytes
                parts.append(self.bytes[end - behind : end])
                crc = self.bytes[end : end + CRC_BYTES]
            self._prove(first + number, crc_of(*parts), crc.tobytes())

    def _verify(self, chunk: int) -> None:
        if self._verified is None or self._verified[self._first + chunk]:
            return
        place = chunk * (self._grid.chunk_bytes + CRC_BYTES)
        end = place + self._grid.chunk_bytes
        self._prove(chunk, crc_of(self.bytes[place:end]), self.bytes[end : end + CRC_BYTES].tobytes())

    def _prove(self, chunk: int, found: bytes, told: bytes) -> None:
        """Holds the checksum of a chunk's data against the one behind it, and the one that the part says."""
        number = self._first + chunk
        if found != told:
            raise Damaged(self.file, "damaged (the checksum does not match)", number)
        if self._crcs is not None and found != self._crcs[CRC_BYTES * number : CRC_BYTES * (number + 1)]:
            raise Damaged(self.file, "damaged (it is not the chunk that the part was written with)", number)
        if self._verified is not None:
            self._verified[number] = True


class OpenShards:
    """Shard files kept open, the ones used last; bounded, since each takes two file descriptors.

    Args:
        limit: files.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._open: dict[Hashable, ShardReader] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> ShardReader | None:
        """The open file under a key, or None."""
        with self._lock:
            found = self._open.pop(key, None)
            if found is not None:
                self._open[key] = found
            return found

    def put(self, key: Hashable, reader: ShardReader) -> None:
        """Keeps a file open, and lets go of the one that was used longest ago."""
        with self._lock:
            self._open[key] = reader
            while len(self._open) > self._limit:
                self._open.pop(next(iter(self._open)))
