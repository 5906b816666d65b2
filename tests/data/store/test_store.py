"""Samples of a teacher store by id: parts found through the ledger, kept open, shared by threads."""

from __future__ import annotations

import gc
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.format import ArraySpec
from kdpipe.data.store.metadata import part_rows
from kdpipe.data.store.reader import Store
from kdpipe.data.store.writer import PartWriter

from .conftest import World, flip, make_world, open_descriptors


def committed(tmp_path: Path, parts: int = 3, mass: float | None = None) -> tuple[Ledger, list[World]]:
    ledger = Ledger(tmp_path / "cache-teachers", tmp_path / "tmp")
    worlds = []
    for number in range(parts):
        built = make_world(tmp_path / "tmp" / f"b{number}", seed=number, name=f"p{number}s", mass=mass)
        ledger.commit(part_rows(built.path, f"p{number}.zarr"), built={f"p{number}.zarr": built.path})
        built.path = ledger.parts / f"p{number}.zarr"
        worlds.append(built)
    return ledger, worlds


def test_a_store_finds_samples_by_id(tmp_path: Path):
    ledger, worlds = committed(tmp_path)
    store = Store(ledger.parts, ledger)
    for world in worlds:
        for sample, arrays in world.arrays.items():
            part, row = store.get(sample, "textual")
            assert part.path == world.path
            np.testing.assert_array_equal(part.read(row, ["top/ids"])["top/ids"], arrays["top/ids"])
    with pytest.raises(StoreError, match=r"holds no acoustic of sample 'p0s0'. Run `kdpipe cache-teachers`"):
        store.get("p0s0", "acoustic")


def test_a_store_that_moved_is_the_same_store(tmp_path: Path):
    ledger, worlds = committed(tmp_path / "here")
    shutil.move(tmp_path / "here", tmp_path / "there")
    there = Ledger(tmp_path / "there" / "cache-teachers", tmp_path / "there" / "tmp")
    assert there.digest == ledger.digest
    part, row = Store(there.parts, there).get("p1s2", "textual")
    np.testing.assert_array_equal(part.read(row)["top/ids"], worlds[1].arrays["p1s2"]["top/ids"])


def test_a_ledger_that_does_not_fit_its_parts_is_found(tmp_path: Path):
    ledger, _ = committed(tmp_path)
    good = ledger.get("p0s1", "textual")
    assert good is not None
    for key, place in (("other", 1), (good.key, 0), (good.key, 99)):
        ledger.commit([Row(good.id, "textual", key, {}, good.part, place)])
        with pytest.raises(StoreError, match=r"row \d+ is not textual of sample 'p0s1'.*Remove the part folder"):
            Store(ledger.parts, ledger).get("p0s1", "textual")
    shutil.rmtree(ledger.parts / "p1.zarr")
    with pytest.raises(StoreError, match=r"p1\.zarr/zarr\.json: missing"):
        Store(ledger.parts, ledger).get("p1s1", "textual")


def test_a_clip_serves_the_samples_that_share_it_also_later_ones(tmp_path: Path):
    ledger = Ledger(tmp_path / "cache-teachers", tmp_path / "tmp")
    writer = PartWriter(
        tmp_path / "tmp" / "b", source="acoustic", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={}
    )
    writer.append("clip", "key", {"target_ids": np.arange(3, dtype=np.uint32)}, {"samples": [{"id": "a"}, {"id": "b"}]})
    writer.close()
    rows = part_rows(tmp_path / "tmp" / "b", "p.zarr")
    late = Row("c", "acoustic", "key", {}, "p.zarr", 0, 3)
    ledger.commit([*rows, late], built={"p.zarr": tmp_path / "tmp" / "b"})
    store = Store(ledger.parts, ledger)
    assert [store.get(sample, "acoustic")[1] for sample in "abc"] == [0, 0, 0]


def test_a_part_stays_open_while_it_is_among_those_used_last(tmp_path: Path):
    ledger, _ = committed(tmp_path)
    store = Store(ledger.parts, ledger, open_parts=2)

    def part(number: int) -> object:
        return store.get(f"p{number}s0", "textual")[0]

    first = part(0)
    assert part(1) is part(1) and part(0) is first
    part(2)
    assert part(0) is first, "used after the second, it stayed"
    part(1), part(2)
    assert part(0) is not first


@pytest.mark.parametrize("verify", [True, False])
def test_checksums_are_verified_unless_that_is_declined(tmp_path: Path, verify: bool):
    ledger, worlds = committed(tmp_path, parts=1)
    flip(worlds[0].path / "target_ids" / "c" / "0", 1)
    part, row = Store(ledger.parts, ledger, verify=verify).get("p0s0", "textual")
    if verify:
        with pytest.raises(StoreError, match=r"p0\.zarr, array target_ids, chunk 0, read for sample 'p0s0'"):
            part.read(row)
    else:
        assert part.read(row)["target_ids"][0] == worlds[0].arrays["p0s0"]["target_ids"][0] ^ 256


def test_all_parts_share_the_files_that_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Four parts of twelve arrays and more each, and no more than ten files at a time."""
    monkeypatch.setattr("kdpipe.data.store.reader.OPEN_FILES", 10)
    ledger, worlds = committed(tmp_path, parts=4)
    gc.collect()
    before = open_descriptors()
    store = Store(ledger.parts, ledger)
    for _ in range(2):
        for world in worlds:
            for sample, arrays in world.arrays.items():
                part, row = store.get(sample, "textual")
                found = part.read(row)
                assert all(np.array_equal(found[name], array) for name, array in arrays.items())
                assert open_descriptors() <= before + 2 * 10
    del part, store
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.parametrize(("open_parts", "open_files"), [(64, 256), (2, 3), (1, 1)])
@pytest.mark.parametrize("mass", [None, 0.9])
def test_many_threads_read_what_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, open_parts: int, open_files: int, mass: float | None
):
    monkeypatch.setattr("kdpipe.data.store.reader.OPEN_FILES", open_files)
    ledger, worlds = committed(tmp_path, parts=4, mass=mass)
    gc.collect()
    before = open_descriptors()
    store = Store(ledger.parts, ledger, open_parts=open_parts)
    arrays = {sample: arrays for world in worlds for sample, arrays in world.arrays.items()}
    order = np.random.default_rng(0).choice(sorted(arrays), 60).tolist()

    def check(sample: str, store: Store = store) -> None:
        part, row = store.get(sample, "textual")
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, arrays[sample][name])
        assert part.distribution(row, "top", k=3).log_z.shape == (part.tokens(row), 3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, order))
    assert len(store._open._values) <= open_parts
    del store, check
    gc.collect()
    assert open_descriptors() <= before + 1
