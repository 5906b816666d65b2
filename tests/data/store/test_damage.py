"""Damage: any bit of any file of a part is found when it is read, and named by file, part, array, chunk and sample."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kdpipe.data.errors import StoreError
from kdpipe.data.store.arrays import StoredArray
from kdpipe.data.store.codec import encode_states, fit_basis
from kdpipe.data.store.format import ArraySpec, hidden_attributes, hidden_specs, under
from kdpipe.data.store.metadata import array_names
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.shard_reader import OpenShards
from kdpipe.data.store.writer import PartWriter

from .conftest import bucketed, flip, layout_of, make_world

UINT = ArraySpec("target_ids", (), "uint32")


def read_all(path: Path) -> list[dict[str, np.ndarray]]:
    part = PartReader(path)
    return [part.read(row) for row in range(len(part.units))]


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def flips_of(file: Path) -> Iterator[None]:
    """Changes each bit of a file in turn, and changes it back."""
    handle = os.open(file, os.O_RDWR)
    for position, byte in enumerate(file.read_bytes()):
        for bit in range(8):
            os.pwrite(handle, bytes([byte ^ 1 << bit]), position)
            yield
        os.pwrite(handle, bytes([byte]), position)
    os.close(handle)


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A part with every kind of array: of tokens, of entries, of bytes, of the part, and their starts."""
    import torch

    layout = layout_of(6, mass=0.9, logprob="uint8")
    logits = np.random.default_rng(0).normal(size=(5, 40)) * 3
    states = torch.from_numpy(np.random.default_rng(1).normal(size=(5, 4)))
    basis = fit_basis(states, 2)
    writer = PartWriter(
        tmp_path / "a.zarr",
        source="textual",
        arrays=[UINT, *layout.specs("top"), *hidden_specs(3, 4, "low_rank_int8", 2)],
        constants={"hidden/03/basis": basis},
        attributes={
            **layout.attributes(),
            **hidden_attributes(codec="low_rank_int8", layers=[3], width=4, rank=2),
        },
    )
    for sample, rows in {"s0": slice(0, 3), "s1": slice(3, 5)}.items():
        arrays = {
            "target_ids": np.arange(5, dtype=np.uint32)[rows],
            **under("top", layout.encode(bucketed(logits[rows], 6, mass=0.9))),
            **under("hidden/03", encode_states(states[rows], "low_rank_int8", basis)),
        }
        writer.append(sample, "k", arrays)
    writer.close()
    return tmp_path / "a.zarr"


def test_every_bit_of_every_array_is_covered(rich: Path):
    """Each bit of each file below each array but its metadata, in turn."""
    names = array_names(PartReader(rich).attributes)
    assert {"offsets", "top/entries", "top/bytes", "hidden/03/basis", "top/range"} < set(names)
    flips = 0
    for name in names:
        (file,) = [file for file in files_of(rich / name) if file.name != "zarr.json"]
        for _ in flips_of(file):
            array = StoredArray(rich, name, OpenShards(1))
            with pytest.raises(StoreError, match="damaged"):
                array.read(0, array.shape[0])
            flips += 1
    assert flips > 5000
    read_all(rich)


def test_every_bit_of_the_metadata_is_covered(tmp_path: Path):
    """Each bit of each `zarr.json`: it is found, or it means the same and the same is read."""
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})
    writer.append("dog-é", "k", {"target_ids": np.arange(3, dtype=np.uint32)})
    writer.close()
    true = PartReader(tmp_path / "a")
    values = read_all(tmp_path / "a")
    same = 0
    for file in files_of(tmp_path / "a"):
        if file.name != "zarr.json":
            continue
        for _ in flips_of(file):
            try:
                found = read_all(tmp_path / "a")
            except StoreError as error:
                assert "Remove the part folder" in str(error)
                continue
            same += 1
            assert PartReader(tmp_path / "a").attributes == true.attributes
            np.testing.assert_equal(found, values)
    assert same == 1, "the upper-case E of an escape that means é"


