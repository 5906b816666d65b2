"""Weights by task and over the steps: equal to per-sample losses put together by hand, however the batch is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from kdpipe.data.manifest import Sample
from kdpipe.pipeline.check import unknown_tasks
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import Config
from kdpipe.stages.config_train import ScheduleConfig, TaskWeightsConfig, WeightsConfig
from kdpipe.stages.train.stage import STAGE
from kdpipe.stages.train.terms import resolve_terms
from kdpipe.stages.train.weights import OVER_AUDIO, Weighting, schedule_factor, weighed

from .conftest import ready

ALL = "all + acoustic + SFT"
HIDDEN = "hidden + acoustic top + SFT"
SER = TaskWeightsConfig(acoustic=0.4, top=0.5, layer=0.2)
AQA = TaskWeightsConfig(sft=0.0, acoustic=0.0, top=2.0)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def gradients(objective: Any) -> dict[str, torch.Tensor]:
    """Gradients of all that is trained, which are cleared."""
    model = objective._student.model
    named = [*model.named_parameters(), *objective.projections.named_parameters()]
    found = {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}
    for _, parameter in named:
        parameter.grad = None
    return found


def close(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], factor: float = 1.0) -> None:
    assert ours.keys() == theirs.keys() and len(ours) > 40
    for name, value in theirs.items():
        assert float((ours[name] - factor * value).norm()) <= 2e-5 * float(value.norm()) + 1e-9, name


@pytest.mark.parametrize("setting", [ALL, HIDDEN])
def test_a_mixed_micro_batch_is_the_sum_of_its_samples_by_hand(
    tasked: Any, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tasked(setting)
    budgets = {"global_batch_tokens": 100_000, "micro_batch_tokens": 100_000}
    given = ready(run, monkeypatch, task_weights={"ser": SER, "aqa": AQA}, **budgets)
    objective, reader, weights = given["objective"], given["reader"], given["weights"]
    state, ids = next(iter(given["stream"]))
    batch = reader.load((state, ids))
    (micro,) = batch.micros
    assert len(micro.batch.ids) == 8

    def normalizer(name: str) -> int:
        return batch.audio_tokens if name == OVER_AUDIO else batch.response_tokens

    made = objective(micro, weights.factors(micro.batch, 0, normalizer))
    made.loss.backward()
    ours = gradients(objective)

    general = dataclasses.asdict(run.config.train.weights)
    own = {"ser": {"acoustic": 0.4, "top": 0.5, "layer": 0.2}, "aqa": {"sft": 0.0, "acoustic": 0.0, "top": 2.0}}
    tasks = {sample.id: sample.task for sample in run.ctx.samples("train")}
    assert set(tasks.values()) == {"ser", "aqa", None}
    expected = 0.0
    for sample in ids:
        (alone,) = reader.load((state, [sample])).micros
        by_hand = general | own.get(tasks[sample], {})
        sums = objective(alone, {name: by_hand[name] / normalizer(name) for name in made.terms})
        expected += sum(by_hand[name] * float(value) / normalizer(name) for name, value in sums.terms.items())
        sums.loss.backward()
    assert float(made.loss.detach()) == pytest.approx(expected, rel=1e-5)
    close(ours, gradients(objective))


def test_weights_twice_as_large_for_every_task_give_twice_the_gradient(
    tasked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tasked(ALL, ("ser", "aqa"))
    budgets = {"global_batch_tokens": 100_000, "micro_batch_tokens": 100_000}
    twice = TaskWeightsConfig(2.0, 0.1, 0.1, 0.0, 1.0)
    nearly = dataclasses.replace(twice, sft=1.0 + 1e-9)  # other numbers, so that factors a token are made
    found = []
    for task_weights in ({}, {"ser": twice, "aqa": nearly}):
        given = ready(run, monkeypatch, task_weights=task_weights, **budgets)
        batch = given["reader"].load(next(iter(given["stream"])))
        (micro,) = batch.micros
        factors = given["weights"].factors(micro.batch, 0, lambda name: 100)
        assert isinstance(factors["sft"], torch.Tensor) == bool(task_weights)
        given["objective"](micro, factors).loss.backward()
        found.append(gradients(given["objective"]))
    close(found[1], found[0], 2.0)


def test_one_micro_batch_or_many(tasked: Any) -> None:
    run = tasked(ALL)
    schedule = {"acoustic": ScheduleConfig(until=0.5), "sft": ScheduleConfig("cosine", 0.5, 2.0)}
    settings = {"task_weights": {"ser": SER, "aqa": AQA}, "weight_schedule": schedule, "global_batch_tokens": 900}
    curves = []
    for folder, budget in (("one", 100_000), ("many", 150)):
        metrics = run.elsewhere(folder, **settings).train(micro_batch_tokens=budget)
        curves.append([(line["loss"], line["grad_norm"], *line["terms"].values()) for line in metrics])
    for one, many in zip(*curves, strict=True):
        assert one == pytest.approx(many, rel=1e-5, abs=1e-5)


def test_factors_are_numbers_where_all_samples_agree(tasked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ready(tasked(ALL), monkeypatch, task_weights={"ser": TaskWeightsConfig(top=0.25)})
    batch = given["reader"].load(next(iter(given["stream"]))).micros[0].batch
    weights = given["weights"]
    factors = weights.factors(batch, 0, lambda name: 10)
    assert factors["sft"] == 0.5 / 10 and factors["acoustic"] == 0.05 / 10
    by_sample = [0.25 / 10 if int(sample[1:]) % 3 == 0 else 0.1 for sample in batch.ids]
    counts = torch.tensor(batch.response_offsets).diff()
    if len(set(by_sample)) > 1:
        assert torch.equal(factors["top"], torch.tensor(by_sample).repeat_interleave(counts))
    else:
        assert factors["top"] == by_sample[0]
    assert weights.of("s00")["top"] == 0.25 and weights.of("s02")["top"] == 1.0, "s02 has no task"


def test_a_row_of_factor_zero_adds_nothing_even_where_it_is_infinite() -> None:
    values = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    total = weighed([values, torch.ones(3)], torch.tensor([2.0, 0.0, 1.0]))
    assert float(total.detach()) == 2 + 3 + 2 + 1
    total.backward()
    assert values.grad.tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleConfig(), [1.0, 0.75, 0.5, 0.25, 0.0]),
        (ScheduleConfig(until=0.5), [1.0, 0.5, 0.0, 0.0, 0.0]),
        (ScheduleConfig(start=0.5, end=2.0, after=0.5), [0.5, 0.5, 0.5, 1.25, 2.0]),
        (ScheduleConfig("cosine"), [1.0, 0.5 + 8**-0.5, 0.5, 0.5 - 8**-0.5, 0.0]),
        (ScheduleConfig(after=0.5, until=0.5), [1.0, 1.0, 0.0, 0.0, 0.0]),
        (ScheduleConfig(start=0.0, end=1.0, after=0.0, until=0.0), [1.0] * 5),
    ],
    ids=["linear", "half", "later", "cosine", "jump", "at once"],
)
def test_schedules(schedule: ScheduleConfig, expected: list[float]) -> None:
    assert [schedule_factor(schedule, step, 4) for step in range(5)] == pytest.approx(expected)


def test_a_schedule_moves_the_loss_and_not_the_terms(tasked: Any) -> None:
    run = tasked("SFT only")
    still = run.elsewhere("still").train(max_steps=4, learning_rate=0.0)
    moved = run.elsewhere("moved").train(max_steps=4, learning_rate=0.0, weight_schedule={"sft": ScheduleConfig()})
    for step, (plain, line) in enumerate(zip(still, moved, strict=True)):
        assert line["terms"] == plain["terms"]
        assert line["loss"] == pytest.approx((1 - step / 4) * plain["loss"], rel=1e-6)


def _with(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def test_a_term_on_for_one_task_is_cached_and_weighs_nothing_elsewhere(tasked: Any) -> None:
    run = tasked("SFT only", samples=4)
    run.config = _with(run.config, task_weights={"ser": TaskWeightsConfig(acoustic=0.3, top=0.2)})
    needs = requirements(run.ctx)
    assert needs.heard == (1, 2, 3, 4) and needs.textual is not None and not needs.lens
    terms = resolve_terms(run.config, needs)
    assert terms.weights == {"top": 0.0, "acoustic": 0.0, "sft": 1.0} and terms.on("acoustic")
    assert terms.weights_of("ser") == {"top": 0.2, "acoustic": 0.3, "sft": 1.0}
    assert terms.weights_of("aqa") == terms.weights_of(None) == terms.weights
    plan = run.plans()["cache-teachers"]
    assert {want.source for want in plan.todo} == {"textual", "acoustic"} and ("s00", "targets") in plan.fresh
    run.bring_up_to_date(CACHE_TEACHERS)
    metrics = run.train(max_steps=3, learning_rate=1e-3)
    assert set(metrics[0]["terms"]) == {"top", "acoustic", "sft"}
    assert "train: loss: 0, 0.2 for ser x textual teacher" in "\n".join(run.said)


def _changed(run: Any) -> dict[str, set[str]]:
    """By sample of the train stage, the fields of its key that differ from the student's."""
    plan = run.plans()["train"]
    found = {}
    for want in plan.todo:
        row = plan.ledger.get(want.id, "student")
        names = want.fields.keys() | row.fields.keys()
        found[want.id] = {name for name in names if want.fields.get(name) != row.fields.get(name)}
    return found


