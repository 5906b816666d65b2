"""What makes which source of which sample stale. Nothing is loaded here but what `made` needs once."""

import dataclasses
import gc
import tracemalloc

import numpy as np
import pytest
import soundfile

from kdpipe.stages.base import compare
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import LayersConfig, TrainConfig, WeightsConfig


def stale_sources(run):
    return {source for _, source in run.stale()}


def test_a_finished_run_is_fresh_wherever_it_lies(made, tmp_path):
    assert made.stale() == []
    assert made.copy(tmp_path / "elsewhere").stale() == []


def test_what_is_planned_takes_little_memory(made, rows, tmp_path):
    run = made.copy(tmp_path / "copy")
    held = []
    for count in (200, 1000):
        run.write_manifest([rows[0] | {"id": f"x{n}", "question": f"How many ({n})?"} for n in range(count)])
        run.textualize()
        run.again().plan()
        gc.collect()
        tracemalloc.start()
        again = run.again()
        todo = again.plan().todo
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(todo) == 4 * count and again.ctx.manifest.samples
    each = (held[1] - held[0]) / 800
    assert each < 2400, f"{each:.0f} bytes a sample for its row of the manifest and four wants"


def test_what_a_question_changes(made, rows, tmp_path):
    run = made.copy(tmp_path / "copy")
    run.write_manifest([row | ({"question": "Really?"} if row["id"] == "s1" else {}) for row in rows])
    assert run.stale() == [("s1", "acoustic_top"), ("s1", "targets"), ("s1", "textual")]


def test_what_a_clip_changes(made, tmp_path):
    run = made.copy(tmp_path / "copy")
    soundfile.write(run.base / "c.ogg", 0.2 * np.random.default_rng(1).normal(size=8000), 8000)
    assert run.stale() == [("s4", "acoustic"), ("s4", "acoustic_top"), ("s4", "targets")]


def test_what_a_trace_changes(made, rows, tmp_path):
    run = made.copy(tmp_path / "copy")
    run.write_manifest([row | ({"n": 9} if row["id"] == "s2" else {}) for row in rows])
    assert run.stale() == [("s2", "acoustic_top"), ("s2", "targets"), ("s2", "textual")]


@pytest.mark.parametrize("changes", [{"prompt": "{question} {description}"}, {"system": "Think."}, {"model": None}])
def test_what_the_textual_teacher_changes(made, changes):
    textual = made.ctx.config.teachers.textual
    if "model" in changes:
        changes = {"model": dataclasses.replace(textual.model, dtype="bfloat16")}
    teachers = made.teachers(textual=dataclasses.replace(textual, **changes))
    assert stale_sources(made.again(teachers=teachers)) == {"textual"}


def test_what_the_students_prompt_changes(made):
    student = dataclasses.replace(made.ctx.config.student, prompt="{question}")
    assert stale_sources(made.again(student=student)) == {"targets", "acoustic_top"}
    student = dataclasses.replace(made.ctx.config.student, system="Listen.")
    assert stale_sources(made.again(student=student)) == {"targets", "acoustic", "acoustic_top"}


def test_how_it_is_run_changes_nothing(made):
    teachers = made.teachers(batch_tokens=9, head_chunk=3, part_samples=1, device="auto")
    data = dataclasses.replace(made.ctx.config.data, max_reject_fraction=0.9)
    assert made.again(teachers=teachers, data=data).stale() == []


def test_less_is_served_and_more_is_made_without_losing_anything(made, tmp_path):
    run = made.copy(tmp_path / "copy")
    assert run.again(teachers=run.teachers(k=4, temperatures=()), layers=LayersConfig("top")).stale() == []
    assert stale_sources(run.again(teachers=run.teachers(k=9))) == {"textual", "acoustic_top"}
    more = run.again(teachers=run.teachers(temperatures=(3.0,)), layers=LayersConfig("map", map={1: 1}))
    assert stale_sources(more) == {"textual", "acoustic_top"}
    more.bring_up()
    assert run.again().stale() == []
    expected = {"k": 8, "mass": 1.0, "min_k": 8, "temperatures": [1.0, 2.0, 3.0], "lens": [1, 2, 3, 5]}
    assert run.ledger.get("s1", "textual").cover == expected


def test_draws_serve_the_k_they_were_made_for(made, tmp_path):
    run = made.copy(tmp_path / "copy")
    drawing = run.again(teachers=run.teachers(draws=4))
    assert stale_sources(drawing) == {"textual", "acoustic_top"}
    drawing.bring_up()
    assert drawing.ledger.get("s1", "textual").cover["draws"] == {"count": 4, "k": 8}
    assert run.again().stale() == run.again(teachers=run.teachers(k=4)).stale() == []
    for other in ({"draws": 3}, {"draws": 5}, {"draws": 4, "k": 4}, {"draws": 4, "k": 9}):
        assert stale_sources(run.again(teachers=run.teachers(**other))) == {"textual", "acoustic_top"}, other

    def drawn(source, prefix="top"):
        part, row = run.store.get("s2", source)
        return part.distribution(row, prefix, k=8, temperatures=[1.0, 2.0], draws=True).draws

    before = [drawn("textual"), drawn("textual", "lens/03"), drawn("acoustic_top")]
    run.again(teachers=run.teachers(k=9, temperatures=(1.5, 2.0))).bring_up()
    assert drawing.again().stale() == []
    after = [drawn("textual"), drawn("textual", "lens/03"), drawn("acoustic_top")]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
    run.again(teachers=run.teachers(draws=4, k=4)).bring_up()
    assert run.ledger.get("s1", "textual").cover["k"] == 9
    assert stale_sources(drawing.again()) == {"textual", "acoustic_top"}


def test_sources_follow_the_weights(made):
    def sources(**weights):
        off = {"top": 0.0, "layer": 0.0, "acoustic": 0.0, "acoustic_top": 0.0}
        return made.again(train=TrainConfig(weights=WeightsConfig(**(off | weights)))).needs.sources

    assert sources() == ("targets",)
    assert sources(layer=1.0) == sources(top=1.0) == ("targets", "textual")
    assert sources(acoustic=1.0) == ("targets", "acoustic")
    assert sources(acoustic_top=1.0) == ("targets", "acoustic_top")
    hidden = made.again(layers=LayersConfig("skip", 2, match="hidden")).needs
    assert hidden.hidden == (3, 6) and hidden.lens == ()
    assert made.again(layers=LayersConfig("all")).needs.lens == (2, 3, 5)


def test_a_sample_waits_for_textualize_or_is_left_out_when_that_rejected_it(made, tmp_path):
    run = made.copy(tmp_path / "copy")
    upstream = run.textualize()
    waiting = dataclasses.replace(upstream, fresh=upstream.fresh - {("s1", "trace")})
    plan = compare(STAGE.name, STAGE.wanted(run.ctx, {"textualize": waiting}), run.ledger)
    assert {(want.id, want.pending) for want in plan.todo} == {("s1", "textualize")}
    assert len(plan.todo) == 4
    rejected = dataclasses.replace(waiting, rejected=frozenset({("s1", "trace")}))
    wanted = STAGE.wanted(run.ctx, {"textualize": rejected})
    assert {want.id for want in wanted} == {"s2", "s3", "s4"}


def test_a_lost_part_is_made_again_and_nothing_else(made, tmp_path):
    import shutil

    run = made.copy(tmp_path / "copy")
    part = run.ledger.get("s1", "targets").part
    shutil.rmtree(run.ledger.parts / part)
    assert stale_sources(run) == {"targets"}
    run.bring_up()
    assert run.ledger.get("s1", "targets").part == part
