"""Parts whose arrays another program wrote again, in other codecs or another order: read all the same, by zarr."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from kdpipe.data.errors import StoreError
from kdpipe.data.store.arrays import StoredArray
from kdpipe.data.store.metadata import metadata_digest
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.shard import crc_of
from kdpipe.data.store.shard_reader import OpenShards

from .conftest import World, bucketed, numbers, write_array

WAYS: dict[str, dict[str, Any]] = {
    "compressed": {"compressors": ZstdCodec(checksum=True)},
    "plain": {"compressors": None},
    "compressed in shards": {"compressors": ZstdCodec(checksum=True), "sharded": True},
    "index first": {
        "compressors": Crc32cCodec(),
        "sharded": True,
        "index_location": "start",
    },
    "big endian": {"compressors": Crc32cCodec(), "serializer": BytesCodec(endian="big")},
    "other names": {
        "compressors": Crc32cCodec(),
        "sharded": True,
        "chunk_key_encoding": {"name": "default", "separator": "."},
    },
}


def write_again(folder: Path, values: np.ndarray, way: str) -> None:
    """Replaces an array by what zarr writes with other codecs, in chunks of 4 rows and shards of 8."""
    options = dict(WAYS[way])
    if options.pop("sharded", False):
        shape = (8, *values.shape[1:])
        options["shards"] = shape
        if location := options.pop("index_location", None):
            options["shards"] = {"shape": shape, "index_location": location}
    if folder.exists():
        shutil.rmtree(folder)
    chunks = (4, *values.shape[1:])
    zarr.create_array(folder, shape=values.shape, dtype=values.dtype, chunks=chunks, filters=None, **options)[...] = (
        values
    )


def accept(part: Path) -> None:
    """Writes the digest of the metadata anew, as a program would that means what it did."""
    file = part / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["kdpipe"]["metadata"] = metadata_digest(part)
    file.write_text(json.dumps(root))


@pytest.mark.parametrize("way", WAYS)
def test_every_row_comes_back_in_any_codec(tmp_path: Path, way: str):
    values = numbers(37, (3,))
    write_again(tmp_path / "x", values, way)
    array = StoredArray(tmp_path, "x", OpenShards(4))
    for start, stop in [(0, 37), (0, 0), (3, 5), (4, 8), (7, 30), (36, 37)]:
        view, out = array.view(start, stop), np.empty((stop - start, 3), np.uint32)
        array.read_into(out, start, stop)
        for found in (view, out, array.read(start, stop)):
            np.testing.assert_array_equal(found, values[start:stop])
        assert not view.flags.writeable and array.read(start, stop).flags.writeable
    assert not array.is_direct


@pytest.mark.parametrize("way", WAYS)
def test_a_part_in_any_codec_is_the_same_part(world: World, way: str):
    for name in PartReader(world.path).attributes["arrays"]:
        values = np.concatenate([arrays[name] for arrays in world.arrays.values()])
        write_again(world.path / name, values, way)
    with pytest.raises(StoreError, match="digest of the metadata does not match"):
        PartReader(world.path)
    accept(world.path)
    part = PartReader(world.path)
    for row, (sample, arrays) in enumerate(world.arrays.items()):
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, arrays[name])
        found = part.distribution(row, "top", k=3)
        np.testing.assert_array_equal(found.ids, bucketed(world.logits[sample], 3)["ids"])


@pytest.mark.parametrize("way", ["compressed", "compressed in shards"])
def test_damage_is_found_and_named_in_other_codecs_too(world: World, way: str):
    values = np.concatenate([arrays["top/logprob"] for arrays in world.arrays.values()])
    write_again(world.path / "top" / "logprob", values, way)
    accept(world.path)
    file = world.path / "top" / "logprob" / "c" / "0" / "0"
    whole = file.read_bytes()
    for position in range(0, len(whole), 7):
        torn = bytearray(whole)
        torn[position] ^= 1 << position % 8
        file.write_bytes(torn)
        part = PartReader(world.path)
        part.read(4)
        with pytest.raises(StoreError, match=r"part a\.zarr, array top/logprob, rows 0 to 5, read for sample 's0'"):
            part.read(0)


def reordered(file: Path, chunk_bytes: int, order: list[int]) -> None:
    """Lays the chunks of a shard in another order, with an index that says so."""
    raw = file.read_bytes()
    stride, count = chunk_bytes + 4, len(order)
    index = np.frombuffer(raw[count * stride : -4], "<u8").reshape(count, 2).copy()
    chunks = [raw[place * stride : (place + 1) * stride] for place in order]
    index[order, 0] = np.arange(count) * stride
    raw_index = np.frombuffer(index.tobytes(), np.uint8)
    file.write_bytes(b"".join(chunks) + raw_index.tobytes() + crc_of(raw_index))


@pytest.fixture
def disordered(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """An array of three shards of four chunks of 8 rows, the second of which lies in another order."""
    values = numbers(96, (3,))
    write_array(tmp_path / "x", values, chunk_rows=8, per_shard=4)
    reordered(tmp_path / "x" / "c" / "1" / "0", 8 * 12, [2, 0, 3, 1])
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "x", mode="r")[:], values)
    return tmp_path, values


def test_chunks_in_another_order_are_read_where_they_lie(disordered: tuple[Path, np.ndarray]):
    part, values = disordered
    for start, stop in [(0, 96), (32, 40), (33, 35), (30, 70), (63, 64)]:
        array = StoredArray(part, "x", OpenShards(4))
        for _ in range(2):
            np.testing.assert_array_equal(array.view(start, stop), values[start:stop])
            np.testing.assert_array_equal(array.read(start, stop), values[start:stop])
        assert not array.is_direct


def test_the_other_shards_are_read_and_proven_as_ever(disordered: tuple[Path, np.ndarray]):
    part, values = disordered
    array = StoredArray(part, "x", OpenShards(4))
    np.testing.assert_array_equal(array.read(40, 50), values[40:50])
    (part / "x" / "c" / "0" / "0").unlink()
    file = part / "x" / "c" / "2" / "0"
    file.write_bytes(file.read_bytes()[1:])
    for start, stop in [(0, 3), (0, 40), (64, 70), (40, 70)]:
        with pytest.raises(StoreError, match=r"c/[02]/0: (missing|of \d+ bytes, not the \d+)"):
            array.read(start, stop)


def test_damage_is_found_in_another_order_too(disordered: tuple[Path, np.ndarray]):
    part, values = disordered
    file = part / "x" / "c" / "1" / "0"
    whole = file.read_bytes()
    for position in range(0, len(whole), 3):
        torn = bytearray(whole)
        torn[position] ^= 1 << position % 8
        file.write_bytes(torn)
        array = StoredArray(part, "x", OpenShards(4))
        np.testing.assert_array_equal(array.read(0, 32), values[:32])
        with pytest.raises(StoreError, match="array x"):
            array.read(32, 64)


def test_a_shard_that_zarr_filled_chunk_by_chunk_is_read(tmp_path: Path):
    """Last chunk first, and one of zeros that is never written."""
    values = numbers(32, (3,))
    values[8:16] = 0
    array = zarr.create_array(
        tmp_path / "x",
        shape=values.shape,
        dtype=values.dtype,
        chunks=(8, 3),
        shards=(32, 3),
        compressors=Crc32cCodec(),
        filters=None,
    )
    for start in (24, 0, 16):
        array[start : start + 8] = values[start : start + 8]
    found = StoredArray(tmp_path, "x", OpenShards(4))
    np.testing.assert_array_equal(found.read(0, 32), values)
    np.testing.assert_array_equal(found.view(9, 12), values[9:12])
