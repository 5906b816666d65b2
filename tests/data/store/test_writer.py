"""Parts on disk: valid Zarr v3 for anyone, the promised bytes, bounded memory."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.data.store.codec import decode_states, encode_states, fit_basis
from kdpipe.data.store.format import PART, ArraySpec, hidden_specs, under
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.writer import PartWriter

from .conftest import World, make_world, numbers

UINT = ArraySpec("target_ids", (), "uint32")


@pytest.fixture(params=[(None, "float32"), (0.9, "uint8"), (0.9, "float16")], ids=["fixed", "bytes", "mass"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    mass, logprob = request.param
    return make_world(tmp_path / "parts" / "a.zarr", mass=mass, logprob=logprob)


def joined(world: World, name: str) -> np.ndarray:
    return np.concatenate([arrays[name] for arrays in world.arrays.values()])


def names(world: World) -> list[str]:
    return list(next(iter(world.arrays.values())))


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def test_zarr_opens_a_part_knowing_nothing_of_kdpipe(world: World):
    group = zarr.open_group(world.path, mode="r")
    about: Any = group.attrs["kdpipe"]
    assert (about["format"], about["source"]) == (2, "textual")
    assert [unit["id"] for unit in about["units"]] == list(world.arrays)
    for name in names(world):
        array = group[name]
        np.testing.assert_array_equal(array[:], joined(world, name))
        starts = np.asarray(group[about["arrays"][name].get("axis", "offsets")][:])
        for row, arrays in enumerate(world.arrays.values()):
            np.testing.assert_array_equal(array[starts[row] : starts[row + 1]], arrays[name])
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


def test_chunks_that_are_never_reached_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 16)
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={}, shard_bytes=16 * 8)
    writer.append("s", "k", {"target_ids": np.arange(33, dtype=np.uint32)})
    writer.close()
    first, last = (tmp_path / "a" / "target_ids" / "c" / name for name in "01")
    index = 8 * 16 + 4
    assert first.stat().st_size == 8 * 20 + index and last.stat().st_size == 1 * 20 + index
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a" / "target_ids", mode="r")[:], np.arange(33))


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


@pytest.mark.parametrize("mass", [None, 0.9])
def test_same_input_same_bytes(tmp_path: Path, mass: float | None):
    first = make_world(tmp_path / "a.zarr", mass=mass, shard_bytes=512)
    second = make_world(tmp_path / "elsewhere" / "b.zarr", mass=mass, shard_bytes=512)
    assert contents(first.path) == contents(second.path)
    assert contents(make_world(tmp_path / "c.zarr", seed=1, mass=mass, shard_bytes=512).path) != contents(first.path)


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


def test_memory_is_bounded_by_a_few_chunks_of_each_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 1 << 14)
    spec = ArraySpec("top/ids", (64,), "uint32")
    make_world(tmp_path / "warm.zarr")
    writer = PartWriter(tmp_path / "a", source="textual", arrays=[spec], attributes={}, shard_bytes=1 << 18)
    unit = np.ones((250, 64), np.uint32)  # 62.5 KiB, so that something always waits
    tracemalloc.start()
    for number in range(160):
        writer.append(f"s{number}", "k", {"top/ids": unit})
    writer.close()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19, f"{peak} bytes for 10 MiB in shards of 256 KiB and chunks of 16 KiB"
    assert len(list((tmp_path / "a" / "top" / "ids" / "c").iterdir())) == 40


def test_attributes_of_the_start_and_of_the_end_stand_in_the_group(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={"teacher": "t", "fidelity": None})
    writer.append("s", "k", {"target_ids": np.zeros(2, np.uint32)}, {"length": 9, "cover": {"k": 4}})
    writer.close({"fidelity": {"03": {"cosine_mean": 0.5}}})
    about: Any = zarr.open_group(tmp_path / "a", mode="r").attrs["kdpipe"]
    assert about.pop("metadata")
    assert about == {
        "format": 2,
        "source": "targets",
        "units": [{"id": "s", "key": "k", "tokens": 2, "length": 9, "cover": {"k": 4}}],
        "arrays": {"target_ids": {"dtype": "uint32", "width": [], "crc32c": "8ab2288c"}},
        "starts": {"offsets": {"crc32c": "a46008d0"}},
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


def chunk_crcs(array: Path) -> Iterator[bytes]:
    """Checksums that stand behind the chunks of an array's files, in order."""
    for file in sorted((array / "c").glob("*/0"), key=lambda path: int(path.parent.name)):
        raw = file.read_bytes()
        size = json.loads((array / "zarr.json").read_text())
        rows = size["chunk_grid"]["configuration"]["chunk_shape"][0]
        inner = size["codecs"][0]["configuration"]["chunk_shape"][0]
        index = np.frombuffer(raw[-4 - 16 * (rows // inner) : -4], "<u8").reshape(-1, 2)
        for offset, length in index[index[:, 0] != 2**64 - 1]:
            yield raw[int(offset + length) - 4 : int(offset + length)]


def test_each_axis_has_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Units with many entries a token, few, and none; the starts of each axis stand under its name."""
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 16)
    entries = ArraySpec("top/logprob", (), "float32", "top/entries")
    more = ArraySpec("top/other", (2,), "uint8", "top/entries")
    writer = PartWriter(tmp_path / "a", source="textual", arrays=[UINT, entries, more], attributes={}, shard_bytes=32)
    lengths = {"s0": (3, 20), "s1": (5, 0), "s2": (0, 0), "s3": (0, 4), "s4": (9, 9)}
    units = {
        sample: {
            "target_ids": numbers(tokens),
            "top/logprob": numbers(rows, (), "float32"),
            "top/other": numbers(rows, (2,), "uint8"),
        }
        for sample, (tokens, rows) in lengths.items()
    }
    for sample, arrays in units.items():
        writer.append(sample, "k", arrays)
    with pytest.raises(ValueError, match=r"differ in length: {'top/logprob': 4, 'top/other': 3}"):
        writer.append("s5", "k", {**units["s3"], "top/other": numbers(3, (2,), "uint8")})
    writer.close()
    part = PartReader(tmp_path / "a")
    assert [unit["tokens"] for unit in part.units] == [3, 5, 0, 0, 9]
    for row, arrays in enumerate(units.values()):
        assert part.tokens(row) == len(arrays["target_ids"])
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, arrays[name])
    group = zarr.open_group(tmp_path / "a", mode="r")
    assert np.asarray(group["offsets"][:]).tolist() == [0, 3, 8, 8, 8, 17]
    assert np.asarray(group["top/entries"][:]).tolist() == [0, 20, 20, 20, 24, 33]
    about: Any = group.attrs["kdpipe"]
    crcs = b"".join(chunk_crcs(tmp_path / "a" / "top" / "other"))
    expected = {"dtype": "uint8", "width": [2], "axis": "top/entries", "crc32c": crcs.hex()}
    assert len(crcs) == 4 * 5 and about["arrays"]["top/other"] == expected


def test_an_array_of_the_part_is_written_once_and_read_with_every_unit(tmp_path: Path):
    states = torch.randn(9, 8, generator=torch.Generator().manual_seed(0))
    basis = fit_basis(states, 3)
    specs = hidden_specs(2, 8, "low_rank", 3)
    writer = PartWriter(
        tmp_path / "a",
        source="acoustic",
        arrays=specs,
        attributes={"states": {"codec": "low_rank", "layers": [2], "width": 8, "rank": 3}},
        constants={"hidden/02/basis": basis},
    )
    for clip, rows in {"a": states[:4], "b": states[4:]}.items():
        writer.append(clip, "k", under("hidden/02", encode_states(rows, "low_rank", basis)))
    writer.close()
    np.testing.assert_array_equal(zarr.open_group(tmp_path / "a", mode="r")["hidden/02/basis"][:], basis)
    part = PartReader(tmp_path / "a")
    for row, rows in enumerate((states[:4], states[4:])):
        np.testing.assert_array_equal(part.read(row)["hidden/02/basis"], basis)
        expected = {**encode_states(rows, "low_rank", basis), "basis": basis}
        assert torch.equal(part.hidden(row, 2), decode_states(expected, "low_rank"))


def test_wrong_arrays_of_the_part_are_refused(tmp_path: Path):
    basis = ArraySpec("basis", (4,), "float16", PART)
    for constants in ({}, {"basis": np.zeros((2, 4), np.float16), "other": np.zeros(3)}):
        with pytest.raises(ValueError, match="are not the arrays of the axis 'part'"):
            PartWriter(tmp_path / "a", source="s", arrays=[UINT, basis], attributes={}, constants=constants)
    with pytest.raises(ValueError, match="are not the arrays of the axis 'part'"):
        PartWriter(tmp_path / "a", source="s", arrays=[UINT], attributes={}, constants={"target_ids": np.zeros(3)})
    for number, wrong in enumerate((np.zeros((2, 5), np.float16), np.zeros((2, 4), np.float32))):
        with pytest.raises(ValueError, match=r"array basis is .* declared float16 \[part, 4\]"):
            PartWriter(tmp_path / str(number), source="s", arrays=[basis], attributes={}, constants={"basis": wrong})


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
