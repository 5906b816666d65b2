"""A store serves less than it holds as exactly as if less had been cached: fewer entries, a smaller mass, or both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.errors import StoreError
from kdpipe.data.store.distributions import Layout, StoredDistribution, narrowed
from kdpipe.data.store.format import NO_ID, ArraySpec, lens_prefix, under
from kdpipe.data.store.reader import PartReader
from kdpipe.data.store.writer import PartWriter

from .conftest import BOUNDS, TEMPERATURES, VOCABULARY, bucketed, layout_of, make_world


def check(
    found: StoredDistribution,
    logits: np.ndarray,
    k: int,
    mass: float | None,
    min_k: int = 1,
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    bounds: Sequence[int] = BOUNDS,
    atol: float = 4e-6,
) -> None:
    """Compares with what the definition gives in float64, at the temperatures in their order."""
    declared = list(dict.fromkeys([*temperatures, 1.0]))
    true = bucketed(logits, k, mass=mass, min_k=min_k, temperatures=declared, bounds=bounds)
    width = found.ids.shape[1]
    np.testing.assert_array_equal(found.ids, true["ids"][:, :width])
    assert (true["ids"][:, width:] == -1).all()
    np.testing.assert_allclose(found.logprob, true["logprob"][:, :width], atol=atol, rtol=1e-6)
    columns = range(len(temperatures))
    np.testing.assert_allclose(found.log_z, true["log_z"][:, columns], atol=atol, rtol=1e-6)
    np.testing.assert_allclose(found.log_tail, true["log_tail"][:, columns], atol=atol, rtol=1e-6)
    assert (found.temperatures, found.block_bounds) == (tuple(temperatures), tuple(bounds))
    assert found.ids.dtype == np.int64
    assert found.logprob.dtype == found.log_z.dtype == found.log_tail.dtype == np.float32


@settings(max_examples=150, deadline=None)
@given(
    vocabulary=st.integers(8, 120),
    stored_k=st.integers(1, 40),
    stored_mass=st.one_of(st.none(), st.floats(0.5, 0.99)),
    k=st.integers(1, 40),
    mass=st.one_of(st.none(), st.floats(0.2, 0.99)),
    min_k=st.integers(1, 4),
    blocks=st.integers(1, 4),
    temperatures=st.permutations(TEMPERATURES).flatmap(lambda order: st.sampled_from([order[:n] for n in (1, 2, 3)])),
    tokens=st.integers(0, 6),
    seed=st.integers(0, 2**16),
)
def test_less_is_served_exactly(vocabulary, stored_k, stored_mass, k, mass, min_k, blocks, temperatures, tokens, seed):
    """By k, by mass, by both, at some temperatures, from both layouts."""
    rng = np.random.default_rng(seed)
    stored_k = min(stored_k, vocabulary)
    k = min(k, stored_k)
    if stored_mass is not None and mass is not None:
        mass = min(mass, stored_mass)
    cuts = rng.choice(np.arange(1, vocabulary), blocks - 1, replace=False)
    bounds = (0, *sorted(map(int, cuts)), vocabulary)
    logits = 3 * rng.normal(size=(tokens, vocabulary))
    layout = Layout(stored_k, stored_k, TEMPERATURES, bounds, logprob="float32", mass=stored_mass, min_k=4)
    made = layout.decode(layout.encode(bucketed(logits, stored_k, mass=stored_mass, min_k=4, bounds=bounds)))
    found = narrowed(made, layout, k=k, mass=mass, min_k=min_k, temperatures=temperatures)
    if mass is None and stored_mass is not None:
        mass, min_k = stored_mass, 4
    check(found, logits, k, mass, min_k, temperatures=temperatures, bounds=bounds)


@pytest.mark.parametrize("prefix", ["top", lens_prefix(7)])
@pytest.mark.parametrize("stored_mass", [None, 0.95])
@pytest.mark.parametrize("k", [1, 3, 11, 12, None])
@pytest.mark.parametrize("mass", [None, 0.5, 0.95])
def test_a_part_serves_less(tmp_path: Path, prefix: str, stored_mass: float | None, k: int | None, mass: float | None):
    world = make_world(tmp_path / "a.zarr", mass=stored_mass)
    part = PartReader(world.path)
    for sample, logits in world.logits.items():
        found = part.distribution(part.row_of(sample), prefix, k=k, mass=mass)
        check(found, logits if prefix == "top" else logits / 2, k or 12, mass or stored_mass)


@pytest.mark.parametrize(("logprob", "atol"), [("float16", 0.01), ("uint8", 0.05)])
@pytest.mark.parametrize("stored_mass", [None, 0.95])
def test_less_of_a_coarser_store_is_as_good_as_the_store(
    tmp_path: Path, logprob: str, atol: float, stored_mass: float | None
):
    world = make_world(tmp_path / "a.zarr", mass=stored_mass, logprob=logprob)
    part = PartReader(world.path)
    for sample, logits in world.logits.items():
        for k in (1, 5, 12):
            check(part.distribution(part.row_of(sample), "top", k=k), logits, k, stored_mass, atol=atol)


@pytest.mark.parametrize("stored_mass", [None, 0.9999])
def test_a_token_always_says_all_of_its_mass(tmp_path: Path, stored_mass: float | None):
    part = PartReader(make_world(tmp_path / "a.zarr", k=VOCABULARY, mass=stored_mass).path)
    for k, mass in [(1, None), (5, None), (None, None), (None, 0.3), (2, 0.9), (VOCABULARY, 0.99)]:
        found = part.distribution(2, "top", k=k, mass=mass)
        for column, temperature in enumerate(TEMPERATURES):
            kept = (found.logprob + found.log_z[:, :1]) / temperature - found.log_z[:, column, None]
            total = np.exp(kept).sum(1) + np.exp(found.log_tail[:, column]).sum(1)
            np.testing.assert_allclose(total, 1, atol=1e-5)
    if stored_mass is None:
        assert np.isneginf(part.distribution(2, "top").log_tail).all()


def test_some_temperatures_in_any_order(tmp_path: Path):
    part = PartReader(make_world(tmp_path / "a.zarr").path)
    all_three = part.distribution(0, "top", k=4)
    some = part.distribution(0, "top", k=4, temperatures=[0.5, 2])
    assert some.temperatures == (0.5, 2)
    np.testing.assert_array_equal(some.log_z, all_three.log_z[:, [2, 1]])
    np.testing.assert_array_equal(some.log_tail, all_three.log_tail[:, [2, 1]])


def test_what_was_not_cached_is_refused_with_what_was(tmp_path: Path):
    part = PartReader(make_world(tmp_path / "a.zarr").path)
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
    part.distribution(0, "top", mass=0.999999, min_k=99)


def test_more_mass_than_was_cached_is_refused(tmp_path: Path):
    part = PartReader(make_world(tmp_path / "a.zarr", mass=0.9).path)
    with pytest.raises(StoreError, match=r"a mass of 0\.95 were asked for and 0\.9 is stored.*`teachers\.mass`"):
        part.distribution(0, "top", mass=0.95)
    with pytest.raises(StoreError, match=r"at least 2 entries .* and 1 are stored.*`teachers\.min_k`"):
        part.distribution(0, "top", mass=0.9, min_k=2)
    with pytest.raises(StoreError, match=r"k = 13 was asked for"):
        part.distribution(0, "top", k=13)
    with pytest.raises(StoreError, match=r"holds no draws"):
        part.distribution(0, "top", draws=True)


def test_draws_belong_to_the_k_they_were_made_for(tmp_path: Path):
    logits = np.random.default_rng(0).normal(size=(4, VOCABULARY))
    drawn = np.random.default_rng(0).integers(0, VOCABULARY, (4, 3, 5))
    drawn[2, 1] = -1
    layout = layout_of(12, draws={"count": 5, "k": 8})
    writer = PartWriter(
        tmp_path / "b.zarr", source="textual", arrays=layout.specs("top"), attributes=layout.attributes()
    )
    writer.append("s0", "k", under("top", layout.encode({**bucketed(logits, 12), "draws": drawn})))
    writer.close()
    part = PartReader(tmp_path / "b.zarr")
    assert (part.read(0)["top/draws"][2, 1] == NO_ID).all()
    found = part.distribution(0, "top", k=8, temperatures=[0.5, 2.0], draws=True)
    assert found.draws is not None and found.draws.dtype == np.int64
    np.testing.assert_array_equal(found.draws, drawn[:, [2, 1]])
    assert found.ids.shape == (4, 8)
    assert part.distribution(0, "top", k=8).draws is None and part.distribution(0, "top", k=3).draws is None
    for k in (7, 12, None):
        with pytest.raises(StoreError, match=r"its draws are from the tails that k = 8 leaves; k = \d+ was asked"):
            part.distribution(0, "top", k=k, draws=True)
    with pytest.raises(StoreError, match=r"holds no draws from the tails. Set `teachers.draws`"):
        PartReader(make_world(tmp_path / "a.zarr").path).distribution(0, "top", draws=True)


def test_a_vocabulary_smaller_than_k_serves_what_there_is(tmp_path: Path):
    """`teachers.k` may exceed a miniature's vocabulary; the part says k and keeps everything."""
    layout = layout_of(64)
    assert (layout.k, layout.kept) == (64, VOCABULARY)
    world = make_world(tmp_path / "a.zarr", [4], k=64)
    part = PartReader(world.path)
    assert part.distribution(0, "top", k=64).ids.shape == part.distribution(0, "top").ids.shape == (4, VOCABULARY)
    check(part.distribution(0, "top", k=50), world.logits["s0"], VOCABULARY, None)
    check(part.distribution(0, "top", k=5), world.logits["s0"], 5, None)


def test_a_part_without_distributions_has_none(tmp_path: Path):
    writer = PartWriter(tmp_path / "a", source="targets", arrays=[ArraySpec("target_ids", (), "uint32")], attributes={})
    writer.close()
    with pytest.raises(StoreError, match="a: holds no distributions that this kdpipe reads"):
        PartReader(tmp_path / "a").distribution(0, "top")
