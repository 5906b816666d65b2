"""How long teachers take: counted, remembered, and measured where nothing is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kdpipe.stages.cache_teachers.cost import speed
from kdpipe.stages.cache_teachers.cost.estimate import estimate
from kdpipe.stages.cache_teachers.cost.speed import Work, device_name, duration, parameters, record_speed
from kdpipe.stages.models.loaded import load_model


@pytest.fixture
def run(begin: Callable[..., Any], tmp_path: Any) -> Any:
    return begin(tmp_path / "run")


def test_weights_are_those_of_the_loaded_model(run: Any) -> None:
    student = run.needs.student
    loaded = load_model(student, device="cpu")
    named = dict(loaded.model.named_parameters())
    tower = sum(p.numel() for name, p in named.items() if "audio_tower." in name)
    apart = sum(p.numel() for name, p in named.items() if "embed_tokens" in name or "lm_head" in name)
    apart += sum(p.numel() for name, p in named.items() if "visual." in name)
    assert parameters(student.path) == (sum(p.numel() for p in named.values()) - apart - tower, tower)


def test_work_is_two_operations_a_weight(run: Any) -> None:
    student = run.needs.student
    body, tower = parameters(student.path)
    head = student.head_rows * student.width
    assert Work(7, 5, 3).flop(student) == 2 * (7 * body + 5 * head + 3 * tower)


def test_history_comes_before_arithmetic(run: Any, monkeypatch: Any) -> None:
    teacher, work = run.needs.textual, Work(1000, 500)
    monkeypatch.setattr(speed, "_multiply_speed", lambda device, dtype: work.flop(teacher) / 5)
    rough = duration(run.ctx, "textual", teacher, work)
    assert (rough.rough, rough.seconds) == (True, pytest.approx(5))
    record_speed(run.ctx, "textual", teacher, 1000, 20.0, head_rows=500)
    known = duration(run.ctx, "textual", teacher, work)
    assert (known.rough, known.seconds, known.device) == (False, pytest.approx(20), device_name(run.ctx, "textual"))
    double = Work(2000, 1000)
    assert duration(run.ctx, "textual", teacher, double).seconds == pytest.approx(40)
    assert duration(run.ctx, "acoustic_top", teacher, work).rough, "another source"
    assert duration(run.ctx, "textual", run.needs.student, work).rough, "another teacher"
    other = run.again(teachers=run.teachers(tensor_parallel_size=2))
    assert duration(other.ctx, "textual", teacher, work).rough, "another device"


def test_what_was_last_counts_most(run: Any) -> None:
    teacher = run.needs.textual
    for seconds in [100.0] * 3 + [10.0] * 200:
        record_speed(run.ctx, "textual", teacher, 1000, seconds)
    assert duration(run.ctx, "textual", teacher, Work(1000)).seconds == pytest.approx(10, rel=0.01)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1, "speeds": 3}', '{"format": 1, "speeds": {"textual": 3}}'])
def test_a_damaged_memory_is_none(run: Any, text: str) -> None:
    file = run.ctx.tmp("cache-teachers") / "speed.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    duration(run.ctx, "textual", run.needs.textual, Work(10))
    record_speed(run.ctx, "textual", run.needs.textual, 10, 1.0)
    record_speed(run.ctx, "acoustic", run.needs.acoustic, 0, 1.0)


def test_an_estimate_has_a_time_for_each_teacher(run: Any) -> None:
    plan = run.plan()
    times = estimate(run.ctx, plan, run.needs).times
    assert times.keys() == {"textual", "acoustic", "acoustic_top"}
    assert all(took.seconds > 0 and took.rough for took in times.values())
