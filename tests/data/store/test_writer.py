"""Parts on disk: valid Zarr v3 for anyone, the promised bytes, bounded memory."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.data.store.format import ArraySpec
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.writer import PartWriter

from .conftest import World, make_world

UINT = ArraySpec("target_ids", (), "uint32")


def joined(world: World, name: str) -> np.ndarray:
    return np.concatenate([arrays[name] for arrays in world.arrays.values()])


def names(world: World) -> list[str]:
    return list(next(iter(world.arrays.values())))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_zarr_opens_a_part_knowing_nothing_of_kdpipe(world: World):
    group = zarr.open_group(world.path, mode="r")
    about: Any = group.attrs["kdpipe"]
    assert (about["format"], about["source"]) == (1, "textual")
    assert [unit["id"] for unit in about["units"]] == list(world.arrays)
    offsets = np.asarray(group["offsets"][:])
    for name in names(world):
        array = group[name]
        np.testing.assert_array_equal(array[:], joined(world, name))
        for row, arrays in enumerate(world.arrays.values()):
            np.testing.assert_array_equal(array[offsets[row] : offsets[row + 1]], arrays[name])
    found = {path.parent.relative_to(world.path).as_posix() for path in world.path.rglob("zarr.json")}
    assert {"top", "lens", "lens/07", "hidden/03"} <= found, "groups between are explicit, as Zarr v3 wants them"


def test_tensorstore_opens_a_part(world: World):
    tensorstore = pytest.importorskip("tensorstore")
    for name in ["offsets", *names(world)]:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(world.path / name)}}
        found = tensorstore.open(spec, open=True).result().read().result()
        expected = np.cumsum([0, 5, 0, 17, 1, 9]) if name == "offsets" else joined(world, name)
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype


def test_the_codec_is_bytes_and_crc32c_in_shards(world: World):
    metadata = json.loads((world.path / "top" / "ids" / "zarr.json").read_text())
    (shard,) = metadata["codecs"]
    assert shard["name"] == "sharding_indexed"
    inner = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    configuration = shard["configuration"]
    assert configuration["codecs"] == configuration["index_codecs"] == inner
    assert configuration["index_location"] == "end"
    assert configuration["chunk_shape"][1:] == [12], "chunks are cut along tokens alone"


def test_a_shard_is_raw_rows_with_checksums_and_then_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What a reader of its own may rely on: C-order rows, 4 bytes of CRC32C after each chunk, the index last."""
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4 * 12 * 8)  # 8 rows of `ids`
    world = make_world(tmp_path / "a.zarr", [30, 15], shard_bytes=4 * 12 * 16)
    ids = joined(world, "top/ids")
    files = sorted((world.path / "top" / "ids" / "c").glob("*/0"), key=lambda path: int(path.parent.name))
    assert [path.parent.name for path in files] == ["0", "1", "2"]
    rows = 0
    for file in files:
        raw = file.read_bytes()
        index = np.frombuffer(raw[-36:-4], "<u8").reshape(2, 2)
        assert int.from_bytes(raw[-4:], "little") == google_crc32c.value(raw[-36:-4])
        for number, (offset, size) in enumerate(index):
            assert (offset, size) == (number * (8 * 48 + 4), 8 * 48 + 4)
            chunk = raw[offset : offset + size]
            assert int.from_bytes(chunk[-4:], "little") == google_crc32c.value(chunk[:-4])
            stored = np.frombuffer(chunk[:-4], "<u4").reshape(8, 12)
            real = ids[rows : rows + 8]
            np.testing.assert_array_equal(stored[: len(real)], real)
            assert not stored[len(real) :].any()
            rows += 8
    assert rows >= len(ids)


def test_chunks_that_are_never_reached_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 16)
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={}, shard_bytes=16 * 8)
    writer.append("s", "k", {"target_ids": np.arange(33, dtype=np.uint32)})
    writer.close()
    first, last = (tmp_path / "a" / "target_ids" / "c" / name for name in "01")
    index = 8 * 16 + 4
    assert first.stat().st_size == 8 * 20 + index and last.stat().st_size == 1 * 20 + index
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a" / "target_ids", mode="r")[:], np.arange(33))


def test_zeros_are_written_like_anything_else(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})
    writer.append("s", "k", {"target_ids": np.zeros(100, np.uint32)})
    writer.close()
    assert (tmp_path / "a" / "target_ids" / "c" / "0").stat().st_size == 400 + 4 + 16 + 4


def test_bfloat16_is_stored_as_its_bits_and_says_so(tmp_path: Path):
    writer = PartWriter(
        tmp_path / "a", source="acoustic", arrays=[ArraySpec("hidden/01/states", (4,), "bfloat16")], attributes={}
    )
    bits = np.arange(8, dtype=np.uint16).reshape(2, 4)
    writer.append("clip", "k", {"hidden/01/states": bits})
    writer.close()
    array = zarr.open_array(tmp_path / "a", path="hidden/01/states", mode="r")
    assert array.dtype == np.uint16 and array.attrs["kdpipe_dtype"] == "bfloat16"
    np.testing.assert_array_equal(array[:], bits)


