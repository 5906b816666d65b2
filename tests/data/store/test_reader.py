"""Reading parts: rows, narrowed distributions, damage, many threads."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kdpipe.data.errors import StoreError
from kdpipe.data.ledger import Ledger, Row
from kdpipe.data.store.codec import decode_states, encode_states
from kdpipe.data.store.format import (
    NO_ID,
    ArraySpec,
    distribution_attributes,
    distribution_specs,
    hidden_attributes,
    hidden_specs,
    lens_prefix,
    under,
)
from kdpipe.data.store.metadata import part_rows
from kdpipe.data.store.reader import PartReader, Store
from kdpipe.data.store.writer import PartWriter

from .conftest import BOUNDS, TEMPERATURES, VOCABULARY, World, bucketed, make_world, specs


def test_rows_come_back_as_they_were_written(world: World):
    part = PartReader(world.path)
    assert part.source == "textual" and part.attributes["distributions"]["k"] == 12
    for row, (sample, arrays) in enumerate(world.arrays.items()):
        assert part.row_of(sample) == row and part.tokens(row) == len(world.logits[sample])
        assert part.units[row]["key"] == f"key-{sample}" and part.units[row]["length"] == part.tokens(row) + 7
        found = part.read(row)
        assert list(found) == list(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype
    assert list(part.read(0, ["top/log_z"])) == ["top/log_z"]
    with pytest.raises(StoreError, match="holds no unit 'nobody'"):
        part.row_of("nobody")
    with pytest.raises(StoreError, match=r"holds no array 'lens/09/ids'; it has .*lens/07/ids"):
        part.read(0, ["lens/09/ids"])


def test_what_is_read_belongs_to_the_caller(world: World):
    part = PartReader(world.path)
    part.read(0, ["target_ids"])["target_ids"][:] = 99
    np.testing.assert_array_equal(part.read(0, ["target_ids"])["target_ids"], world.arrays["s0"]["target_ids"])


def test_samples_that_span_chunks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4 * 12 * 4)
    world = make_world(tmp_path / "a.zarr", [3, 30, 0, 1, 22], shard_bytes=4 * 12 * 8)
    part = PartReader(world.path)
    for row, arrays in enumerate(world.arrays.values()):
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("prefix", ["top", lens_prefix(7)])
@pytest.mark.parametrize("k", [1, 3, 11, 12, None])
def test_a_smaller_k_is_served_exactly(world: World, prefix: str, k: int | None):
    """As if it had been cut to k when it was cached, tails of each block and temperature included."""
    part = PartReader(world.path)
    for sample, logits in world.logits.items():
        found = part.distribution(part.row_of(sample), prefix, k=k)
        true = bucketed(logits if prefix == "top" else logits / 2, k or 12)
        np.testing.assert_array_equal(found.ids, true["ids"])
        assert found.ids.dtype == np.int64 and found.logprob.dtype == np.float32
        for name in ("logprob", "log_z", "log_tail"):
            np.testing.assert_allclose(getattr(found, name), true[name], atol=2e-6, rtol=1e-6)
        assert (found.temperatures, found.block_bounds) == (TEMPERATURES, BOUNDS)


def test_the_whole_vocabulary_leaves_no_tail_and_gives_one_back(tmp_path: Path):
    world = make_world(tmp_path / "a.zarr", k=VOCABULARY)
    part = PartReader(world.path)
    whole = part.distribution(2, "top")
    assert np.isneginf(whole.log_tail).all()
    cut = part.distribution(2, "top", k=5)
    np.testing.assert_allclose(cut.log_tail, bucketed(world.logits["s2"], 5)["log_tail"], atol=2e-6, rtol=1e-6)
    for column in range(3):
        kept = (cut.logprob + whole.log_z[:, :1]) / TEMPERATURES[column] - whole.log_z[:, column, None]
        mass = np.exp(kept).sum(1) + np.exp(cut.log_tail[:, column]).sum(1)
        np.testing.assert_allclose(mass, 1, atol=1e-5)


def test_some_temperatures_in_any_order(world: World):
    part = PartReader(world.path)
    all_three = part.distribution(0, "top", k=4)
    some = part.distribution(0, "top", k=4, temperatures=[0.5, 2])
    assert some.temperatures == (0.5, 2)
    np.testing.assert_array_equal(some.log_z, all_three.log_z[:, [2, 1]])
    np.testing.assert_array_equal(some.log_tail, all_three.log_tail[:, [2, 1]])


def test_what_was_not_cached_is_refused_with_what_was(world: World):
    part = PartReader(world.path)
    with pytest.raises(
        StoreError, match=r"temperature 3.0 was not declared .*\(1.0, 2.0, 0.5 were\).*teachers.temperatures"
    ):
        part.distribution(0, "top", temperatures=[1.0, 3.0])
    with pytest.raises(StoreError, match=r"k = 13 was asked for and k = 12 is stored. Raise `teachers.k`"):
        part.distribution(0, "top", k=13)
    with pytest.raises(StoreError, match="k = 0"):
        part.distribution(0, "top", k=0)
    with pytest.raises(StoreError, match="lens/08"):
        part.distribution(0, lens_prefix(8))
    with pytest.raises(StoreError, match=r"holds no hidden states of layer 4; it has \[3\]"):
        part.hidden(0, 4)


def test_draws_belong_to_the_k_they_were_made_for(tmp_path: Path):
    world = make_world(tmp_path / "a.zarr", [4])
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, (4, 3, 5), dtype=np.uint32)
    drawn[2, 1] = NO_ID
    shape = (12, len(TEMPERATURES), len(BOUNDS) - 1, "float32")
    writer = PartWriter(
        tmp_path / "b.zarr",
        source="textual",
        arrays=distribution_specs("top", *shape, draws=5),  # type: ignore[arg-type]
        attributes=distribution_attributes(
            k=12, temperatures=TEMPERATURES, block_bounds=BOUNDS, draws={"count": 5, "k": 8}
        ),
    )
    writer.append("s0", "k", {**under("top", bucketed(world.logits["s0"], 12)), "top/draws": drawn})
    writer.close()
    part = PartReader(tmp_path / "b.zarr")
    found = part.distribution(0, "top", k=8, temperatures=[0.5, 2.0], draws=True)
    expected = np.where(drawn == NO_ID, -1, drawn.astype(np.int64))[:, [2, 1]]
    assert found.draws is not None and found.draws.dtype == np.int64
    np.testing.assert_array_equal(found.draws, expected)
    assert (found.draws[2, 1] == -1).all() and found.ids.shape == (4, 8)
    assert part.distribution(0, "top", k=8).draws is None and part.distribution(0, "top", k=3).draws is None
    for k in (7, 12, None):
        with pytest.raises(StoreError, match=r"its draws are from the tails that k = 8 leaves; k = \d+ was asked"):
            part.distribution(0, "top", k=k, draws=True)
    with pytest.raises(StoreError, match=r"holds no draws from the tails. Set `teachers.draws`"):
        PartReader(world.path).distribution(0, "top", draws=True)


def test_a_vocabulary_smaller_than_k_serves_what_there_is(tmp_path: Path):
    """`teachers.k` may exceed a miniature's vocabulary; the part says k and keeps everything."""
    world = make_world(tmp_path / "a.zarr", [4], k=VOCABULARY)
    writer = PartWriter(
        tmp_path / "b.zarr",
        source="textual",
        arrays=specs(VOCABULARY),
        attributes={
            "distributions": {
                "layout": "fixed",
                "k": 64,
                "temperatures": list(TEMPERATURES),
                "block_bounds": list(BOUNDS),
            }
        },
    )
    writer.append("s0", "k", world.arrays["s0"])
    writer.close()
    part = PartReader(tmp_path / "b.zarr")
    assert part.distribution(0, "top", k=64).ids.shape == part.distribution(0, "top").ids.shape == (4, VOCABULARY)
    with pytest.raises(StoreError, match="no hidden states"):
        part.hidden(0, 3)


