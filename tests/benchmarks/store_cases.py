"""What bench_store.py measures: the samples, our store, and the plain ways of reading and writing the same bytes.

Imported by the processes of all contenders, so nothing but numpy is imported at the top.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

LAYER = 20
NAME = f"hidden/{LAYER}/states"
BLOCK = 8 << 20  # bytes of one read of a whole file
SEQUENTIAL, SHUFFLED = "sequential", "shuffled"
ORDERS = (SEQUENTIAL, SHUFFLED)


@dataclass(frozen=True)
class Plan:
    """The samples, and where what is made of them stands.

    Attributes:
        folder: holds one folder or file for each format.
        width: numbers a token, in bfloat16 (stored as uint16).
        lengths: tokens of each sample.
        parts: samples of each part.
        shard_bytes: upper bound of a shard.
        sums: CRC-32 of each sample's bytes.
    """

    folder: Path
    width: int
    lengths: tuple[int, ...]
    parts: tuple[int, ...]
    shard_bytes: int
    sums: tuple[int, ...]

    @staticmethod
    def make(folder: Path, *, size: int, tokens: int, width: int, parts: int, shard_bytes: int, seed: int) -> Plan:
        """Writes `size` bytes of random bits as samples of about `tokens` tokens to `raw.npy`, and the plan."""
        rng = np.random.default_rng(seed)
        count = max(parts, round(size / (tokens * width * 2)))
        lengths = rng.integers(max(1, tokens // 2), tokens + tokens // 2 + 1, count)
        rows = np.lib.format.open_memmap(folder / "raw.npy", "w+", np.uint16, (int(lengths.sum()), width))
        sums, start = [], 0
        for length in lengths:
            rows[start : start + length] = rng.integers(0, 2**16, (length, width), np.uint16)
            sums.append(zlib.crc32(rows[start : start + length].data))
            start += length
        rows.flush()
        each = tuple(len(samples) for samples in np.array_split(np.arange(count), parts))
        plan = Plan(folder, width, tuple(map(int, lengths)), each, shard_bytes, tuple(sums))
        (folder / "plan.json").write_text(json.dumps(asdict(plan), default=str))
        return plan

    @staticmethod
    def load(folder: Path) -> Plan:
        """The plan of a folder."""
        found = json.loads((folder / "plan.json").read_text())
        lists = {name: tuple(found[name]) for name in ("lengths", "parts", "sums")}
        return Plan(folder, found["width"], shard_bytes=found["shard_bytes"], **lists)

    @property
    def bytes(self) -> int:
        """Bytes of all samples."""
        return sum(self.lengths) * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a token."""
        return self.width * 2

    def starts(self) -> list[int]:
        """First token of each sample in `raw.npy`, and the end."""
        return [0, *np.cumsum(self.lengths).tolist()]

    def places(self) -> list[tuple[int, int]]:
        """Part of each sample, and its row there."""
        return [(part, row) for part, count in enumerate(self.parts) for row in range(count)]

    def part_starts(self) -> list[int]:
        """First sample of each part, and the end."""
        return [0, *np.cumsum(self.parts).tolist()]

    def order(self, name: str) -> list[int]:
        """Numbers of the samples in an order; the shuffled one is the same for everyone."""
        count = len(self.lengths)
        return list(range(count)) if name == SEQUENTIAL else np.random.default_rng(7).permutation(count).tolist()

    def raw(self) -> np.ndarray:
        """All rows, mapped into memory."""
        return np.asarray(np.load(self.folder / "raw.npy", mmap_mode="r"))


def part_folders(folder: Path) -> list[Path]:
    """The parts of our store in a folder."""
    return sorted(folder.glob("*.zarr"))


class Reader:
    """A contender: opened, then asked for samples, any number of times.

    Args:
        plan: the samples.
        threads: that load ahead of use; 0: samples are loaded when asked for.

    Attributes:
        own_order: samples come in an order of its own.
        whole_files: it reads files, of which samples are not told apart.
    """

    own_order = False
    whole_files = False

    def __init__(self, plan: Plan, threads: int):
        self.plan = plan
        self.threads = threads
        self.opened: Any = None

    def open(self) -> None:
        """Opens what it reads from, anew."""
        raise NotImplementedError

    def close(self) -> None:
        """Lets go of it, memory maps included."""
        self.opened = None

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Each sample's number and bytes, in memory that is no map of the file, valid until the next is asked for."""
        raise NotImplementedError


