"""Intervals and tests against what theory says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdpipe.stages.evaluate.statistics import mcnemar, mean_interval, paired


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    values = np.repeat([1, 0], [300, 700])
    found = mean_interval(values)
    assert found.value == 0.3 and found.n == 1000
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (found.low, found.high) == (pytest.approx(0.3 - half, abs=0.002), pytest.approx(0.3 + half, abs=0.002))


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(1)
    held = [(found := mean_interval(rng.random(200) < 0.4)).low <= 0.4 <= found.high for _ in range(300)]
    assert 0.91 <= np.mean(held) <= 0.985


def test_the_same_values_give_the_same_interval_in_any_order():
    values = np.array([1, 0, 0, 1, 1, 0, 1])
    assert mean_interval(values) == mean_interval(values[::-1])


@pytest.mark.parametrize(("value", "n", "ends"), [(1, 20, (0.8389, 1.0)), (0, 20, (0.0, 0.1611))])
def test_where_all_are_alike_the_interval_is_wilsons(value, n, ends):
    found = mean_interval(np.full(n, value))
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-4)


def test_no_difference_anywhere_is_sure_to_both_sides():
    found = mean_interval(np.zeros(20), lowest=-1.0)
    assert (found.low, found.high) == pytest.approx((-0.1611, 0.1611), abs=1e-4)


def test_seeds_that_differ_widen_the_interval_and_seeds_alike_do_not():
    rng = np.random.default_rng(0)
    one = rng.random(400) < 0.5
    alike = mean_interval(np.array([one, one, one]))
    alone = mean_interval(one)
    assert alike.high - alike.low == pytest.approx(alone.high - alone.low, rel=0.05)
    apart = mean_interval(np.array([np.zeros(400), one, np.ones(400)]))
    assert apart.high - apart.low > 3 * (alone.high - alone.low)


def test_nothing_has_no_interval():
    assert mean_interval(np.zeros((3, 0))) is None
    assert paired({"a": True}, {"b": True}) is None


@pytest.mark.parametrize(
    ("gained", "forgotten", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (8, 2, 0.109375), (2, 8, 0.109375), (10, 10, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test(gained, forgotten, p):
    assert mcnemar(gained, forgotten) == pytest.approx(p)
    assert mcnemar(60_000, 50_000) < 1e-100


def test_pairs_are_of_what_both_answered():
    base = {"a": True, "b": True, "c": False, "d": False, "only base": True}
    student = {"a": True, "b": False, "c": True, "d": True, "only student": False}
    found = paired(base, student)
    assert (found["n"], found["gained"], found["forgotten"]) == (4, 2, 1)
    assert found["difference"] == 0.25 and found["p_value"] == 1.0
    assert -1 <= found["interval"][0] < 0.25 < found["interval"][1] <= 1
