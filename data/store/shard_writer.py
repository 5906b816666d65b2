"""Writes the shard files of an array as its rows come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.store.format import STORED_AS, ArraySpec
from kdpipe.data.store.shard import CRC_BYTES, EMPTY, METADATA, array_document, as_json, crc_of, shard_file

HELD_CHUNKS = 4
"""Chunks of an array that wait in memory and are written together."""

_CALL_BYTES = 1 << 20
"""Bytes handed to one system call, about. Larger calls ask for pages of 2 MiB, which a virtual machine may have given
back to its host: on such a one, calls of 4 MiB took four times the processor time."""

_IOV = 64  # buffers handed to one system call


def even_chunk_rows(rows: int, chunk_rows: int) -> int:
    """Rows of a chunk of an array that is small enough to be cut into equal chunks, none larger than `chunk_rows`."""
    chunks = max(1, -(-rows // chunk_rows))
    return max(1, -(-rows // chunks))


class ArrayWriter:
    """One array being written.

    A few chunks wait in memory. They go to the file together, since a file that is written in small pieces lies in
    small pieces in the page cache, too, and is slower to read; and an array that has no more of them is cut into equal
    ones, so that next to nothing is filled up at its end.

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
        self._per_shard = max(1, shard_bytes // self._chunk_bytes)
        self._waiting = np.empty(0, np.uint8)
        self._filled = 0
        self._chunks = 0
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
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._wait(data)
        if self._filled > HELD_CHUNKS * self._chunk_bytes:
            self._write_waiting()

    def close(self) -> None:
        """Writes what waits, the index and `zarr.json`."""
        chunk_rows = self.spec.chunk_rows
        if not self._chunks:
            chunk_rows = even_chunk_rows(self.rows, chunk_rows)
        chunk_bytes = chunk_rows * self.spec.row_bytes
        if self._filled:
            whole = -(-self._filled // chunk_bytes)
            self._wait(np.zeros(whole * chunk_bytes - self._filled, np.uint8))
            self._write(np.split(self._waiting[: self._filled], whole), chunk_bytes)
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

    def _write_waiting(self) -> None:
        """Writes the whole chunks of what waits."""
        whole = self._filled // self._chunk_bytes
        size = whole * self._chunk_bytes
        self._write(np.split(self._waiting[:size], whole), self._chunk_bytes)
        self._waiting[: self._filled - size] = self._waiting[size : self._filled]
        self._filled -= size

    def _write(self, chunks: Sequence[np.ndarray], chunk_bytes: int) -> None:
        place = 0
        while place < len(chunks):
            in_shard = self._chunks % self._per_shard
            if in_shard == 0:
                if self._handle is not None:
                    self._finish(chunk_bytes, self._per_shard)
                self._open(self._chunks // self._per_shard)
            most = min(_IOV // 2, max(1, _CALL_BYTES // chunk_bytes))
            taken = chunks[place : place + min(self._per_shard - in_shard, most)]
            pieces: list[Any] = []
            for chunk in taken:
                crc = crc_of(chunk)
                self.crcs += crc
                pieces += [chunk, crc]
            self._out(pieces)
            self._chunks += len(taken)
            place += len(taken)

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
        self._out([raw, crc_of(raw)])
        os.close(self._handle)
        self._handle = None

    def _out(self, pieces: Sequence[Any]) -> None:
        assert self._handle is not None
        left = sum(len(piece) for piece in pieces)
        written = os.writev(self._handle, pieces)
        if written < left:
            rest = memoryview(b"".join(bytes(piece) for piece in pieces))[written:]
            while rest:
                rest = rest[os.write(self._handle, rest) :]