class IntoBuffers(Reader):
    """Reads into memory that is used again."""

    def __init__(self, plan: Plan, threads: int):
        super().__init__(plan, threads)
        self._buffer = np.zeros((max(plan.lengths), plan.width), np.uint16)
        self._ring: Any = None

    def read(self, sample: int, out: np.ndarray) -> None:
        """Reads a sample into `out` uint16 [tokens, width]."""
        raise NotImplementedError

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        lengths = self.plan.lengths
        if not self.threads:
            for sample in order:
                out = self._buffer[: lengths[sample]]
                self.read(sample, out)
                yield sample, out
            return
        from kdpipe.data.store.arena import Ring
        from kdpipe.data.stream import prefetch

        ring = self._ring = self._ring or Ring()

        def load(sample: int) -> tuple[int, np.ndarray, Any]:
            arena = ring.acquire()
            out = arena.take((lengths[sample], self.plan.width), np.uint16)
            self.read(sample, out)
            return sample, out, arena

        for sample, out, arena in prefetch(order, load, depth=2 * self.threads, threads=self.threads):
            yield sample, out
            ring.release(arena)


class Memmap(IntoBuffers):
    """`np.copyto` from a memory map of `raw.npy`."""

    def open(self) -> None:
        self.opened = self.plan.raw()
        self._starts = self.plan.starts()

    def read(self, sample: int, out: np.ndarray) -> None:
        np.copyto(out, self.opened[self._starts[sample] : self._starts[sample + 1]])


class Preadv(IntoBuffers):
    """One `preadv` a sample from `raw.npy`."""

    def open(self) -> None:
        self.opened = (self.plan.folder / "raw.npy").open("rb", buffering=0)
        skipped = os.fstat(self.opened.fileno()).st_size - self.plan.bytes
        self._at = [skipped + start * self.plan.row_bytes for start in self.plan.starts()]

    def read(self, sample: int, out: np.ndarray) -> None:
        flat = out.reshape(-1).view(np.uint8)
        if os.preadv(self.opened.fileno(), [flat], self._at[sample]) != flat.nbytes:
            raise OSError("a read came short")


class PreadvFiles(Reader):
    """All files of our store, one after the other, by `preadv` of large blocks."""

    whole_files = True

    def open(self) -> None:
        files = sorted(path for path in (self.plan.folder / "store").rglob("*") if path.is_file())
        self.opened = [(path, at) for path in files for at in range(0, path.stat().st_size, BLOCK)]
        self._free = [np.zeros(BLOCK, np.uint8) for _ in range(2 * self.threads + 1)]

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        from kdpipe.data.stream import prefetch

        def load(place: tuple[Path, int]) -> tuple[np.ndarray, int]:
            buffer = self._free.pop()
            handle = os.open(place[0], os.O_RDONLY)
            try:
                return buffer, os.preadv(handle, [buffer], place[1])
            finally:
                os.close(handle)

        for buffer, read in prefetch(self.opened, load, depth=2 * self.threads, threads=self.threads):
            yield -1, buffer[:read]
            self._free.append(buffer)


class Kdpipe(IntoBuffers):
    """Our store; a reader that was just opened verifies each chunk when it first touches it."""

    def open(self) -> None:
        from kdpipe.data.store.reader import PartReader

        self.opened = [PartReader(path) for path in part_folders(self.plan.folder / "store")]
        self._places = self.plan.places()

    def read(self, sample: int, out: np.ndarray) -> None:
        part, row = self._places[sample]
        self.opened[part].read_into(row, NAME, out)


