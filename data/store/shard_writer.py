"""Writes the shard files of an array as its rows come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdpipe.data.store.format import STORED_AS, ArraySpec
from kdpipe.data.store.shard import CRC_BYTES, EMPTY, METADATA, array_document, as_json, crc_of, shard_file

HELD_CHUNKS = 4
"""Chunks of an array that wait in memory at least before any are written."""

_ALIGNED = 2 << 20  # bytes; of a huge page
_TOGETHER = 32  # chunks handed to one system call at most


def even_chunk_rows(rows: int, chunk_rows: int) -> int:
    """Rows of a chunk of an array that is small enough to be cut into equal chunks, none larger than `chunk_rows`."""
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


class ArrayWriter:
    """One array being written.

    A few chunks wait in memory. They are written up to a multiple of 2 MiB of the file, where so much waits: a file
    that is written in other pieces lies in small pages in the page cache, too, and is mapped at half the speed. An
    array that has no more than these chunks is cut into equal ones, so that next to nothing is filled up at its end.

    Args:
        folder: the array's folder; made here.
        spec: what it holds.
        shard_bytes: upper bound of a shard's data (bytes).

    Attributes:
        rows: rows so far.
        crcs: checksums of the chunks that were written, 4 bytes each.
    """

    def __init__(self, folder: Path, spec: ArraySpec, shard_bytes: int):
        folder.mkdir(parents=True)
        self.spec = spec
        self.rows = 0
        self._folder = folder
        self._stored = np.dtype(STORED_AS[spec.dtype])
        self._chunk_bytes = spec.chunk_rows * spec.row_bytes
        self._aligned = min(_ALIGNED, 1 << ((HELD_CHUNKS * self._chunk_bytes // 2).bit_length() - 1))
        self._per_shard = max(1, shard_bytes // self._chunk_bytes)
        self._waiting = np.empty(0, np.uint8)
        self._filled = 0
        self._chunks = 0
        self._sent = 0  # bytes of the next chunk and its checksum that are in the file
        self._handle: int | None = None
        self.crcs = bytearray()

    def check(self, unit: str, array: np.ndarray) -> None:
        """Refuses rows that are not what was declared."""
        if array.shape[1:] != self.spec.width or array.dtype != self._stored:
            raise ValueError(
                f"unit {unit!r}: array {self.spec.name} is {array.dtype} {array.shape}, "
                f"declared {self._stored} [{self.spec.axis}, {', '.join(map(str, self.spec.width))}]"
            )

    def append(self, array: np.ndarray) -> None:
        """Adds rows `[n, *width]`; the caller may reuse their memory.

        Raises:
            OSError: the disk is full; the part must be thrown away.
        """
        self.rows += len(array)
        self._wait(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        if self._filled > HELD_CHUNKS * self._chunk_bytes:
            self._write(self._chunk_bytes, self._aligned)

    def close(self) -> None:
        """Writes what waits, the index and `zarr.json`."""
        chunk_rows = self.spec.chunk_rows
        if self._handle is None and not self._chunks:
            chunk_rows = even_chunk_rows(self.rows, chunk_rows)
        chunk_bytes = chunk_rows * self.spec.row_bytes
        self._wait(np.zeros(-self._filled % chunk_bytes, np.uint8))
        self._write(chunk_bytes, aligned=1)
        chunks = min(self._per_shard, max(1, self._chunks))
        if self._handle is not None:
            self._finish(chunk_bytes, chunks)
        document = array_document(self.spec, self.rows, chunk_rows, chunks * chunk_rows)
        (self._folder / METADATA).write_bytes(as_json(document))

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]

    def _wait(self, piece: np.ndarray) -> None:
        if self._filled + len(piece) > len(self._waiting):
            # Most arrays of a small part never fill a chunk.
            held = min(2 * len(self._waiting), HELD_CHUNKS * self._chunk_bytes)
            grown = np.empty(max(held, self._filled + len(piece)), np.uint8)
            grown[: self._filled] = self._waiting[: self._filled]
            self._waiting = grown
        self._waiting[self._filled : self._filled + len(piece)] = piece
        self._filled += len(piece)

    def _write(self, chunk_bytes: int, aligned: int) -> None:
        """Writes the whole chunks of what waits, but for what lies behind the last multiple of `aligned` bytes of the
        file, unless the shard is full."""
        stride, done = chunk_bytes + CRC_BYTES, 0
        while whole := self._filled // chunk_bytes - done:
            in_shard = self._chunks % self._per_shard
            taken = min(whole, self._per_shard - in_shard, _TOGETHER)
            end = (in_shard + taken) * stride
            if in_shard + taken < self._per_shard:
                end -= end % aligned
            size = end - in_shard * stride - self._sent
            if size <= 0:
                break
            if self._handle is None:
                self._open(self._chunks // self._per_shard)
            chunks = [self._waiting[at * chunk_bytes : (at + 1) * chunk_bytes] for at in range(done, done + taken)]
            crcs = [crc_of(chunk) for chunk in chunks]
            pieces = [piece for chunk, crc in zip(chunks, crcs, strict=True) for piece in (chunk.data, memoryview(crc))]
            self._out(pieces, self._sent, size)
            written, self._sent = divmod(self._sent + size, stride)
            self.crcs += b"".join(crcs[:written])
            self._chunks += written
            done += written
            if in_shard + written == self._per_shard:
                self._finish(chunk_bytes, self._per_shard)
        self._filled -= done * chunk_bytes
        self._waiting[: self._filled] = self._waiting[done * chunk_bytes : done * chunk_bytes + self._filled]

    def _open(self, number: int) -> None:
        file = shard_file(self._folder, number, len(self.spec.width))
        file.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def _finish(self, chunk_bytes: int, chunks: int) -> None:
        """Writes the index of the open shard, of `chunks` entries, and closes it."""
        assert self._handle is not None
        there = (self._chunks - 1) % self._per_shard + 1
        index = np.full((chunks, 2), EMPTY, "<u8")
        index[:there, 0] = np.arange(there) * (chunk_bytes + CRC_BYTES)
        index[:there, 1] = chunk_bytes + CRC_BYTES
        raw = index.reshape(-1).view(np.uint8)
        self._out([raw.data, memoryview(crc_of(raw))], 0, len(raw) + CRC_BYTES)
        os.close(self._handle)
        self._handle = None

    def _out(self, pieces: Sequence[memoryview], start: int, size: int) -> None:
        """Writes `size` bytes of what the pieces are one after another, from byte `start` on."""
        assert self._handle is not None
        buffers, end = [], start + size
        for piece in pieces:
            buffers.append(piece[max(0, start) : max(0, end)])
            start, end = start - len(piece), end - len(piece)
        written = os.writev(self._handle, buffers)
        if written < size:
            rest = memoryview(b"".join(buffers))[written:]
            while rest:
                rest = rest[os.write(self._handle, rest) :]