def test_same_input_same_bytes(tmp_path: Path):
    first = make_world(tmp_path / "a.zarr", shard_bytes=512)
    second = make_world(tmp_path / "elsewhere" / "b.zarr", shard_bytes=512)
    assert contents(first.path) == contents(second.path)
    assert contents(make_world(tmp_path / "c.zarr", seed=1, shard_bytes=512).path) != contents(first.path)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), max_size=6),
    shard_rows=st.integers(1, 30),
    chunk_bytes=st.sampled_from([4, 12, 64]),
)
def test_any_lengths_and_shards_come_back(tmp_path: Path, lengths, shard_rows, chunk_bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", chunk_bytes)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        writer = PartWriter(path, source="targets", arrays=[UINT], attributes={}, shard_bytes=4 * shard_rows)
        units = [np.arange(100 * i, 100 * i + tokens, dtype=np.uint32) for i, tokens in enumerate(lengths)]
        assert [writer.append(f"s{i}", "k", {"target_ids": unit}) for i, unit in enumerate(units)] == [
            *range(len(units))
        ]
        writer.close()
        part = PartReader(path)
        for row, unit in enumerate(units):
            np.testing.assert_array_equal(part.read(row)["target_ids"], unit)
        whole = zarr.open_group(path, mode="r")["target_ids"]
        np.testing.assert_array_equal(whole[:], np.concatenate([np.zeros(0, np.uint32), *units]))


def test_a_caller_may_reuse_its_buffer(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})
    buffer = np.zeros(3, np.uint32)
    for number in range(3):
        buffer[:] = number
        writer.append(f"s{number}", "k", {"target_ids": buffer})
    writer.close()
    part = PartReader(tmp_path / "a")
    assert [part.read(row)["target_ids"].tolist() for row in range(3)] == [[n] * 3 for n in range(3)]


def test_memory_is_bounded_by_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 1 << 14)
    spec = ArraySpec("top/ids", (64,), "uint32")
    make_world(tmp_path / "warm.zarr")
    writer = PartWriter(tmp_path / "a", source="textual", arrays=[spec], attributes={}, shard_bytes=1 << 18)
    unit = np.ones((256, 64), np.uint32)  # 64 KiB
    tracemalloc.start()
    for number in range(160):
        writer.append(f"s{number}", "k", {"top/ids": unit})
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 18, f"{peak} bytes for 10 MiB in shards of 256 KiB"
    assert len(list((tmp_path / "a" / "top" / "ids" / "c").iterdir())) == 40


def test_attributes_of_the_start_and_of_the_end_stand_in_the_group(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={"teacher": "t", "fidelity": None})
    writer.append("s", "k", {"target_ids": np.zeros(2, np.uint32)}, {"length": 9, "cover": {"k": 4}})
    writer.close({"fidelity": {"03": {"cosine_mean": 0.5}}})
    about: Any = zarr.open_group(tmp_path / "a", mode="r").attrs["kdpipe"]
    assert about.pop("metadata")
    assert about == {
        "format": 1,
        "source": "targets",
        "units": [{"id": "s", "key": "k", "tokens": 2, "length": 9, "cover": {"k": 4}}],
        "arrays": {"target_ids": {"dtype": "uint32", "width": []}},
        "teacher": "t",
        "fidelity": {"03": {"cosine_mean": 0.5}},
    }


def test_wrong_units_are_refused_and_leave_the_part_as_it_was(tmp_path: Path):
    writer = PartWriter(
        tmp_path / "a", source="textual", arrays=[UINT, ArraySpec("top/ids", (2,), "uint32")], attributes={}
    )
    good = {"target_ids": np.zeros(3, np.uint32), "top/ids": np.zeros((3, 2), np.uint32)}
    writer.append("s", "k", good)
    wrong: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("s", good, {}, "already"),
        ("t", {"target_ids": good["target_ids"]}, {}, r"\['top/ids'\] are missing or were not declared"),
        ("t", {**good, "extra": good["top/ids"]}, {}, r"\['extra'\]"),
        ("t", {**good, "target_ids": np.zeros(2, np.uint32)}, {}, "differ in length"),
        ("t", {**good, "top/ids": np.zeros((3, 3), np.uint32)}, {}, r"top/ids is uint32 \(3, 3\), declared"),
        ("t", {**good, "top/ids": np.zeros((3, 2), np.int64)}, {}, "top/ids is int64"),
        ("t", good, {"tokens": 3}, "info may not hold"),
        ("t", good, {"score": float("nan")}, "not JSON compliant"),
    ]
    for unit, arrays, info, message in wrong:
        with pytest.raises(ValueError, match=message):
            writer.append(unit, "k", arrays, info)
    assert writer.append("t", "k", good) == 1
    writer.close()
    assert [unit["id"] for unit in PartReader(tmp_path / "a").units] == ["s", "t"]


def test_wrong_parts_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="repeat"):
        PartWriter(tmp_path / "a", source="targets", arrays=[UINT, UINT], attributes={})
    with pytest.raises(ValueError, match="offsets"):
        PartWriter(tmp_path / "a", source="targets", arrays=[ArraySpec("offsets", (), "int64")], attributes={})
    with pytest.raises(ValueError, match=r"\['units'\] are the format's own"):
        PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={"units": 1})
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError):
        PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={}, shard_bytes=1)

    async def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zarr.storage.LocalStore, "set", full)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(OSError, match="No space left"):
        writer.append("s", "k", {"target_ids": np.zeros(1 << 17, np.uint32)})
