"""Evaluate through real vLLM: the student answers, bad clips are rejected, scores are written."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from kdpipe.stages.base import Context, Wanted, compare
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


@pytest.mark.vllm
def test_the_student_answers_and_is_scored(tmp_path, family):
    rng = np.random.default_rng(0)
    for name, rate in (("low", 8_000), ("high", 44_100)):
        soundfile.write(tmp_path / f"{name}.wav", rng.normal(0, 0.1, rate), rate)
    (tmp_path / "broken.wav").write_bytes(b"not audio")
    common = {"question": "How many tones?", "split": "test"}
    rows = [
        {"id": "a", "audio": "low.wav", "answer": "two", "choices": ["two", "three"], "task": "count", **common},
        {"id": "b", "audio": "high.wav", "answer": "two", "task": "free", **common},
        {"id": "c", "audio": ["low.wav", "high.wav"], **common},
        {"id": "d", "audio": "broken.wav", "answer": "two", **common},
    ]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(family.qwen2_audio, tmp_path / "train" / "student")
    config = Config(
        DataConfig("manifest.jsonl", max_reject_fraction=0.5),
        StudentConfig(ModelConfig(str(family.qwen2_audio), dtype="float32")),
        TeachersConfig(TextualTeacherConfig(ModelConfig(str(family.teacher)))),
        evaluate=EvaluateConfig(
            base=False,
            max_tokens=16,
            part_samples=3,
            engine=EngineConfig(max_model_len=1200, max_num_seqs=4, enforce_eager=True, cpu_kv_cache_gib=1),
        ),
    )
    said: list[str] = []
    ctx = Context(config, tmp_path, say=said.append)
    plan = compare("train", [Wanted("t", "student", {"objective": "x"})], ctx.ledger("train"))
    plans = {"train": dataclasses.replace(plan, todo=[])}
    todo = compare(STAGE.name, STAGE.wanted(ctx, plans), ctx.ledger(STAGE.name)).todo
    assert [want.id for want in todo] == ["a", "b", "c", "d"]
    STAGE.run(ctx, todo)

    after = compare(STAGE.name, STAGE.wanted(ctx, plans), ctx.ledger(STAGE.name))
    assert (len(after.fresh), len(after.rejected), after.todo) == (3, 1, [])
    folder = ctx.folder("evaluate")
    scores = json.loads((folder / "scores.json").read_text())
    assert "base" not in scores
    assert {name: scores["student"][name] for name in ("n", "unscored", "rejected")} == {
        "n": 2,
        "unscored": 1,
        "rejected": 1,
    }
    assert set(scores["student"]["by_task"]) == {"count", "free"}
    answers = pq.read_table(folder / "predictions.parquet").to_pylist()
    assert [answer["id"] for answer in answers] == ["a", "b", "c"]
    assert all(answer["tokens"] > 0 and answer["finish_reason"] in ("stop", "length") for answer in answers)
    assert answers[2]["correct"] is None
    assert any(line.startswith("task") for line in said)
