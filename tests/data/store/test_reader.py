"""Reading parts: units by row, hidden states in every codec, and what belongs to whom."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdpipe.data.errors import StoreError
from kdpipe.data.store.codec import decode_states, encode_states, fit_basis
from kdpipe.data.store.format import ArraySpec, StatesCodec, hidden_attributes, hidden_specs, is_low_rank, under
from kdpipe.data.store.reader import OPEN_FILES, PartReader
from kdpipe.data.store.writer import PartWriter

from .conftest import World, bucketed, flip, make_world, numbers, open_descriptors

LAYOUTS = [(None, "float32"), (None, "uint8"), (0.9, "float16"), (0.9, "uint8")]


@pytest.mark.parametrize(("mass", "logprob"), LAYOUTS)
def test_rows_come_back_as_they_were_written(tmp_path: Path, mass: float | None, logprob: str):
    world = make_world(tmp_path / "a.zarr", mass=mass, logprob=logprob)
    part = PartReader(world.path)
    assert part.source == "textual" and part.layout == world.layout
    for row, (sample, arrays) in enumerate(world.arrays.items()):
        assert part.row_of(sample) == row and part.tokens(row) == len(world.logits[sample])
        assert part.units[row]["key"] == f"key-{sample}" and part.units[row]["length"] == part.tokens(row) + 7
        found = part.read(row)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)
            assert found[name].dtype == array.dtype and found[name].flags.writeable
            out = np.empty(array.shape, array.dtype)
            part.read_into(row, name, out)
            np.testing.assert_array_equal(out, array)


def test_what_a_part_does_not_hold_is_refused(world: World):
    part = PartReader(world.path)
    assert list(part.read(0, ["top/log_z"])) == ["top/log_z"]
    with pytest.raises(StoreError, match="holds no unit 'nobody'"):
        part.row_of("nobody")
    with pytest.raises(StoreError, match=r"holds no array 'lens/09/ids'; it has .*lens/07/ids"):
        part.read(0, ["lens/09/ids"])
    with pytest.raises(StoreError, match=r"holds no hidden states of layer 4; it has \[3\]"):
        part.hidden(0, 4)
    with pytest.raises(ValueError, match=r"target_ids: uint32 .* does not take rows 5 to 22"):
        part.read_into(2, "target_ids", np.empty(5, np.uint32))


def test_an_open_part_holds_nothing_that_is_for_the_ledger(tmp_path: Path):
    spec, about = ArraySpec("target_ids", (), "uint32"), {"cover": {"k": 64, "temperatures": [1.0, 2.0]}, "length": 9}
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[spec], attributes={})
    for n in range(400):
        fields = {f"name{m}": f"{n:032}" for m in range(12)}
        writer.append(f"s{n}", f"{n:032}", {"target_ids": np.zeros(2, np.uint32)}, about | {"fields": fields})
    writer.close()
    PartReader(tmp_path / "a")
    tracemalloc.start()
    part = PartReader(tmp_path / "a")
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] / 400
    tracemalloc.stop()
    assert part.units[3] == {"id": "s3", "key": f"{3:032}", "tokens": 2, "length": 9}
    assert held < 700, f"{held:.0f} bytes a unit; its fields and cover are 2,000"


def test_a_part_without_hidden_states_has_no_layers(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={})
    writer.append("s", "k", {"target_ids": np.zeros(2, np.uint32)})
    writer.close()
    with pytest.raises(StoreError, match=r"holds no hidden states of layer 3; it has \[\]"):
        PartReader(tmp_path / "a").hidden(0, 3)


def test_a_part_of_nothing_is_a_part(tmp_path: Path):
    part = PartReader(make_world(tmp_path / "a.zarr", []).path)
    assert part.units == [] and part.source == "textual"
    part = PartReader(make_world(tmp_path / "b.zarr", [0, 0], mass=0.9).path)
    assert [len(part.read(row)["target_ids"]) for row in range(2)] == [0, 0]
    assert part.distribution(1, "top", k=3).log_tail.shape == (0, 3, 3)
    assert part.hidden(0, 3).shape == (0, 6)


@pytest.mark.parametrize(("mass", "logprob"), LAYOUTS)
def test_what_is_read_belongs_to_the_caller(tmp_path: Path, mass: float | None, logprob: str):
    world = make_world(tmp_path / "a.zarr", mass=mass, logprob=logprob)
    part = PartReader(world.path)
    before = {file: file.read_bytes() for file in world.path.rglob("*") if file.is_file()}
    for array in part.read(0).values():
        array[...] = 99
    for array in part.states(0, 3).values():
        array[...] = 99
    for name, array in part.read(0).items():
        np.testing.assert_array_equal(array, world.arrays["s0"][name])
    first = part.distribution(0, "top", k=3)
    for name in ("ids", "logprob", "log_tail", "log_z"):
        array = getattr(first, name)
        if array.flags.writeable:
            array[...] = 1
    again = part.distribution(0, "top", k=3)
    np.testing.assert_array_equal(again.ids, bucketed(world.logits["s0"], 3, mass=mass)["ids"][:, : again.ids.shape[1]])
    assert {file: file.read_bytes() for file in before} == before


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=6),
    layout=st.sampled_from(LAYOUTS),
    chunk_bytes=st.sampled_from([1, 50, 200, 1 << 18]),
    shard_bytes=st.sampled_from([1, 500, 128 << 20]),
    order=st.randoms(use_true_random=False),
)
def test_samples_that_span_chunks_and_shards(tmp_path: Path, lengths, layout, chunk_bytes, shard_bytes, order):
    mass, logprob = layout
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", chunk_bytes)
        patch.setattr("kdpipe.data.store.format.STATES_CHUNK_BYTES", 2 * chunk_bytes)
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.zarr"
        world = make_world(path, lengths, mass=mass, logprob=logprob, shard_bytes=shard_bytes)
    part = PartReader(path)
    rows = list(range(len(lengths))) * 2
    order.shuffle(rows)
    for row in rows:
        for name, array in part.read(row).items():
            np.testing.assert_array_equal(array, world.arrays[f"s{row}"][name])
        found = part.distribution(row, "top", k=4)
        true = bucketed(world.logits[f"s{row}"], 4, mass=mass)
        np.testing.assert_array_equal(found.ids, true["ids"][:, : found.ids.shape[1]])
        np.testing.assert_allclose(found.log_z, true["log_z"], rtol=1e-6)


@pytest.mark.parametrize("codec", ["bfloat16", "float32", "int8", "fp8", "low_rank", "low_rank_int8"])
def test_hidden_states_come_back_decoded(tmp_path: Path, codec: StatesCodec):
    """Two layers, each with a basis of its own where the codec has one."""
    states = {
        f"c{i}": torch.randn(tokens, 8, generator=torch.Generator().manual_seed(i)) for i, tokens in enumerate((3, 9))
    }
    together = torch.cat(list(states.values()))
    bases = {2: fit_basis(together, 3), 28: fit_basis(together.flip(1), 3)} if is_low_rank(codec) else {}
    writer = PartWriter(
        tmp_path / "a",
        source="acoustic",
        arrays=[*hidden_specs(2, 8, codec, 3), *hidden_specs(28, 8, codec, 3)],
        constants={f"hidden/{layer:02d}/basis": basis for layer, basis in bases.items()},
        attributes=hidden_attributes(codec=codec, layers=[2, 28], width=8, rank=3),
    )
    for clip, values in states.items():
        arrays = under("hidden/02", encode_states(values, codec, bases.get(2)))
        arrays |= under("hidden/28", encode_states(-values, codec, bases.get(28)))
        writer.append(clip, "k", arrays)
    writer.close()
    part = PartReader(tmp_path / "a")
    for clip, values in states.items():
        for layer, sign in ((2, 1), (28, -1)):
            kept = encode_states(sign * values, codec, bases.get(layer))
            expected = {**kept, **({"basis": bases[layer]} if bases else {})}
            raw = part.states(part.row_of(clip), layer)
            assert raw.keys() == expected.keys()
            for name, array in raw.items():
                np.testing.assert_array_equal(array, expected[name])
            found = part.hidden(part.row_of(clip), layer)
            assert found.dtype == (torch.bfloat16 if codec == "bfloat16" else torch.float32)
            assert torch.equal(found, decode_states(expected, codec))
    assert part.state_arrays(2) == [spec.name for spec in hidden_specs(2, 8, codec, 3)]


def test_a_basis_is_read_once(tmp_path: Path):
    writer = PartWriter(
        tmp_path / "a",
        source="acoustic",
        arrays=hidden_specs(2, 4, "low_rank", 2),
        constants={"hidden/02/basis": np.eye(2, 4, dtype=np.float16)},
        attributes=hidden_attributes(codec="low_rank", layers=[2], width=4, rank=2),
    )
    writer.append("c", "k", {"hidden/02/states": numbers(3, (2,), "bfloat16")})
    writer.close()
    part = PartReader(tmp_path / "a")
    assert part.states(0, 2)["basis"] is part.states(0, 2)["basis"] is part.constant("hidden/02/basis")


def test_without_verification_damage_is_not_looked_for(world: World):
    flip(world.path / "target_ids" / "c" / "0", 1)
    found = PartReader(world.path, verify=False).read(0, ["target_ids"])["target_ids"]
    assert found[0] == world.arrays["s0"]["target_ids"][0] ^ 256
    with pytest.raises(StoreError, match="target_ids"):
        PartReader(world.path).read(0, ["target_ids"])


def test_a_part_of_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 4)
    files = OPEN_FILES + 50
    writer = PartWriter(
        tmp_path / "a",
        source="targets",
        arrays=[ArraySpec("target_ids", (), "uint32")],
        attributes={},
        shard_bytes=4,
    )
    for row in range(files):
        writer.append(f"s{row}", "k", {"target_ids": np.full(1, row, np.uint32)})
    writer.close()
    gc.collect()
    before = open_descriptors()
    part = PartReader(tmp_path / "a")
    for _ in range(2):
        for row in range(files):
            assert part.read(row)["target_ids"] == [row]
            assert open_descriptors() <= before + 2 * OPEN_FILES
    del part
    gc.collect()
    assert open_descriptors() == before


@pytest.mark.parametrize(("mass", "logprob"), LAYOUTS)
def test_many_threads_read_a_fresh_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mass, logprob):
    """All threads meet axes, arrays, files and checksums for the first time together."""
    monkeypatch.setattr("kdpipe.data.store.format.ROWS_CHUNK_BYTES", 64)
    world = make_world(tmp_path / "a.zarr", mass=mass, logprob=logprob, shard_bytes=256)
    expected = {sample: PartReader(world.path).distribution(row, "top", k=5) for row, sample in enumerate(world.arrays)}

    for _ in range(3):
        part = PartReader(world.path)

        def check(row: int, part: PartReader = part) -> None:
            sample = f"s{row}"
            for name, array in part.read(row).items():
                np.testing.assert_array_equal(array, world.arrays[sample][name])
            found = part.distribution(row, "top", k=5)
            for name in ("ids", "logprob", "log_z", "log_tail"):
                np.testing.assert_array_equal(getattr(found, name), getattr(expected[sample], name))

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(check, [0, 1, 2, 3, 4] * 4))