def test_keys(tasked: Any) -> None:
    run = tasked(ALL, samples=5)  # a cache of its own: other tests change the one of four samples
    run.train(max_steps=1)
    assert not _changed(run)
    plain = run.config
    run.config = _with(plain, task_weights={"ser": TaskWeightsConfig(top=1.0), "none such": SER})
    assert not _changed(run), "the same weights under another name, and a task that no sample has"
    run.config = _with(plain, weight_schedule={"sft": ScheduleConfig(start=1, end=1)})
    assert not _changed(run), "a factor that stays 1"
    run.config = _with(plain, weight_schedule={"sft": ScheduleConfig()})
    assert _changed(run) == {sample: {"objective"} for sample in ("s00", "s01", "s02", "s03", "s04")}
    run.config = _with(plain, task_weights={"ser": SER})
    assert _changed(run) == {"s00": {"weights"}, "s03": {"weights"}}
    assert not run.plans()["cache-teachers"].todo, "the teachers stay"
    STAGE.run(run.ctx, [])
    assert not _changed(run)
    manifest = run.base / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"task": "aqa"', '"task": "ser"'))
    assert _changed(run) == {"s01": {"weights"}, "s04": {"weights"}}, "samples that change their task"


def test_zero_for_every_task_is_nothing_to_learn_and_one_task_is_enough(tasked: Any) -> None:
    run = tasked("SFT only", samples=4)
    run.config = _with(run.config, weights=WeightsConfig(0, 0, 0, 0, 0), task_weights={"ser": TaskWeightsConfig(sft=1)})
    terms = resolve_terms(run.config, requirements(run.ctx))
    assert Weighting(terms, {"a": "ser", "b": None}, 1).of("a") == {"sft": 1} and not terms.weights_of(None)["sft"]


def test_a_task_that_no_sample_has_is_a_mistake() -> None:
    def sample(task: str | None) -> Sample:
        return Sample("a", (), "", (), None, task, None, None, None, None, None, None, {})

    samples = [sample("ser"), sample("aqa"), sample(None)]
    assert unknown_tasks(["ser", "aqua"], samples, "train") == [
        "train.task_weights.aqua: no sample of split 'train' has this task (there are aqa, ser); did you mean aqa?"
    ]
    assert "none: the column task is empty" in unknown_tasks(["ser"], [sample(None)], "train")[0]
