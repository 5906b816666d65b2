"""Arrays of a part as files: Zarr v3 shards that are raw rows, written as they come and read without a copy too many.

An array is chunked along its rows alone, with the codecs `bytes` (little endian) and `crc32c` inside
`sharding_indexed`. So a shard file is chunks one after the other, each followed by the 4 bytes of its CRC32C, then one
pair of uint64 (offset, size) a chunk, then the CRC32C of these. That is valid Zarr, and it is also a memory map.
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import stat
import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from kdpipe.data.store.format import STORED_AS, ArraySpec

CRC_BYTES = 4
_ENTRY_BYTES = 16
_EMPTY = 2**64 - 1
_IOV = 64  # buffers handed to one system call
_READ_BYTES = 2 << 20  # read and proven at a time: what a processor's cache holds
METADATA = "zarr.json"
HELD_CHUNKS = 4
"""Chunks of an array that wait in memory and are written together."""


def crc_of(*pieces: np.ndarray) -> bytes:
    """CRC32C of bytes that lie in several contiguous uint8 arrays, as 4 bytes, little endian."""
    value = 0
    for piece in pieces:
        value = google_crc32c.extend(value, piece)  # type: ignore[arg-type]
    return value.to_bytes(CRC_BYTES, "little")


def as_json(document: Any) -> bytes:
    """The one way in which kdpipe writes metadata, so that a file can be compared with what it says."""
    return json.dumps(document, indent=1, allow_nan=False).encode("ascii")


def group_document(attributes: Any = None) -> dict[str, Any]:
    """`zarr.json` of a group."""
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes or {}}


def array_document(spec: ArraySpec, rows: int, chunk_rows: int, shard_rows: int) -> dict[str, Any]:
    """`zarr.json` of an array."""
    stored = STORED_AS[spec.dtype]
    raw = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    if np.dtype(stored).itemsize == 1:
        raw[0] = {"name": "bytes"}
    index = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk_rows, *spec.width],
        "codecs": raw,
        "index_codecs": index,
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [rows, *spec.width],
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *spec.width]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if stored.startswith("float") else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {"kdpipe_dtype": spec.dtype} if stored != spec.dtype else {},
        "storage_transformers": [],
    }


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
            taken = chunks[place : place + min(self._per_shard - in_shard, _IOV // 2)]
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
        index = np.full((chunks, 2), _EMPTY, "<u8")
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


def shard_file(folder: Path, number: int, inner: int) -> Path:
    """File of a shard of an array with `inner` dimensions beside its rows."""
    return folder.joinpath("c", str(number), *("0" for _ in range(inner)))


class Damaged(Exception):
    """A file is not what it was written as; `chunk` is the chunk concerned, or None where it is the index."""

    def __init__(self, file: Path, what: str, chunk: int | None = None):
        self.file = file
        self.what = what
        self.chunk = chunk
        super().__init__(f"{file}: {what}")


@dataclass(frozen=True)
class Grid:
    """Where the rows of an array lie.

    Attributes:
        rows: rows there are.
        row_bytes: bytes of one.
        chunk_rows: rows of a chunk.
        per_shard: chunks of a shard.
    """

    rows: int
    row_bytes: int
    chunk_rows: int
    per_shard: int

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.chunk_rows * self.row_bytes

    @staticmethod
    def of(document: Any) -> Grid | None:
        """The grid that `zarr.json` of an array describes, or None where its codecs are not ours.

        Raises:
            KeyError, TypeError, ValueError: it is not the metadata of a Zarr v3 array.
        """
        shape, stored = document["shape"], np.dtype(document["data_type"])
        shard = document["chunk_grid"]["configuration"]["chunk_shape"]
        if len(document["codecs"]) != 1 or document["codecs"][0]["name"] != "sharding_indexed":
            return None
        configuration = document["codecs"][0]["configuration"]
        chunk = configuration["chunk_shape"]
        codecs = [codec["name"] for codec in configuration["codecs"]]
        endian = configuration["codecs"][0].get("configuration", {}).get("endian", "little")
        index = [codec["name"] for codec in configuration["index_codecs"]]
        ours = codecs == index == ["bytes", "crc32c"] and endian == "little"
        if not ours or configuration.get("index_location", "end") != "end":
            return None
        if document["chunk_key_encoding"] != {"name": "default", "configuration": {"separator": "/"}}:
            return None
        if not chunk[1:] == shard[1:] == shape[1:] or shard[0] % chunk[0]:
            return None
        row_bytes = stored.itemsize * int(np.prod(shape[1:], dtype=np.int64))
        return Grid(shape[0], row_bytes, chunk[0], shard[0] // chunk[0])


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
        index_bytes = grid.per_shard * _ENTRY_BYTES + CRC_BYTES
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
            expected = np.full((grid.per_shard, 2), _EMPTY, "<u8")
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
