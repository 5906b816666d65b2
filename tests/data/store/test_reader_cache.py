"""Chunks in memory: decoded once while there is room, and numpy arrays whatever zarr gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.data.store.reader import PartReader, _Recent

from .conftest import World, make_world


class Watched:
    """An array of a part that notes which rows are decoded, and gives them in a form of its own."""

    def __init__(self, array: Any, give: Callable[[np.ndarray], Any] = np.asarray):
        self.array, self.give = array, give
        self.decoded: list[tuple[int, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.array, name)

    def __getitem__(self, rows: slice) -> Any:
        self.decoded.append((rows.start, rows.stop))
        return self.give(self.array[rows])


def watch(part: PartReader, name: str, *give: Callable[[np.ndarray], Any]) -> Watched:
    watched = Watched(part._group[name], *give)
    part._arrays[name] = watched  # type: ignore[assignment]
    return watched


@pytest.mark.parametrize(("room", "times"), [(4, 1), (2, 3)])
def test_a_chunk_is_decoded_once_while_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, times: int
):
    """Four chunks, read in turn three times: with room for two, each has gone before its turn comes again."""
    chunk_bytes = 4 * 12 * 4
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", chunk_bytes)
    world = make_world(tmp_path / "a.zarr", [4, 4, 4, 4])
    part = PartReader(world.path, _Recent(room * chunk_bytes + 5 * 8))
    watched = watch(part, "top/ids")
    for _ in range(3):
        for row in range(4):
            found = part.read(row, ["top/ids"])["top/ids"]
            np.testing.assert_array_equal(found, world.arrays[f"s{row}"]["top/ids"])
    assert sorted(watched.decoded) == sorted([(0, 4), (4, 8), (8, 12), (12, 16)] * times)
    assert part._cache._size <= room * chunk_bytes + 5 * 8


def test_the_chunk_used_last_stays_longest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4 * 12 * 4)
    world = make_world(tmp_path / "a.zarr", [4, 4, 4, 4])
    part = PartReader(world.path, _Recent(2 * 4 * 12 * 4))
    watched = watch(part, "top/ids")
    for row in (0, 1, 0, 2, 0, 3, 0):
        part.read(row, ["top/ids"])
    assert watched.decoded == [(0, 4), (4, 8), (8, 12), (12, 16)]


class Elsewhere:
    """What zarr gives where its buffers are not numpy's: an array by its interface alone, without `nbytes`."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self.array

    def __getitem__(self, rows: slice) -> Elsewhere:
        return Elsewhere(self.array[rows])


def test_chunks_are_numpy_arrays_of_the_stored_dtype_whatever_zarr_gives(world: World):
    part = PartReader(world.path)
    for name in part.attributes["arrays"]:
        watch(part, name, Elsewhere)
        for row, (sample, arrays) in enumerate(world.arrays.items()):
            found = part.read(row, [name])[name]
            assert type(found) is np.ndarray and found.dtype == arrays[name].dtype, (name, sample)
            np.testing.assert_array_equal(found, arrays[name])
    kept = [value for value, _ in part._cache._values.values()]
    assert {type(value) for value in kept} == {np.ndarray}
    assert part._cache._size == sum(value.nbytes for value in kept)