def test_other_layouts_of_distributions_are_refused(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={})
    writer.close()
    with pytest.raises(StoreError, match="no distributions that this kdpipe reads"):
        PartReader(tmp_path / "a").distribution(0, "top")


@pytest.mark.parametrize("codec", ["bfloat16", "float32", "int8"])
def test_hidden_states_come_back_decoded(tmp_path: Path, codec):
    states = {
        f"c{i}": torch.randn(tokens, 8, generator=torch.Generator().manual_seed(i)) for i, tokens in enumerate((3, 9))
    }
    writer = PartWriter(
        tmp_path / "a",
        source="acoustic",
        arrays=[*hidden_specs(2, 8, codec), *hidden_specs(28, 8, codec)],
        attributes=hidden_attributes(codec=codec, layers=[2, 28], width=8),
    )
    for clip, values in states.items():
        arrays = under("hidden/02", encode_states(values, codec)) | under("hidden/28", encode_states(-values, codec))
        writer.append(clip, "k", arrays)
    writer.close()
    part = PartReader(tmp_path / "a")
    for clip, values in states.items():
        expected = decode_states(encode_states(values, codec), codec)
        found = part.hidden(part.row_of(clip), 2)
        assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert torch.equal(part.hidden(part.row_of(clip), 28), -expected)


