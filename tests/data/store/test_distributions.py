"""Layouts of distributions: what is encoded is declared, and comes back as exactly as its dtype says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdpipe.data.errors import StoreError
from kdpipe.data.store.distributions import Layout, entries_for_mass
from kdpipe.data.store.format import STORED_AS, ArraySpec

from .conftest import BOUNDS, TEMPERATURES, VOCABULARY, bucketed, layout_of

FLOAT16_STEP = 2.0**-11  # relative error of rounding to float16


def logits_of(tokens: int, seed: int = 0, vocabulary: int = VOCABULARY, spread: float = 3) -> np.ndarray:
    return spread * np.random.default_rng(seed).normal(size=(tokens, vocabulary))


def back(layout: Layout, made: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encoded and decoded, with what is encoded compared with what was declared."""
    encoded = layout.encode(made)
    tokens, specs = len(made["log_z"]), {spec.name: spec for spec in layout.specs("d")}
    assert {f"d/{name}" for name in encoded} == specs.keys()
    rows = {
        "tokens": tokens,
        "d/entries": int((made["logprob"] > -np.inf).sum()),
        "d/bytes": len(encoded["ids"]),
    }
    for name, array in encoded.items():
        spec = specs[f"d/{name}"]
        assert array.dtype == STORED_AS[spec.dtype] and array.shape == (rows[spec.axis], *spec.width), name
        array.flags.writeable = False
    return layout.decode(encoded)


def trimmed(ids: np.ndarray) -> int:
    """Columns in which any token keeps an entry."""
    return int((ids >= 0).sum(1).max(initial=0))


def test_float32_comes_back_to_the_bit():
    true = bucketed(logits_of(20), 12)
    found = back(layout_of(), true)
    np.testing.assert_array_equal(found["ids"], true["ids"])
    assert found["ids"].dtype == np.int64
    for name in ("logprob", "log_z", "log_tail"):
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], true[name].astype(np.float32))


@settings(max_examples=120, deadline=None)
@given(
    vocabulary=st.integers(2, 300),
    k=st.integers(1, 40),
    blocks=st.integers(1, 5),
    temperatures=st.permutations([1.0, 2.0, 0.5]).map(lambda order: order[: order.index(1.0) + 1]),
    tokens=st.integers(0, 8),
    mass=st.one_of(st.none(), st.floats(0.05, 0.999)),
    min_k=st.integers(1, 4),
    logprob=st.sampled_from(["float16", "float32", "uint8"]),
    seed=st.integers(0, 2**16),
)
def test_any_distribution_comes_back(vocabulary, k, blocks, temperatures, tokens, mass, min_k, logprob, seed):
    k, blocks = min(k, vocabulary), min(blocks, vocabulary)
    cuts = np.random.default_rng(seed).choice(np.arange(1, vocabulary), blocks - 1, replace=False)
    bounds = (0, *sorted(map(int, cuts)), vocabulary)
    true = bucketed(
        logits_of(tokens, seed, vocabulary), k, mass=mass, min_k=min_k, temperatures=temperatures, bounds=bounds
    )
    layout = Layout(k, k, tuple(temperatures), bounds, logprob=logprob, mass=mass, min_k=min_k)
    found = back(layout, true)
    width = k if mass is None else trimmed(true["ids"])
    there = true["ids"][:, :width] >= 0
    np.testing.assert_array_equal(found["ids"], true["ids"][:, :width])
    np.testing.assert_array_equal(found["logprob"] > -np.inf, there)
    np.testing.assert_array_equal(found["log_z"], true["log_z"].astype(np.float32))
    if logprob == "uint8":
        check_steps(found["logprob"], true["logprob"][:, :width], there)
    else:
        step = FLOAT16_STEP if logprob == "float16" else 1e-7
        np.testing.assert_allclose(found["logprob"][there], true["logprob"][:, :width][there], rtol=step, atol=1e-7)
    tail_step = 1e-7 if logprob == "float32" else FLOAT16_STEP
    np.testing.assert_allclose(found["log_tail"], true["log_tail"], rtol=tail_step, atol=1e-6)


def check_steps(found: np.ndarray, true: np.ndarray, there: np.ndarray) -> None:
    """Half of one of 255 steps between the ends of a token, and what rounding the ends to float16 costs."""
    high = np.where(there, true, -np.inf).max(1, keepdims=True, initial=-np.inf)
    low = np.where(there, true, np.inf).min(1, keepdims=True, initial=np.inf)
    with np.errstate(invalid="ignore"):
        bound = np.broadcast_to((high - low) / 255 / 2 + np.abs(low) * 2 * FLOAT16_STEP, true.shape)
        error = np.abs(found - true)
    assert (error[there] <= bound[there] + 1e-7).all()


