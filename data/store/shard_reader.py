"""Reads the shard files of an array: proves each chunk once, and copies rows no more often than needed."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Hashable
from contextlib import suppress
from pathlib import Path

import numpy as np

from kdpipe.data.store.shard import CRC_BYTES, EMPTY, ENTRY_BYTES, Grid, crc_of

_MADV_POPULATE_READ = 22  # Linux 5.14 and newer


class Damaged(Exception):
    """A file is not what it was written as; `chunk` is the chunk concerned, or None where it is the index."""

    def __init__(self, file: Path, what: str, chunk: int | None = None):
        self.file = file
        self.what = what
        self.chunk = chunk
        super().__init__(f"{file}: {what}")


class ShardReader:
    """One shard file, mapped into memory. Safe to use from several threads.

    A chunk's checksum is verified when it is first touched.

    Args:
        file: the shard.
        grid: of its array.
        first: number of its first chunk in the array.
        verified: a byte a chunk of the array, set to 1 as they are; None: checksums are not looked at.
        crcs: checksums of the array's chunks, 4 bytes each, that those in the file must equal: they bind a file to its
            place. None: they are not known.

    Raises:
        Damaged: the file is missing, cut, or its index is damaged.
        NotImplementedError: its chunks lie otherwise than kdpipe writes them.
    """

    def __init__(self, file: Path, grid: Grid, first: int, verified: bytearray | None, crcs: bytes | None = None):
        self.file = file
        self._first = first
        self._chunk_rows = grid.chunk_rows
        self._row_bytes = grid.row_bytes
        self._stride = stride = grid.chunk_bytes + CRC_BYTES
        self._verified = verified
        self._crcs = crcs
        there = min(grid.per_shard, -(-grid.rows // grid.chunk_rows) - first)
        index_bytes = grid.per_shard * ENTRY_BYTES + CRC_BYTES
        try:
            handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK)  # or a named pipe would be waited for
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise  # the file may be whole
            raise Damaged(file, f"missing or cannot be read ({error.strerror})") from None
        try:
            found = os.fstat(handle)
            size = found.st_size
            if not stat.S_ISREG(found.st_mode):
                raise Damaged(file, "not a regular file")
            if size < index_bytes:
                raise Damaged(file, "missing or empty" if not size else f"cut to {size} bytes")
            self._map = mmap.mmap(handle, 0, prot=mmap.PROT_READ)
        finally:
            os.close(handle)
        with suppress(OSError, AttributeError):  # a system without huge pages
            # Brings in 2 MiB at a time where it must, and maps what it has brought at once.
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.bytes = np.frombuffer(self._map, np.uint8)
        self._bring(size - index_bytes, size)
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

    def view(self, start: int, stop: int, dtype: np.dtype, width: tuple[int, ...]) -> np.ndarray | None:
        """Rows `[start, stop)` of the shard without copying, read-only, or None where they cross chunks."""
        chunk = start // self._chunk_rows
        if (stop - 1) // self._chunk_rows != chunk:
            return None
        self._verify(chunk)
        at = start * self._row_bytes + chunk * CRC_BYTES
        return np.ndarray((stop - start, *width), dtype, self._map, at)

    def read_into(self, out: np.ndarray, start: int, stop: int) -> None:
        """Copies rows `[start, stop)` of the shard into contiguous uint8 `out`.

        Raises:
            Damaged: names the chunk whose checksum does not match, or that cannot be read.
        """
        first, last = start // self._chunk_rows, (stop - 1) // self._chunk_rows
        if self._verified is None or self._verified.find(0, self._first + first, self._first + last + 1) < 0:
            self._copy(out, start, stop)
            return
        place = start
        for chunk in range(first, last + 1):
            # One after the other: a chunk that was just proven is copied from the processor's cache.
            self._verify(chunk)
            end = min(stop, (chunk + 1) * self._chunk_rows)
            self._copy(out[(place - start) * self._row_bytes : (end - start) * self._row_bytes], place, end)
            place = end

    def _copy(self, out: np.ndarray, start: int, stop: int) -> None:
        """Copies rows from the map: the end of a chunk, whole chunks by one strided copy, the beginning of one."""
        chunk_rows, row_bytes, stride, size = self._chunk_rows, self._row_bytes, self._stride, len(out)
        chunk, skipped = divmod(start, chunk_rows)
        at = 0
        if skipped:
            place = chunk * stride + skipped * row_bytes
            at = min((chunk_rows - skipped) * row_bytes, size)
            out[:at] = self.bytes[place : place + at]
            chunk += 1
        whole = stop // chunk_rows - chunk
        if whole > 0:
            end = at + whole * chunk_rows * row_bytes
            chunks = np.ndarray((whole, chunk_rows * row_bytes), np.uint8, self._map, chunk * stride, (stride, 1))
            out[at:end].reshape(whole, -1)[...] = chunks
            at, chunk = end, chunk + whole
        if at < size:
            out[at:] = self.bytes[chunk * stride : chunk * stride + size - at]

    def _verify(self, chunk: int) -> None:
        """Holds the checksum of a chunk's data against the one behind it, and the one that the part says."""
        number = self._first + chunk
        if self._verified is None or self._verified[number]:
            return
        end = (chunk + 1) * self._stride
        self._bring(end - self._stride, end, number)
        found = crc_of(self.bytes[end - self._stride : end - CRC_BYTES])
        if found != self.bytes[end - CRC_BYTES : end].tobytes():
            raise Damaged(self.file, "damaged (the checksum does not match)", number)
        if self._crcs is not None and found != self._crcs[CRC_BYTES * number : CRC_BYTES * (number + 1)]:
            raise Damaged(self.file, "damaged (it is not the chunk that the part was written with)", number)
        self._verified[number] = 1

    def _bring(self, start: int, end: int, chunk: int | None = None) -> None:
        """Has the system read bytes of the file, so that a disk that fails is an error and not the end of the process
        (SIGBUS). A system that cannot do so reads them when they are touched."""
        page = start - start % mmap.PAGESIZE
        try:
            self._map.madvise(_MADV_POPULATE_READ, page, end - page)
        except OSError as error:
            if error.errno in (errno.EFAULT, errno.EIO):
                raise Damaged(self.file, "cannot be read (the disk fails, or the file was cut)", chunk) from None


class OpenShards:
    """Shard files kept open, those opened last; bounded, since each takes a file descriptor.

    Args:
        limit: files.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._open: dict[Hashable, ShardReader] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable) -> ShardReader | None:
        """The open file under a key, or None. Takes no lock, since every array of every sample asks here."""
        return self._open.get(key)

    def put(self, key: Hashable, reader: ShardReader) -> None:
        """Keeps a file open, and lets go of the one that was opened longest ago."""
        with self._lock:
            self._open[key] = reader
            while len(self._open) > self._limit:
                self._open.pop(next(iter(self._open)))
