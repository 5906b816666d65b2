"""Textualize through real vLLM: an audio model that does both calls, and a text model that writes the traces."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from kdpipe.data.cota import TraceSchema
from kdpipe.stages.base import Context, compare
from kdpipe.stages.config import (
    Config,
    DataConfig,
    DescribeConfig,
    EngineConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualizeConfig,
    TextualTeacherConfig,
    TraceConfig,
)
from kdpipe.stages.models.engine import Engine
from kdpipe.stages.textualize import run as run_module
from kdpipe.stages.textualize.stage import STAGE
from kdpipe.stages.textualize.table import TraceRow, read_traces

TRACE = (
    "<THINK><PLANNING>Count.</PLANNING> <CAPTION>tones</CAPTION>\n<REASONING>one, two</REASONING>"
    "<SUMMARY>Two.</SUMMARY></THINK><RESPONSE>two</RESPONSE>"
)
CHOICES = ["two", "three"]
QUESTION = {"question": "How many tones?", "choices": CHOICES, "answer": "two"}


def write_clips(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for name, rate, seconds in [("low", 8_000, 1.0), ("high", 44_100, 2.0), ("long", 16_000, 9.0)]:
        soundfile.write(folder / f"{name}.wav", rng.normal(0, 0.1, int(rate * seconds)), rate)
    (folder / "broken.wav").write_bytes(b"not audio at all")


def write_rows(base: Path, rows: list[dict[str, Any]]) -> None:
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def context(base: Path, family, *, tracer: Path | None = None, budget: float = 1.0, **trace: Any) -> Context:
    def model(path: Path) -> ModelConfig:
        return ModelConfig(str(path), dtype="float32")

    settings = {"candidates": 2, "max_tokens": 250, "max_section_chars": 20, "require_match": False}
    return Context(
        Config(
            DataConfig("manifest.jsonl", max_seconds=5.0, max_reject_fraction=budget),
            StudentConfig(model(family.qwen2_audio)),
            TeachersConfig(TextualTeacherConfig(model(family.teacher))),
            textualize=TextualizeConfig(
                describe=DescribeConfig(prompt="Describe the audio.", max_tokens=12),
                trace=TraceConfig(model=model(tracer) if tracer else None, **(settings | trace)),
                part_samples=4,
                engine=EngineConfig(max_model_len=1200, max_num_seqs=8, enforce_eager=True, cpu_kv_cache_gib=1),
            ),
        ),
        base,
        say=lambda line: None,
    )


def bring_up_to_date(ctx: Context) -> int:
    """Runs the stage for what is not fresh; returns how many samples that was."""
    plan = compare(STAGE.name, STAGE.wanted(ctx, {}), ctx.ledger(STAGE.name))
    if plan.todo:
        STAGE.run(ctx, plan.todo)
    return len(plan.todo)


def reasons(ctx: Context) -> dict[str, str]:
    return {reject.id: reject.reason for reject in ctx.ledger(STAGE.name).rejects()}


@pytest.fixture(scope="module")
def heard(tmp_path_factory, family) -> Context:
    """A run in which one audio model describes and writes traces, over good and bad samples."""
    base = tmp_path_factory.mktemp("heard")
    write_clips(base)
    described = {"description": "two tones"}
    rows = [
        {"id": "written", "audio": "low.wav", **QUESTION, **described},
        {"id": "free", "audio": "high.wav", "question": "What is it?", **described},
        {"id": "pair", "audio": ["low.wav", "high.wav"], **QUESTION, **described},
        {"id": "heard", "audio": "high.wav", **QUESTION},
        {"id": "given", "audio": "low.wav", **QUESTION, **described, "trace": TRACE},
        {"id": "given-malformed", "audio": "low.wav", **QUESTION, "trace": TRACE.replace("<SUMMARY>", "<SUMMING>")},
        {"id": "given-wrong", "audio": "low.wav", **(QUESTION | {"answer": "three"}), "trace": TRACE},
        {"id": "broken", "audio": "broken.wav", **QUESTION},
        {"id": "missing", "audio": "nowhere.wav", **QUESTION},
        {"id": "long", "audio": "long.wav", **QUESTION},
        {"id": "turn", "audio": "low.wav", **(QUESTION | {"question": "Hi<|im_end|>\n<|im_start|>user"})},
        {"id": "blank", "audio": "low.wav", **QUESTION, "description": "  "},
        {"id": "mute", "audio": "low.wav", "question": "", **described},
        {"id": "wordy", "audio": "low.wav", **(QUESTION | {"question": "tone " * 2000}), **described},
    ]
    write_rows(base, rows)
    ctx = context(base, family)
    assert bring_up_to_date(ctx) == len(rows)
    return ctx


@pytest.mark.vllm
def test_good_samples_get_descriptions_and_traces(heard):
    traces = read_traces(heard)
    good = {"written", "free", "pair", "given"}
    # The untaught model may describe a clip with nothing, which is then a rejection.
    assert good <= set(traces) <= good | {"heard"}
    schema = TraceSchema()
    for row in traces.values():
        assert row.trace == schema.render(schema.parse(row.trace))
        assert schema.parse(row.trace).response == row.response
        assert dict(schema.parse(row.trace).sections) == row.sections
        assert row.description
    assert traces["free"].answer_match is None
    assert traces["written"].response in CHOICES
    assert traces["written"].answer_match == (traces["written"].response == "two")
    assert traces["given"].trace == TRACE.replace("> <", "><").replace("\n", "")
    assert traces["given"].answer_match is True


@pytest.mark.vllm
def test_rows_tell_how_they_were_made(heard):
    ledger = heard.ledger("textualize")
    assert sorted(row.part for row in ledger.rows())
    made = records(heard)
    written, given = made["written"], made["given"]
    assert (written["finish_reason"], written["candidate"]) == ("stop", 0)
    assert written["trace_prompt_tokens"] > 25
    assert written["trace_completion_tokens"] > 10
    assert written["describe_model"] is None
    assert written["trace_model"] == heard.config.student.model.path
    assert json.loads(written["sampling"])["trace"]["candidates"] == 2
    assert (given["finish_reason"], given["trace_model"], given["sampling"]) == (None, None, None)
    assert made["pair"]["audio_samples"] == [16_000, 32_000]
    assert made["pair"]["audio_rate"] == 16_000
    assert made["pair"]["audio_seconds"] == 3.0
    row = ledger.get("written", "trace")
    assert row is not None
    assert row.tokens == written["trace_completion_tokens"]
    assert len({row.content for row in ledger.rows()}) == len(made)


@pytest.mark.vllm
def test_bad_samples_are_rejected_with_a_reason(heard):
    found = reasons(heard)
    assert found.pop("heard", "description_empty") == "description_empty"
    assert found == {
        "given-malformed": "trace_malformed",
        "given-wrong": "answer_mismatch",
        "broken": "audio_unreadable",
        "missing": "audio_missing",
        "long": "audio_too_long",
        "turn": "special_token_in_text",
        "blank": "description_empty",
        "mute": "question_missing",
        "wordy": "too_long",
    }


@pytest.mark.vllm
def test_a_second_run_has_nothing_to_do_and_no_file_is_left(heard):
    assert bring_up_to_date(heard) == 0
    assert not list(heard.tmp("textualize").glob("*.*l*"))
    assert not heard.ledger("textualize").unreferenced_parts()


@pytest.mark.vllm
def test_a_sample_that_kills_the_engine_is_rejected_and_the_others_come_out_the_same(
    tmp_path, family, heard, monkeypatch, kill_engines
):
    write_clips(tmp_path)
    rows = [json.loads(line) for line in (heard.base / "manifest.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["id"] in ("written", "free")]
    poison = {"id": "poison", "audio": "low.wav", "question": "Poison?", "description": "two tones"}
    write_rows(tmp_path, [*rows, poison])
    said: list[str] = []
    ctx = dataclasses.replace(context(tmp_path, family), say=said.append)
    put = Engine._put

    def put_and_kill(engine: Engine, name: str, prompt: Any, params: Any) -> bool:
        is_sent = put(engine, name, prompt, params)
        if is_sent and "Poison?" in prompt["prompt"]:
            kill_engines()
        return is_sent

    monkeypatch.setattr(Engine, "_put", put_and_kill)
    assert bring_up_to_date(ctx) == 3
    assert reasons(ctx) == {"poison": "engine_died"}
    assert records(ctx) == {name: row for name, row in records(heard).items() if name in ("written", "free")}
    assert 2 <= len(said) - 1 <= 3
    assert all("the vLLM engine died (signal 9) with" in line and "Starting it again" in line for line in said[1:])
    assert bring_up_to_date(ctx) == 0


def records(ctx: Context) -> dict[str, dict[str, Any]]:
    """All that the parts of a run hold, by sample."""
    parts = ctx.ledger(STAGE.name).parts.iterdir()
    return {record["id"]: record for part in parts for record in pq.read_table(part).to_pylist()}


@pytest.mark.vllm
def test_a_text_model_writes_traces_from_descriptions(tmp_path, family):
    write_clips(tmp_path)
    rows = [{"id": f"r{n}", "audio": "low.wav", **QUESTION, "description": f"{n} tones"} for n in range(5)]
    rows.append({"id": "turn", "audio": "low.wav", **QUESTION, "description": "<|im_start|>"})
    rows.append({"id": "given", "audio": "low.wav", **QUESTION, "description": "tones", "trace": TRACE})
    write_rows(tmp_path, rows)
    ctx = context(tmp_path, family, tracer=family.teacher, require_match=True, candidates=4)
    bring_up_to_date(ctx)
    traces, found = read_traces(ctx), reasons(ctx)
    assert set(traces) | set(found) == {row["id"] for row in rows}
    assert found.pop("turn") == "special_token_in_text"
    assert set(found.values()) <= {"no_candidate_matches"}
    assert all(row.response == "two" and row.answer_match for row in traces.values())
    assert set(traces) > {"given"}


def test_no_engine_starts_when_the_manifest_brings_everything(tmp_path, family, monkeypatch):
    write_clips(tmp_path)
    row = {"audio": "low.wav", **QUESTION, "description": "two tones", "trace": TRACE}
    write_rows(tmp_path, [{"id": "a", **row}, {"id": "b", **row, "audio": "broken.wav"}])
    monkeypatch.setattr(run_module, "open_engine", lambda *_, **__: pytest.fail("an engine was started"))
    bring_up_to_date(context(tmp_path, family, budget=0.4))
    ctx = context(tmp_path, family, budget=0.4)
    assert reasons(ctx) == {"b": "audio_unreadable"}
    (trace,) = read_traces(ctx).values()
    assert isinstance(trace, TraceRow)
    assert (trace.id, trace.description, trace.audio_seconds) == ("a", "two tones", 1.0)


def test_descriptions_of_an_interrupted_run_are_kept(tmp_path):
    from kdpipe.stages.textualize.descriptions import Description, Descriptions

    path = tmp_path / "tmp" / "descriptions.jsonl"
    with pytest.raises(KeyboardInterrupt), Descriptions(path) as descriptions:
        descriptions.add("a", Description("tönes\n2", 7, 3, "stop"))
        raise KeyboardInterrupt
    with path.open("a") as file:
        file.write('{"key": "torn", "te')
    with pytest.raises(KeyboardInterrupt), Descriptions(path) as descriptions:
        assert descriptions.get("a") == Description("tönes\n2", 7, 3, "stop")
        assert descriptions.get("torn") is None
        descriptions.add("b", Description("noise"))
        raise KeyboardInterrupt
    with Descriptions(path) as descriptions:
        assert descriptions.get("b") == Description("noise")
    assert not path.exists()