def test_bytes_are_within_half_a_step_of_each_token():
    """Ends that float16 holds exactly: nothing is added to half a step, and the ends come back as they are."""
    rng = np.random.default_rng(0)
    logprob = -np.sort(rng.random((50, 12)) * 16, axis=1)
    logprob[:, 0], logprob[:, -1] = -0.25, -16 - np.arange(50) / 8
    made = {**bucketed(logits_of(50), 12), "logprob": logprob}
    found = back(layout_of(logprob="uint8"), made)["logprob"]
    step = (logprob[:, :1] - logprob[:, -1:]) / 255
    assert (np.abs(found - logprob) <= step / 2 + 1e-6).all()
    assert np.abs(found - logprob).max() > 0.4 * step.min(), "it is the worst, not only a bound"
    np.testing.assert_array_equal(found[:, 0], np.float32(-0.25))
    assert (np.diff(found, axis=1) <= 0).all()


@pytest.mark.parametrize("mass", [None, 0.9])
@pytest.mark.parametrize("logprob", ["float16", "float32", "uint8"])
def test_a_token_that_is_sure_and_one_that_knows_nothing(logprob: str, mass: float | None):
    sure, even = np.full((1, VOCABULARY), -300.0), np.zeros((1, VOCABULARY))
    sure[0, 7] = 300
    true = bucketed(np.concatenate([sure, even]), 12, mass=mass)
    found = back(layout_of(logprob=logprob, mass=mass), true)
    np.testing.assert_array_equal(found["ids"], true["ids"][:, : found["ids"].shape[1]])
    there = found["ids"] >= 0
    np.testing.assert_allclose(
        found["logprob"][there], true["logprob"][:, : there.shape[1]][there], rtol=2e-3, atol=1e-6
    )
    assert found["logprob"][0, 0] == 0 and not np.isnan(found["logprob"]).any()


@pytest.mark.parametrize("logprob", ["float16", "float32", "uint8"])
def test_a_kept_entry_that_float16_can_not_hold_is_not_taken_for_none(logprob: str):
    """At a log-probability of -1e5 nothing is lost but the number; the entry stays."""
    logits = np.full((2, VOCABULARY), -1e5)
    logits[:, 3] = 0
    true = bucketed(logits, 2)
    found = back(layout_of(2, logprob=logprob), true)
    np.testing.assert_array_equal(found["ids"], true["ids"])
    assert (np.exp(found["logprob"][:, 1]) == 0).all() and not np.isnan(found["logprob"]).any()


@pytest.mark.parametrize("logprob", ["float16", "float32", "uint8"])
def test_fewer_ids_than_k_leave_entries_that_are_none(logprob: str):
    """Masked ids: a miniature's vocabulary may have fewer than k others. They cost the real entries no precision."""
    logits = logits_of(4)
    logits[:, 5:] = -np.inf
    true = bucketed(logits, 8)
    assert (true["ids"][:, 5:] == -1).all()
    for absent in (-1, 17):
        made = {**true, "ids": np.where(true["ids"] < 0, absent, true["ids"])}
        found = back(layout_of(8, logprob=logprob), made)
        np.testing.assert_array_equal(found["ids"], true["ids"])
        np.testing.assert_array_equal(found["logprob"][:, 5:], -np.inf)
        if logprob == "uint8":
            check_steps(found["logprob"], true["logprob"], true["ids"] >= 0)
        else:
            np.testing.assert_allclose(found["logprob"], true["logprob"], rtol=FLOAT16_STEP, atol=1e-7)


@pytest.mark.parametrize("mass", [None, 0.9])
def test_tails_in_float16(mass: float | None):
    """Nothing left is nothing left; what is too small for float16 becomes nothing; the rest is rounded."""
    made = bucketed(logits_of(3), 12)
    made["log_tail"][:] = -1.2345
    made["log_tail"][0, 0] = [-np.inf, -70_000, -65_000]
    for logprob in ("float16", "uint8"):
        found = back(layout_of(logprob=logprob, mass=mass), made)["log_tail"]
        assert found.dtype == np.float32
        assert found[0, 0, 0] == found[0, 0, 1] == -np.inf
        np.testing.assert_allclose(found[0, 0, 2], -65_000, rtol=FLOAT16_STEP)
        np.testing.assert_allclose(found[1:], -1.2345, rtol=FLOAT16_STEP)
    exact = back(layout_of(mass=mass), made)["log_tail"]
    np.testing.assert_array_equal(exact, made["log_tail"].astype(np.float32))


@pytest.mark.parametrize("mass", [None, 0.9])
@pytest.mark.parametrize("logprob", ["float16", "float32", "uint8"])
def test_a_sample_without_tokens(logprob: str, mass: float | None):
    layout = layout_of(logprob=logprob, mass=mass)
    found = back(layout, bucketed(logits_of(0), 12, mass=mass))
    assert {name: len(array) for name, array in found.items()} == dict.fromkeys(found, 0)
    assert found["log_tail"].shape == (0, 3, 3) and found["log_z"].shape == (0, 3)