def read_all(path: Path) -> None:
    part = PartReader(path)
    for row in range(len(part.units)):
        part.read(row)


def test_damage_in_any_file_is_found(tmp_path: Path):
    """One bit of each 5th byte of the arrays and of some bytes of the metadata, in turn."""
    world = make_world(tmp_path / "a.zarr", [3, 2], k=2)
    for file in sorted(path for path in world.path.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for position in range(0, len(whole), 17 if file.name == "zarr.json" else 5):
            torn = bytearray(whole)
            torn[position] ^= 1 << (position % 8)
            file.write_bytes(torn)
            with pytest.raises(StoreError) as caught:
                read_all(world.path)
            message = str(caught.value)
            assert f"Remove the part folder {world.path} and run `kdpipe cache-teachers`" in message
            if file.name != "zarr.json" and "offsets" not in str(file):
                assert str(file) in message and "read for sample 's" in message and "a.zarr" in message
        file.write_bytes(whole)
    read_all(world.path)


def test_files_that_are_cut_or_gone_are_found(tmp_path: Path):
    world = make_world(tmp_path / "a.zarr", [3, 2], k=2)
    for file in sorted(path for path in world.path.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for content in (whole[:-1], whole[1:], whole[: len(whole) // 2], b"", b"\0" * len(whole), None):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(StoreError, match=r"Remove the part folder .*a\.zarr"):
                read_all(world.path)
        file.write_bytes(whole)
    read_all(world.path)


def test_damage_names_file_part_and_sample_and_spares_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4 * 12 * 4)
    world = make_world(tmp_path / "a.zarr", [4, 4, 4, 4], shard_bytes=4 * 12 * 8)
    file = world.path / "top" / "ids" / "c" / "1" / "0"
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(content)
    part = PartReader(world.path)
    for row in (0, 1, 3):
        part.read(row)
    expected = rf"{file}: damaged \(part a\.zarr, array top/ids, chunk 2, read for sample 's2'\)"
    with pytest.raises(StoreError, match=expected):
        part.read(2)
    with pytest.raises(StoreError, match=expected):
        part.read(2)
    file.unlink()
    with pytest.raises(StoreError, match=rf"{file}: missing or empty \(part a\.zarr, array top/ids, chunk 2.*'s2'"):
        part.read(2)


def test_a_part_that_was_not_finished_is_refused(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={})
    writer.append("s", "k", {"target_ids": np.zeros(3, np.uint32)})
    with pytest.raises(StoreError, match="not the metadata of a part"):
        PartReader(tmp_path / "a")


def committed(tmp_path: Path, parts: int = 3) -> tuple[Ledger, list[World]]:
    ledger = Ledger(tmp_path / "cache-teachers", tmp_path / "tmp")
    worlds = []
    for number in range(parts):
        built = make_world(tmp_path / "tmp" / f"b{number}", seed=number, name=f"p{number}s")
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


@pytest.mark.parametrize(("open_parts", "cache_bytes"), [(64, 1 << 28), (2, 1), (1, 3000)])
def test_many_threads_read_what_one_would(tmp_path: Path, open_parts: int, cache_bytes: int):
    ledger, worlds = committed(tmp_path, parts=4)
    store = Store(ledger.parts, ledger, open_parts=open_parts, cache_bytes=cache_bytes)
    arrays = {sample: arrays for world in worlds for sample, arrays in world.arrays.items()}
    order = np.random.default_rng(0).choice(sorted(arrays), 60).tolist()

    def check(sample: str) -> None:
        part, row = store.get(sample, "textual")
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, arrays[sample][name])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(check, order))
    assert len(store._open._values) <= open_parts
    assert store._chunks._size <= cache_bytes or len(store._chunks._values) == 1
