"""Rows of one array from its files: chunks, shards, checksums on first touch, threads, open files."""

from __future__ import annotations

import errno
import gc
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.data.errors import StoreError
from kdpipe.data.store.arrays import StoredArray
from kdpipe.data.store.format import STORED_AS
from kdpipe.data.store.shard import crc_of
from kdpipe.data.store.shard_reader import OpenShards

from .conftest import flip, numbers, open_descriptors, write_array

CHUNK, PER_SHARD, ROWS = 8, 3, 61  # 8 chunks in 3 shards, the last of both not full
UNIT = {"id": "dog"}

Access = Callable[[StoredArray, int, int], np.ndarray]


def read_into(array: StoredArray, start: int, stop: int) -> np.ndarray:
    out = np.empty((stop - start, *array.shape[1:]), array.dtype)
    array.read_into(out, start, stop, UNIT)
    return out


ACCESS: dict[str, Access] = {
    "view": lambda array, start, stop: array.view(start, stop, UNIT),
    "read": lambda array, start, stop: array.read(start, stop, UNIT),
    "read_into": read_into,
}


def stored(tmp_path: Path, values: np.ndarray, *, limit: int = 100, verify: bool = True, **sizes: Any) -> StoredArray:
    if not (tmp_path / "p.zarr" / "x").exists():
        write_array(tmp_path / "p.zarr" / "x", values, **{"chunk_rows": CHUNK, "per_shard": PER_SHARD, **sizes})
    return StoredArray(tmp_path / "p.zarr", "x", OpenShards(limit), verify=verify)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes (bytes) of what checksums are computed of, as they are."""
    sizes: list[int] = []

    def counting(data: np.ndarray) -> bytes:
        sizes.append(len(data))
        return crc_of(data)

    monkeypatch.setattr("kdpipe.data.store.shard_reader.crc_of", counting)
    return sizes


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize("verify", [True, False])
def test_every_span_of_rows_is_what_was_written(tmp_path: Path, access: str, verify: bool):
    """Within a chunk, across chunks, across shards, none; each on a reader that has touched nothing yet."""
    values = numbers(ROWS, (3,))
    stored(tmp_path, values)
    for start in range(0, ROWS + 1, 5):
        for stop in range(start, ROWS + 1, 4):
            found = ACCESS[access](stored(tmp_path, values, verify=verify), start, stop)
            np.testing.assert_array_equal(found, values[start:stop])
            assert found.dtype == values.dtype
    array = stored(tmp_path, values, verify=verify)
    for start in range(ROWS):
        stop = max(start, ROWS - start % 7)
        np.testing.assert_array_equal(ACCESS[access](array, start, stop), values[start:stop])


@pytest.mark.parametrize("dtype", STORED_AS)
@pytest.mark.parametrize("width", [(), (1,), (5,), (2, 3)])
def test_every_dtype_and_row_shape_comes_back(tmp_path: Path, dtype: str, width: tuple[int, ...]):
    values = numbers(ROWS, width, dtype)
    for access in ACCESS.values():
        array = stored(tmp_path, values, dtype=dtype)
        assert array.is_direct and array.shape == values.shape and array.dtype == STORED_AS[dtype]
        for start, stop in [(0, ROWS), (3, 5), (8, 16), (7, 9), (20, 50), (60, 61), (61, 61)]:
            np.testing.assert_array_equal(access(array, start, stop), values[start:stop])


def test_views_are_read_only_and_copies_are_the_callers(tmp_path: Path):
    values = numbers(ROWS, (3,))
    array = stored(tmp_path, values)
    for start, stop in [(1, 5), (8, 16), (5, 30), (4, 4)]:
        view = array.view(start, stop)
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
        copy = array.read(start, stop)
        assert copy.flags.writeable and copy.flags.c_contiguous
        copy[...] = 0
        np.testing.assert_array_equal(array.read(start, stop), values[start:stop])
        np.testing.assert_array_equal(view, values[start:stop])


def test_a_view_within_a_chunk_is_the_file_itself_and_outlives_its_reader(tmp_path: Path):
    values = numbers(ROWS, (3,))
    array = stored(tmp_path, values, limit=1)
    first, second = array.view(1, 5), array.view(2, 6)
    assert np.shares_memory(first, second)
    array.view(30, 31)  # pushes the file of the first two out
    del array
    gc.collect()
    np.testing.assert_array_equal(first, values[1:5])
    np.testing.assert_array_equal(second, values[2:6])


def test_memory_that_does_not_fit_is_refused(tmp_path: Path):
    array = stored(tmp_path, numbers(ROWS, (3,)))
    for out in (np.empty((4, 3), np.uint32), np.empty((5, 3), np.int32), np.empty((5, 6), np.uint32)[:, ::2]):
        with pytest.raises(ValueError, match="does not take rows 2 to 7"):
            array.read_into(out, 2, 7)


@pytest.mark.parametrize("access", ACCESS)
def test_a_chunk_is_verified_when_it_is_first_touched_and_never_again(tmp_path: Path, checked: list[int], access: str):
    array = stored(tmp_path, numbers(ROWS))
    read, chunk, index = ACCESS[access], CHUNK * 4, PER_SHARD * 16
    checked.clear()
    read(array, 1, 3)
    assert checked == [index, chunk], "a part of a chunk is proven by all of it"
    read(array, 0, 8), read(array, 5, 6)
    assert checked == [index, chunk]
    read(array, 6, 20)
    assert checked == [index, chunk, chunk, chunk], "two more: one whole, one in part"
    read(array, 0, ROWS), read(array, 0, ROWS)
    assert checked.count(chunk) == 8 and checked.count(index) == 3 and len(checked) == 11


def test_a_file_that_was_let_go_is_not_verified_again(tmp_path: Path, checked: list[int]):
    array = stored(tmp_path, numbers(ROWS), limit=1)
    checked.clear()
    for _ in range(3):
        array.read(0, ROWS)
    assert checked.count(CHUNK * 4) == 8


@pytest.mark.parametrize("access", ACCESS)
def test_without_verification_no_chunk_is_looked_at(tmp_path: Path, checked: list[int], access: str):
    values = numbers(ROWS)
    array = stored(tmp_path, values, verify=False)
    flip(tmp_path / "p.zarr" / "x" / "c" / "0", 5)
    checked.clear()
    for start, stop in [(0, 3), (0, 8), (0, ROWS)]:
        found = ACCESS[access](array, start, stop)
        assert found[1] == values[1] ^ (1 << 8) and (found[2:] == values[start + 2 : stop]).all()
    assert set(checked) == {PER_SHARD * 16}, "the indices of the shards alone"


@pytest.mark.parametrize("access", ACCESS)
@pytest.mark.parametrize(("start", "stop"), [(24, 32), (25, 28), (31, 32), (20, 26), (30, 50), (0, ROWS)])
def test_damage_is_found_at_first_touch_however_it_is_touched(tmp_path: Path, access: str, start: int, stop: int):
    """A bit of row 29, in chunk 3, which rows 24 to 32 share; and it is found each time."""
    values = numbers(ROWS)
    array = stored(tmp_path, values)
    file = tmp_path / "p.zarr" / "x" / "c" / "1"
    flip(file, 5 * 4)
    np.testing.assert_array_equal(ACCESS[access](array, 0, 24), values[:24])
    np.testing.assert_array_equal(ACCESS[access](array, 32, ROWS), values[32:])
    for _ in range(2):
        with pytest.raises(StoreError) as caught:
            ACCESS[access](array, start, stop)
        where = "(part p.zarr, array x, chunk 3, read for sample 'dog')"
        assert f"{file}: damaged (the checksum does not match) {where}" in str(caught.value)


@pytest.mark.skipif(tuple(map(int, platform.release().split(".")[:2])) < (5, 14), reason="the kernel cannot tell")
@pytest.mark.parametrize("access", ACCESS)
def test_a_file_that_is_cut_while_it_is_open_is_an_error_and_not_the_end(tmp_path: Path, access: str):
    values = numbers(30_000).repeat(8, axis=0)
    array = stored(tmp_path, values, chunk_rows=8192)
    file = tmp_path / "p.zarr" / "x" / "c" / "0"
    np.testing.assert_array_equal(ACCESS[access](array, 0, 5), values[:5])
    os.truncate(file, 8192 * 4)
    with pytest.raises(StoreError, match=r"cannot be read \(the disk fails, or the file was cut\).*chunk 2"):
        ACCESS[access](array, 20_000, 20_005)


def test_no_file_stays_open_and_none_is_opened_without_need(tmp_path: Path):
    values = numbers(300)
    gc.collect()
    before = open_descriptors()
    array = stored(tmp_path, values, limit=10, chunk_rows=1, per_shard=1)
    assert open_descriptors() == before
    for start in range(300):
        assert array.read(start, start + 1) == values[start]
        assert open_descriptors() <= before + 10
    np.testing.assert_array_equal(array.read(0, 300), values)
    assert open_descriptors() == before + 10
    views = [array.view(start, start + 1) for start in range(50)]
    assert open_descriptors() <= before + 10 + 50, "a view holds its map alone"
    del views, array
    gc.collect()
    assert open_descriptors() == before


def test_a_file_that_is_refused_is_closed_once(tmp_path: Path):
    """Closing it again later would close whatever file has its number by then."""
    stored(tmp_path, numbers(ROWS))
    file = tmp_path / "p.zarr" / "x" / "c" / "0"
    whole = file.read_bytes()
    for content in (whole[:-1] + b"\0", whole[:-70], b"", b"\0" + whole):
        file.write_bytes(content)
        before = open_descriptors()
        others = []
        try:
            stored(tmp_path, numbers(ROWS)).read(0, 5)
        except StoreError:
            others = [os.open(file, os.O_RDONLY) for _ in range(3)]
        assert len(others) == 3, "it is refused"
        for other in others:
            os.close(other)
        assert open_descriptors() == before


def test_too_many_open_files_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    array = stored(tmp_path, numbers(ROWS))

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match="Too many open files") as caught:
        array.read(0, 5)
    assert not isinstance(caught.value, StoreError)


@pytest.mark.parametrize(("limit", "verify"), [(100, True), (1, True), (2, False)])
def test_many_threads_read_what_one_would(tmp_path: Path, limit: int, verify: bool):
    values = numbers(2000, (3,))
    array = stored(tmp_path, values, limit=limit, verify=verify)
    rng = np.random.default_rng(0)
    spans = np.sort(rng.integers(0, 2001, (400, 2)) % rng.choice([30, 2001], (400, 1)), axis=1).tolist()

    def same(place: int) -> bool:
        start, stop = spans[place]
        found = list(ACCESS.values())[place % 3](array, start, stop)
        return np.array_equal(found, values[start:stop])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(same, range(len(spans))))


def test_many_threads_all_find_the_damage(tmp_path: Path):
    values = numbers(200)
    array = stored(tmp_path, values)
    flip(tmp_path / "p.zarr" / "x" / "c" / "2", 1)

    def finds(place: int) -> bool:
        try:
            list(ACCESS.values())[place % 3](array, 40, 60)
        except StoreError:
            return True
        return False

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(finds, range(60)))
