"""The evaluate stage's keys: what makes an answer stale, and when the student's are pending."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kdpipe.stages.base import Context, StagePlan, Wanted, compare
from kdpipe.stages.config import (
    Config,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
)
from kdpipe.stages.evaluate.stage import STAGE


@pytest.fixture
def base(tmp_path):
    rows = [{"id": name, "audio": f"{name}.wav", "question": "How many?", "split": "test"} for name in "ab"]
    rows.append({"id": "t", "audio": "a.wav", "question": "How many?"})
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in "ab":
        (tmp_path / f"{name}.wav").write_bytes(name.encode())
    (tmp_path / "student").mkdir()
    text = {"num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 8}
    (tmp_path / "student" / "config.json").write_text(json.dumps({"model_type": "qwen2_audio", "text_config": text}))
    return tmp_path


def context(folder: Path, student: StudentConfig | None = None, **evaluate: Any) -> Context:
    config = Config(
        DataConfig("manifest.jsonl"),
        student or StudentConfig(ModelConfig("student")),
        TeachersConfig(TextualTeacherConfig(ModelConfig("teacher"))),
        evaluate=EvaluateConfig(**evaluate),
    )
    return Context(config, folder)


def trained(ctx: Context, *, key: str = "one", done: bool = True, removed: bool = False) -> dict[str, StagePlan]:
    wanted = [Wanted("t", "student", {"objective": key})]
    plan = compare("train", wanted, ctx.ledger("train"))
    plan = dataclasses.replace(plan, todo=[] if done else wanted, removed=[("gone", "student")] if removed else [])
    return {"train": plan}


def keys(ctx: Context, plans: dict[str, StagePlan]) -> dict[tuple[str, str], str]:
    return {(want.source, want.id): want.key for want in STAGE.wanted(ctx, plans)}


def test_base_and_student_are_wanted_for_the_split(base):
    ctx = context(base)
    wants = STAGE.wanted(ctx, trained(ctx))
    assert [(want.source, want.id) for want in wants] == [
        ("base", "a"),
        ("base", "b"),
        ("student", "a"),
        ("student", "b"),
    ]
    assert all(want.pending is None for want in wants)
    assert len({want.key for want in wants}) == 4
    alone = context(base, base=False)
    assert {want.source for want in STAGE.wanted(alone, trained(alone))} == {"student"}


@pytest.mark.parametrize("how", [{"done": False}, {"removed": True}])
def test_the_student_waits_for_its_training(base, how):
    ctx = context(base)
    wants = STAGE.wanted(ctx, trained(ctx, **how))
    assert {(want.source, want.pending) for want in wants} == {("base", None), ("student", "train")}


def test_another_training_stales_the_student_alone(base):
    ctx = context(base)
    before, after = keys(ctx, trained(ctx)), keys(ctx, trained(ctx, key="two"))
    assert {pair[0] for pair in before if before[pair] != after[pair]} == {"student"}


def test_a_changed_clip_stales_its_answers_alone(base):
    before = keys(context(base), trained(context(base)))
    (base / "a.wav").write_bytes(b"other")
    after = keys(context(base), trained(context(base)))
    assert {pair for pair in before if before[pair] != after[pair]} == {("base", "a"), ("student", "a")}


def test_settings_are_told_apart(base):
    before = keys(context(base), trained(context(base)))

    def differ(ctx: Context) -> bool:
        after = keys(ctx, trained(ctx))
        return {pair for pair in before if before[pair] != after[pair]} == set(before)

    prompted = StudentConfig(ModelConfig("student"), prompt="{question}!")
    for ctx in (context(base, top_k=1), context(base, seed=3), context(base, max_tokens=9), context(base, prompted)):
        assert differ(ctx)
    assert differ(context(base, engine=EngineConfig(max_model_len=99)))
    same = context(base, part_samples=2, engine=EngineConfig(max_num_seqs=2, enforce_eager=True))
    assert keys(same, trained(same)) == before