@pytest.mark.parametrize(("mass", "logprob"), [(None, "float32"), (0.9, "uint8")])
def test_damage_in_any_file_is_named_with_its_remedy(tmp_path: Path, mass: float | None, logprob: str):
    """One bit of each 29th byte of the arrays and of each 211th of the metadata, through a reader of the whole part."""
    world = make_world(tmp_path / "a.zarr", [3, 2], k=3, mass=mass, logprob=logprob)
    axes = ("offsets", "entries", "bytes")
    for file in files_of(world.path):
        size = file.stat().st_size
        for position in range(0, size, 211 if file.name == "zarr.json" else 29):
            flip(file, position, position % 8)
            with pytest.raises(StoreError) as caught:
                read_all(world.path)
            message = str(caught.value)
            assert f"Remove the part folder {world.path} and run `kdpipe cache-teachers`" in message
            if file.name != "zarr.json":
                assert str(file) in message and "part a.zarr" in message
                named = "read for sample 's" in message
                assert named or any(part in axes for part in file.parts)
            flip(file, position, position % 8)
    read_all(world.path)


@pytest.mark.parametrize("mass", [None, 0.9])
def test_files_that_are_cut_or_gone_are_found(tmp_path: Path, mass: float | None):
    world = make_world(tmp_path / "a.zarr", [3, 2], k=2, mass=mass)
    for file in files_of(world.path):
        whole = file.read_bytes()
        contents = (whole[:-1], whole[1:], whole + b"\0", b"\0" + whole, whole[: len(whole) // 2], b"", None)
        for content in (*contents, b"\0" * len(whole), b"\xff" * len(whole)):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(StoreError, match=r"Remove the part folder .*a\.zarr"):
                read_all(world.path)
        file.write_bytes(whole)
    read_all(world.path)


def test_a_shard_without_its_first_chunks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each chunk that is left, and the index, has a checksum that matches; but nothing lies where it should."""
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 16)
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})
    writer.append("s", "k", {"target_ids": np.arange(16, dtype=np.uint32)})
    writer.close()
    file = tmp_path / "a" / "target_ids" / "c" / "0"
    file.write_bytes(file.read_bytes()[20:])
    with pytest.raises(StoreError, match=r"c/0: of 128 bytes, not the 148 that its index describes \(part a, array"):
        read_all(tmp_path / "a")


def test_damage_names_file_part_and_sample_and_spares_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4 * 12 * 4)  # 4 rows of log-probabilities
    world = make_world(tmp_path / "a.zarr", [4, 4, 4, 4], shard_bytes=4 * 12 * 8)
    file = world.path / "top" / "logprob" / "c" / "1" / "0"
    flip(file, 3)
    part = PartReader(world.path)
    for row in (0, 1, 3):
        part.read(row), part.distribution(row, "top")
    expected = rf"{file}: damaged \(.*\) \(part a\.zarr, array top/logprob, chunk 2, read for sample 's2'\)"
    for _ in range(2):
        for read in (part.read, lambda row: part.distribution(row, "top", k=3)):
            with pytest.raises(StoreError, match=expected):
                read(2)
    part.hidden(2, 3)
    file.unlink()
    with pytest.raises(StoreError, match=rf"{file}: missing .*\(part a\.zarr, array top/logprob, read for sample 's2'"):
        PartReader(world.path).read(2)


def test_damage_of_a_clip_names_the_samples_it_serves(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="acoustic", arrays=[UINT], attributes={})
    writer.append("clip", "k", {"target_ids": np.arange(3, dtype=np.uint32)}, {"samples": [{"id": "a"}, {"id": "b"}]})
    writer.close()
    flip(tmp_path / "a" / "target_ids" / "c" / "0", 0)
    with pytest.raises(StoreError, match="read for sample 'a', 'b'"):
        PartReader(tmp_path / "a").read(0)


def test_a_part_that_was_not_finished_is_refused(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[UINT], attributes={})
    writer.append("s", "k", {"target_ids": np.zeros(3, np.uint32)})
    with pytest.raises(StoreError, match=r"zarr\.json: missing"):
        PartReader(tmp_path / "a")
