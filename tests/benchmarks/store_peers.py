"""What bench_store.py measures: stores of other projects, with the same samples.

zarr-python and tensorstore read and write our format. What needs an environment of its own (`--peers`) runs where
kdpipe is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from store_cases import NAME, SEQUENTIAL, SHUFFLED, Case, IntoBuffers, Plan, Reader, flush, part_folders, units

SHUFFLE_BUFFER = 100  # samples among which WebDataset draws


class ZarrPython(Reader):
    """zarr-python on our store."""

    def open(self) -> None:
        import zarr

        self.opened = [zarr.open_array(path / NAME, mode="r") for path in part_folders(self.plan.folder / "store")]

    def rows(self) -> list[tuple[Any, int, int]]:
        """Of each sample the array of its part, and its rows there."""
        found, starts = [], self.plan.starts()
        firsts = [starts[first] for first in self.plan.part_starts()]
        for sample, (part, _) in enumerate(self.plan.places()):
            found.append((self.opened[part], starts[sample] - firsts[part], starts[sample + 1] - firsts[part]))
        return found

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        rows = self.rows()
        for sample in order:
            array, start, stop = rows[sample]
            yield sample, array[start:stop]


class Tensorstore(ZarrPython):
    """tensorstore on our store; `threads` is how many reads are under way beside the one waited for."""

    def open(self) -> None:
        import tensorstore

        paths = part_folders(self.plan.folder / "store")
        specs = [{"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path / NAME}/"}} for path in paths]
        self.opened = [tensorstore.open(spec, read=True, open=True).result() for spec in specs]

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        rows, waiting = self.rows(), deque()
        for sample in order:
            array, start, stop = rows[sample]
            waiting.append((sample, array[start:stop].read()))
            if len(waiting) > self.threads:
                number, future = waiting.popleft()
                yield number, future.result()
        for number, future in waiting:
            yield number, future.result()


class SafetensorsNumpy(Reader):
    """A tensor a sample, a file a part, as numpy arrays."""

    framework = "numpy"

    def open(self) -> None:
        from safetensors import safe_open

        files = sorted((self.plan.folder / "safetensors").iterdir())
        self.opened = [safe_open(file, self.framework) for file in files]
        self._where = [(self.opened[part], str(number)) for number, (part, _) in enumerate(self.plan.places())]

    def close(self) -> None:
        self._where = []
        super().close()

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for sample in order:
            file, name = self._where[sample]
            yield sample, file.get_tensor(name)


class SafetensorsTorch(IntoBuffers):
    """The same as torch tensors, which are a map of the file, copied into a reused buffer."""

    def __init__(self, plan: Plan, threads: int):
        super().__init__(plan, threads)
        self._files = SafetensorsNumpy(plan, threads)
        self._files.framework = "pt"

    def open(self) -> None:
        self._files.open()

    def close(self) -> None:
        self._files.close()

    def read(self, sample: int, out: np.ndarray) -> None:
        ((_, tensor),) = self._files.samples([sample])
        np.copyto(out, tensor.numpy())


class WebDataset(Reader):
    """Tar files, one member a sample; shuffled, its shards and then a buffer of samples are."""

    own_order = True

    def open(self) -> None:
        self.opened = [str(path) for path in sorted((self.plan.folder / "tar").iterdir())]

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        import webdataset

        shuffled = list(order) != sorted(order)
        found = webdataset.WebDataset(self.opened, shardshuffle=len(self.opened) if shuffled else False)  # type: ignore
        for sample in found.shuffle(SHUFFLE_BUFFER) if shuffled else found:
            yield int(sample["__key__"]), sample["bin"]


class Mosaic(Reader):
    """MosaicML Streaming, local, by index."""

    def open(self) -> None:
        from streaming import StreamingDataset  # type: ignore
        from streaming.base.util import clean_stale_shared_memory  # type: ignore

        clean_stale_shared_memory()
        self.opened = StreamingDataset(local=str(self.plan.folder / "mds"), shuffle=False, batch_size=1)

    def samples(self, order: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for sample in order:
            yield sample, self.opened[sample]["rows"]


READERS = (
    Case("zarr", "zarr-python, the same store", ZarrPython, "store"),
    Case("tensorstore-0", "tensorstore, the same store", Tensorstore, "store"),
    Case("tensorstore-3", "tensorstore, 4 reads under way", Tensorstore, "store", 3),
    Case("safetensors-numpy", "safetensors, numpy (no CRC)", SafetensorsNumpy, "safetensors"),
    Case("safetensors-torch", "safetensors, torch, copied (no CRC)", SafetensorsTorch, "safetensors"),
    Case("webdataset", "WebDataset (no CRC)", WebDataset, "tar", peers=True, alone=SEQUENTIAL),
    Case("webdataset-shuffle", "WebDataset, own shuffle (no CRC)", WebDataset, "tar", peers=True, alone=SHUFFLED),
    Case("mosaicml", "MosaicML Streaming (no CRC)", Mosaic, "mds", peers=True),
)


def write_zarr(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """zarr-python: chunks and shards as ours, one shard at a time, which is how it is fastest."""
    import zarr

    chunk = max(1, (1 << 20) // plan.row_bytes)
    shard = max(1, plan.shard_bytes // (chunk * plan.row_bytes)) * chunk
    for part, block in _parts(plan, rows):
        array = zarr.create_array(
            folder / f"{part:04d}.zarr",
            shape=block.shape,
            dtype=block.dtype,
            chunks=(chunk, plan.width),
            shards=(shard, plan.width),
            compressors=[zarr.codecs.Crc32cCodec()],  # type: ignore
            config={"write_empty_chunks": True},
        )
        for start in range(0, len(block), shard):
            array[start : start + shard] = block[start : start + shard]
    flush(folder)


def write_tensorstore(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """tensorstore: the same, all shards of a part under way at once."""
    import tensorstore

    chunk = max(1, (1 << 20) // plan.row_bytes)
    shard = max(1, plan.shard_bytes // (chunk * plan.row_bytes)) * chunk
    codecs = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {"chunk_shape": [chunk, plan.width], "codecs": codecs}
    for part, block in _parts(plan, rows):
        metadata = {
            "shape": list(block.shape),
            "data_type": "uint16",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard, plan.width]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        }
        store = {"driver": "file", "path": f"{folder}/{part:04d}.zarr/"}
        spec = {"driver": "zarr3", "kvstore": store, "metadata": metadata, "store_data_equal_to_fill_value": True}
        tensorstore.open(spec, create=True).result().write(block).result()
    flush(folder)


def write_safetensors(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """safetensors: a file a part, a tensor a sample."""
    from safetensors.numpy import save_file

    for part, samples in units(plan, rows):
        save_file({str(number): states for number, states in samples}, folder / f"{part:04d}.safetensors")
    flush(folder)


def write_tar(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """WebDataset: tar files of about a shard."""
    import webdataset

    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=plan.shard_bytes, verbose=0, encoder=False) as writer:  # type: ignore
        for _, samples in units(plan, rows):
            for number, states in samples:
                writer.write({"__key__": f"{number:08d}", "bin": states.tobytes()})
    flush(folder)


def write_mds(plan: Plan, rows: np.ndarray, folder: Path) -> None:
    """MosaicML Streaming: shards of the same size, bytes as they are."""
    from streaming import MDSWriter  # type: ignore

    with MDSWriter(out=str(folder), columns={"rows": "bytes"}, size_limit=plan.shard_bytes) as writer:
        for _, samples in units(plan, rows):
            for _, states in samples:
                writer.write({"rows": states.tobytes()})
    flush(folder)


def _parts(plan: Plan, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    starts = plan.starts()
    bounds = [starts[first] for first in plan.part_starts()]
    for part in range(len(plan.parts)):
        yield part, rows[bounds[part] : bounds[part + 1]]
