"""What goes wrong while an array is written: system calls that write less, a full disk, a writer that is given up."""

from __future__ import annotations

import errno
import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdpipe.data.store.format import ArraySpec
from kdpipe.data.store.writer import PartWriter

from .conftest import data_files, numbers, open_descriptors, write_array

WRITEV, WRITE = os.writev, os.write


@pytest.mark.parametrize("most", [1, 3, 64, 700])
def test_system_calls_that_write_less_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int):
    """`writev` and `write` may write less than they are given; here never more than `most` bytes."""
    values = numbers(500, (3,))
    write_array(tmp_path / "whole", values, chunk_rows=16, per_shard=5)
    calls = []

    def writev(handle: int, pieces: Sequence[Any]) -> int:
        calls.append("writev")
        return WRITE(handle, b"".join(bytes(piece) for piece in pieces)[:most])

    def write(handle: int, data: Any) -> int:
        calls.append("write")
        return WRITE(handle, bytes(data[:most]))

    monkeypatch.setattr(os, "writev", writev)
    monkeypatch.setattr(os, "write", write)
    write_array(tmp_path / "less", values, chunk_rows=16, per_shard=5)
    monkeypatch.undo()
    assert {"writev", "write"} == set(calls)
    assert data_files(tmp_path / "less") == data_files(tmp_path / "whole")


def full_after(calls: int) -> Callable[..., int]:
    """A `writev` for which the disk is full after some calls."""
    done = []

    def writev(handle: int, pieces: Sequence[Any]) -> int:
        if len(done) == calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(handle)
        return WRITEV(handle, pieces)

    return writev


@pytest.mark.parametrize("calls", range(6))
def test_a_full_disk_is_told_and_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int):
    """At the first chunk, at a later one, at an index, and when what waits is written at the end."""
    gc.collect()
    before = open_descriptors()
    monkeypatch.setattr(os, "writev", full_after(calls))
    told = ""
    try:
        write_array(tmp_path / "a", numbers(100), chunk_rows=16, per_shard=2, pieces=[20, 50, 70])
    except OSError as error:
        told = str(error)
    assert "No space left" in told
    assert open_descriptors() == before


def test_a_disk_that_is_full_in_the_middle_of_a_chunk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def write(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "writev", lambda handle, pieces: WRITE(handle, bytes(pieces[0][:5])))
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        write_array(tmp_path / "a", numbers(100), chunk_rows=16, per_shard=2)


def test_a_part_on_a_full_disk_can_not_be_taken_for_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    specs = [ArraySpec(name, (), "uint32") for name in ("target_ids", "other")]
    writer = PartWriter(tmp_path / "a", source="targets", arrays=specs, attributes={})
    writer.append("s", "k", {spec.name: np.zeros(3, np.uint32) for spec in specs})
    monkeypatch.setattr(os, "writev", full_after(2))
    with pytest.raises(OSError, match="No space left"):
        writer.close()
    assert not (tmp_path / "a" / "zarr.json").exists()


def test_a_part_that_is_given_up_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 16)
    gc.collect()
    before = open_descriptors()
    specs = [ArraySpec(name, (), "uint32") for name in ("a", "b", "c")]
    writer = PartWriter(tmp_path / "a", source="targets", arrays=specs, attributes={})
    writer.append("s", "k", {spec.name: numbers(50) for spec in specs})
    assert open_descriptors() == before + len(specs)
    del writer
    assert open_descriptors() == before


def test_a_finished_part_leaves_no_file_open(tmp_path: Path):
    before = open_descriptors()
    write_array(tmp_path / "a", numbers(100), chunk_rows=8, per_shard=2)
    write_array(tmp_path / "b", numbers(0), chunk_rows=8, per_shard=2)
    assert open_descriptors() == before