def test_more_than_255_entries_have_a_wider_count():
    for k, dtype in ((255, "uint8"), (256, "uint32"), (300, "uint32")):
        layout = Layout(k, k, (1.0,), (0, 400), logprob="float32", mass=0.999999)
        assert ArraySpec("d/count", (), dtype) in layout.specs("d")
        true = bucketed(logits_of(3, 0, 400, 0.1), k, mass=0.999999, temperatures=(1.0,), bounds=(0, 400))
        assert (true["ids"] >= 0).all()
        np.testing.assert_array_equal(back(layout, true)["ids"], true["ids"])


def test_draws_are_stored_beside_and_an_empty_tail_is_told():
    layout = layout_of(8, draws={"count": 5, "k": 8})
    draws = np.random.default_rng(0).integers(0, VOCABULARY, (4, 3, 5))
    draws[2, 1] = -1
    encoded = layout.encode({**bucketed(logits_of(4), 8), "draws": draws})
    assert encoded["draws"].dtype == np.uint32 and (encoded["draws"][2, 1] == 2**32 - 1).all()
    np.testing.assert_array_equal(encoded["draws"][0], draws[0])


def test_an_id_outside_the_vocabulary_is_refused():
    made = bucketed(logits_of(4), 8)
    made["ids"][1, 2] = 64
    with pytest.raises(ValueError, match="do not fit into 6 bits"):
        layout_of(8).encode(made)


@pytest.mark.parametrize(
    "options", [{}, {"mass": 0.9, "min_k": 4}, {"draws": {"count": 3, "k": 2}}, {"logprob": "uint8", "mass": 0.5}]
)
def test_a_layout_is_what_its_attributes_say(options: dict[str, Any]):
    layout = layout_of(12, **options)
    assert Layout.of(layout.attributes()) == layout
    assert layout.attributes()["distributions"]["id_bits"] == layout.bits == 6
    assert layout.blocks == 3 and Layout.of({**layout.attributes(), "other": 1}) == layout


@pytest.mark.parametrize("attributes", [{}, {"distributions": {"layout": "pairs"}}, {"distributions": {}}])
def test_other_layouts_are_refused(attributes: dict[str, Any]):
    with pytest.raises(StoreError, match="no distributions that this kdpipe reads"):
        Layout.of(attributes)


def test_layouts_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="lack 1"):
        Layout(4, 4, (2.0,), (0, 5))
    for bounds in ((0,), (1, 5), (0, 5, 5), (0, 5, 3)):
        with pytest.raises(ValueError, match="do not rise from 0"):
            Layout(4, 4, (1.0,), bounds)
    with pytest.raises(ValueError, match="draws are from the tail that one k leaves"):
        layout_of(4, mass=0.9, draws={"count": 3, "k": 2})


@pytest.mark.parametrize("logprob", ["float16", "float32", "uint8"])
def test_bytes_per_token_are_those_of_the_arrays(logprob: str):
    true = bucketed(logits_of(30), 12)
    fixed = layout_of(logprob=logprob)
    assert fixed.bytes_per_token() == sum(array.nbytes for array in fixed.encode(true).values()) / 30
    true = bucketed(logits_of(300), 12, mass=0.9)
    layout = layout_of(logprob=logprob, mass=0.9)
    total = sum(array.nbytes for array in layout.encode(true).values())
    mean = (true["ids"] >= 0).sum() / 300
    assert layout.bytes_per_token(mean) == pytest.approx(total / 300, abs=1 / 300)
    assert layout.bytes_per_token() == layout.bytes_per_token(12) > layout.bytes_per_token(mean)


def test_entries_that_reach_a_mass():
    logprob = np.log(np.array([[0.5, 0.25, 0.125, 0.0625], [0.9, 0.05, 0.02, 0.01]]))
    expected = {0.5: [1, 1], 0.51: [2, 1], 0.75: [2, 1], 0.9: [4, 1], 0.95: [4, 2], 0.99: [4, 4]}
    for mass, counts in expected.items():
        assert entries_for_mass(logprob, mass - 1e-9, 1).tolist() == counts
        assert entries_for_mass(logprob, mass - 1e-9, 3).tolist() == [max(3, count) for count in counts]
    assert entries_for_mass(logprob, 0.9, 9).tolist() == [4, 4]
    assert entries_for_mass(logprob[:0], 0.9, 1).shape == (0,)


def test_the_layouts_of_the_tests_are_those_of_the_reference():
    """The reference itself: kept entries and tails are all of the mass, at every temperature."""
    true = bucketed(logits_of(6), 7, mass=0.8, min_k=2)
    for column, temperature in enumerate(TEMPERATURES):
        kept = (true["logprob"] + true["log_z"][:, :1]) / temperature - true["log_z"][:, column, None]
        total = np.exp(kept).sum(1) + np.exp(true["log_tail"][:, column]).sum(1)
        np.testing.assert_allclose(total, 1, rtol=1e-12)
    assert true["log_tail"].shape[2] == len(BOUNDS) - 1
