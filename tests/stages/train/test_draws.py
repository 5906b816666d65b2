"""Training with draws from the teachers' tails, and what refuses, names and identifies it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kdpipe.data.errors import ConfigError
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.config import WeightsConfig
from kdpipe.stages.train.terms import Terms, resolve_terms


@pytest.fixture(scope="module")
def drawn(cached: Any) -> Any:
    return cached("all + SFT", samples=3, k=8, draws=4, temperatures=(2.0,))


def _terms(run: Any, draws: int = 4, **changes: Any) -> Terms:
    config = replace(run.config, teachers=replace(run.config.teachers, draws=draws))
    run = replace(run, config=replace(config, train=replace(config.train, **changes)))
    return resolve_terms(run.config, requirements(run.ctx))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_is_trained_on_draws(drawn: Any, temperature: float) -> None:
    changes: dict[str, Any] = {"divergence": "sampled_ce", "temperature": temperature, "max_steps": 2}
    run = drawn.elsewhere(f"drawn-{temperature:g}", **changes)
    plan = run.plans()["train"]
    assert plan.todo and not any(want.pending for want in plan.todo)
    metrics = run.train()
    assert len(metrics) == 2 and {"top", "layer", "sft"} <= set(metrics[0]["terms"])
    assert all(math.isfinite(value) for line in metrics for value in (line["loss"], *line["terms"].values()))
    assert not run.plans()["train"].todo
    assert metrics[1]["loss"] < metrics[0]["loss"]


def test_a_store_with_draws_serves_the_other_divergences(drawn: Any) -> None:
    run = drawn.elsewhere("skewed", divergence="skew_kl", max_steps=1)
    teachers = replace(run.config.teachers, draws=0, k=5)
    run.config = replace(run.config, teachers=teachers)
    assert not run.plans()["cache-teachers"].todo
    assert math.isfinite(run.train()[0]["loss"])


def test_sampling_without_draws_is_refused(drawn: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampled_ce takes the tails from draws, and teachers.draws is 0"):
        _terms(drawn, draws=0, divergence="sampled_ce")
    nothing = WeightsConfig(top=0, layer=0, acoustic=0)
    assert _terms(drawn, draws=0, divergence="sampled_ce", weights=nothing).compared is None


def test_skew_and_draws_are_part_of_the_objective_where_they_count(drawn: Any) -> None:
    assert _terms(drawn, alpha=0.3) == _terms(drawn, draws=9)
    assert _terms(drawn, alpha=0.3, divergence="skew_reverse_kl") != _terms(drawn, divergence="skew_reverse_kl")
    assert _terms(drawn, draws=3, divergence="sampled_ce") != _terms(drawn, divergence="sampled_ce")
    (line, *_) = _terms(drawn, divergence="sampled_ce").describe()
    assert line.endswith("sampled_ce at temperature 1, k = 8 and 4 draws from each tail")
    (line, *_) = _terms(drawn, divergence="skew_kl").describe()
    assert line.endswith("skew_kl (alpha 0.1) at temperature 1, k = 8 and exact tails")
    assert "alpha" not in str(_terms(drawn).describe())


@pytest.mark.parametrize("changes", [{"alpha": 0.2}, {"divergence": "skew_kl"}], ids=str)
def test_alpha_makes_a_student_stale_only_where_it_counts(drawn: Any, changes: dict[str, Any]) -> None:
    run = drawn.elsewhere("alpha", max_steps=1)
    wanted = {want.key for want in run.plans()["train"].wanted}
    changed = replace(run, config=replace(run.config, train=replace(run.config.train, **changes)))
    assert (wanted == {want.key for want in changed.plans()["train"].wanted}) == ("divergence" not in changes)
