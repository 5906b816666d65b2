"""The files of an array are, byte for byte, what zarr-python writes for the same data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from kdpipe.data.store.format import STORED_AS

from .conftest import data_files, numbers, write_array

SHAPES = [(), (3,), (2, 3)]


def same_as_zarr(
    folder: Path,
    values: np.ndarray,
    *,
    chunk_rows: int,
    per_shard: int,
    dtype: str | None = None,
    pieces: Sequence[int] = (),
) -> None:
    """Writes values by kdpipe and by zarr-python and compares every file."""
    write_array(folder / "ours", values, chunk_rows=chunk_rows, per_shard=per_shard, dtype=dtype, pieces=pieces)
    ours: Any = json.loads((folder / "ours" / "zarr.json").read_text())
    array = zarr.create_array(
        folder / "theirs",
        shape=values.shape,
        dtype=values.dtype,
        chunks=tuple(ours["codecs"][0]["configuration"]["chunk_shape"]),
        shards=tuple(ours["chunk_grid"]["configuration"]["chunk_shape"]),
        compressors=Crc32cCodec(),
        filters=None,
        config={"write_empty_chunks": True},
    )
    array[...] = values
    theirs = json.loads((folder / "theirs" / "zarr.json").read_text())
    ours.pop("attributes"), theirs.pop("attributes")
    assert ours == theirs
    assert data_files(folder / "ours") == data_files(folder / "theirs")
    assert ours["codecs"][0]["configuration"]["chunk_shape"][0] <= max(1, chunk_rows)


@pytest.mark.parametrize("width", SHAPES)
@pytest.mark.parametrize("dtype", STORED_AS)
def test_every_dtype_and_row_shape(tmp_path: Path, dtype: str, width: tuple[int, ...]):
    same_as_zarr(tmp_path, numbers(37, width, dtype), chunk_rows=4, per_shard=3, dtype=dtype, pieces=[5, 5, 30])
    attributes = json.loads((tmp_path / "ours" / "zarr.json").read_text())["attributes"]
    assert attributes == ({} if STORED_AS[dtype] == dtype else {"kdpipe_dtype": dtype})


@pytest.mark.parametrize("per_shard", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 15, 16, 17, 39, 40, 41, 80])
def test_borders_of_chunks_and_shards(tmp_path: Path, rows: int, per_shard: int):
    """Less than a chunk, a chunk, one row more, and the same of shards of 1, 2 and 5 chunks of 8 rows."""
    same_as_zarr(tmp_path, numbers(rows, (3,)), chunk_rows=8, per_shard=per_shard)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 60),
    width=st.sampled_from(SHAPES),
    dtype=st.sampled_from(list(STORED_AS)),
    chunk_rows=st.integers(1, 20),
    per_shard=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_any_rows_in_any_pieces(tmp_path: Path, rows, width, dtype, chunk_rows, per_shard, cuts):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    pieces = sorted(min(cut, rows) for cut in cuts)
    values = numbers(rows, width, dtype)
    same_as_zarr(folder, values, chunk_rows=chunk_rows, per_shard=per_shard, dtype=dtype, pieces=pieces)


def test_a_shard_of_more_chunks_than_one_system_call_takes(tmp_path: Path):
    same_as_zarr(tmp_path, numbers(1000), chunk_rows=3, per_shard=150)


def test_zeros_are_written_like_anything_else(tmp_path: Path):
    same_as_zarr(tmp_path, np.zeros((100, 2), np.float16), chunk_rows=8, per_shard=4)
    assert len((tmp_path / "ours" / "c" / "0" / "0").read_bytes()) == 4 * (8 * 4 + 4) + 4 * 16 + 4


def test_how_the_rows_were_cut_when_they_came_does_not_show(tmp_path: Path):
    values = numbers(200, (3,))
    write_array(tmp_path / "whole", values, chunk_rows=16, per_shard=3)
    for number, pieces in enumerate(([1], [16, 32], [15, 16, 17], range(1, 200), [0, 0, 200], [100, 100, 101])):
        write_array(tmp_path / str(number), values, chunk_rows=16, per_shard=3, pieces=list(pieces))
        assert data_files(tmp_path / str(number)) == data_files(tmp_path / "whole")


def test_rows_that_lie_apart_in_memory_are_written_as_rows(tmp_path: Path):
    values = numbers(80, (6,))
    same_as_zarr(tmp_path / "strided", values[::2, ::-3], chunk_rows=8, per_shard=2)
    same_as_zarr(tmp_path / "turned", np.asfortranarray(values), chunk_rows=8, per_shard=2)
    values.flags.writeable = False
    same_as_zarr(tmp_path / "read-only", values, chunk_rows=8, per_shard=2)