@dataclass(frozen=True)
class Case:
    """A contender as it is started and shown.

    Attributes:
        key: its name.
        title: what the table says.
        reader: its class.
        reads: which file or folder of the plan's folder it reads.
        threads: see `Reader`.
        fresh: opened anew before each pass.
        peers: it runs in the environment of `--peers`.
        alone: it needs this order, if any.
    """

    key: str
    title: str
    reader: type[Reader]
    reads: str
    threads: int = 0
    fresh: bool = False
    peers: bool = False
    alone: str | None = None


def _ours(key: str, title: str, threads: int, fresh: bool) -> Case:
    return Case(f"kdpipe-{key}-{threads}", f"kdpipe, {title}", Kdpipe, "store", threads, fresh)


READERS = (
    Case("memmap-0", "memmap into a reused buffer", Memmap, "raw.npy"),
    Case("memmap-anew-0", "memmap, mapped anew", Memmap, "raw.npy", fresh=True),
    Case("memmap-2", "memmap, 2 threads ahead", Memmap, "raw.npy", 2),
    _ours("crc", "CRC on", 0, True),
    _ours("crc", "CRC on, 1 thread ahead", 1, True),
    _ours("crc", "CRC on, 2 threads ahead", 2, True),
    _ours("verified", "CRC verified before", 0, False),
    _ours("verified", "CRC verified before, 2 threads ahead", 2, False),
)

COLD = (
    Case("files-0", "preadv of whole files", PreadvFiles, "store", alone=SEQUENTIAL),
    Case("files-2", "preadv of whole files, 2 threads", PreadvFiles, "store", 2, alone=SEQUENTIAL),
    Case("preadv-0", "preadv of each sample", Preadv, "raw.npy"),
    Case("preadv-2", "preadv of each sample, 2 threads", Preadv, "raw.npy", 2),
    Case("memmap-0", "memmap into a reused buffer", Memmap, "raw.npy"),
    _ours("crc", "CRC on", 0, True),
    _ours("crc", "CRC on, 2 threads ahead", 2, True),
)


def units(plan: Plan, rows: np.ndarray) -> Iterator[tuple[int, Iterable[tuple[int, np.ndarray]]]]:
    """Each part's number and samples (number, rows)."""
    starts, firsts = plan.starts(), plan.part_starts()
    for part in range(len(plan.parts)):
        numbers = range(firsts[part], firsts[part + 1])
        yield part, ((number, rows[starts[number] : starts[number + 1]]) for number in numbers)


def write_kdpipe(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """Our store."""
    from kdpipe.data.files import fsync_tree
    from kdpipe.data.store.format import hidden_attributes, hidden_specs
    from kdpipe.data.store.writer import PartWriter

    about: Mapping[str, Any] = hidden_attributes(codec="bfloat16", layers=[LAYER], width=plan.width)
    specs = hidden_specs(LAYER, plan.width, "bfloat16")
    for part, samples in units(plan, rows):
        path = folder / f"{part:04d}.zarr"
        writer = PartWriter(path, source="acoustic", arrays=specs, attributes=about, shard_bytes=plan.shard_bytes)
        for number, states in samples:
            writer.append(f"s{number}", f"key-{number}", {NAME: states})
        writer.close()
        fsync_tree(path)


def write_plain(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """One file, one `write` a sample."""
    _write_files(plan, rows, folder, plan.bytes)


def write_shards(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """The same, a file each time a shard is full."""
    _write_files(plan, rows, folder, plan.shard_bytes)


def _write_files(plan: Plan, rows: np.ndarray, folder: Path, most: int) -> None:
    starts, written, handle, number = plan.starts(), 0, -1, 0
    for start, stop in pairwise(starts):
        if handle < 0:
            handle, written = os.open(folder / str(number), os.O_WRONLY | os.O_CREAT), 0
            number += 1
        data = memoryview(rows[start:stop]).cast("B")
        while data:
            done = os.write(handle, data)
            written, data = written + done, data[done:]
        if written >= most or stop == starts[-1]:
            os.fsync(handle)
            os.close(handle)
            handle = -1
    flush(folder)


def flush(folder: Path) -> None:
    """Flushes files and folders of a folder to the disk, as `kdpipe.data.files.fsync_tree` does."""
    for path in (*folder.rglob("*"), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
