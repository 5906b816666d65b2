"""The textualize stage's keys: what makes a sample stale and what does not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kdpipe.stages.base import Context, Wanted
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
from kdpipe.stages.textualize.stage import STAGE

TRACE = "<THINK><PLANNING>p</PLANNING></THINK><RESPONSE>two</RESPONSE>"
ROWS: list[dict[str, Any]] = [
    {"id": "made", "audio": "a.wav", "question": "How many?", "answer": "two"},
    {"id": "traced", "audio": "a.wav", "question": "How many?", "answer": "two", "trace": TRACE},
    {"id": "described", "audio": "b.wav", "question": "How many?", "description": "tones"},
    {"id": "both", "audio": "b.wav", "question": "How many?", "description": "tones", "trace": TRACE},
    {"id": "test", "audio": "b.wav", "question": "How many?", "split": "test"},
]


def write_rows(base: Path, rows: list[dict[str, Any]]) -> None:
    (base / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_model(folder: Path, weights: bytes = b"w") -> None:
    folder.mkdir(exist_ok=True)
    text = {"num_hidden_layers": 2, "hidden_size": 4, "vocab_size": 8}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_audio", "text_config": text}))
    (folder / "model.safetensors").write_bytes(weights)


@pytest.fixture
def base(tmp_path):
    write_rows(tmp_path, ROWS)
    (tmp_path / "a.wav").write_bytes(b"a")
    (tmp_path / "b.wav").write_bytes(b"b")
    write_model(tmp_path / "student")
    write_model(tmp_path / "tracer")
    return tmp_path


def config(**textualize: Any) -> Config:
    return Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(ModelConfig("student")),
        TeachersConfig(TextualTeacherConfig(ModelConfig("teacher"))),
        textualize=TextualizeConfig(**textualize),
    )


def wants(base: Path, settings: Config | None = None) -> dict[str, Wanted]:
    return {want.id: want for want in STAGE.wanted(Context(settings or config(), base), {})}


def stale(base: Path, settings: Config, before: dict[str, Wanted]) -> set[str]:
    return {name for name, want in wants(base, settings).items() if want.key != before[name].key}


def test_a_want_has_the_fields_of_what_is_made(base):
    found = wants(base)
    assert list(found) == ["made", "traced", "described", "both"]
    assert all(want.source == "trace" and want.pending is None for want in found.values())
    describe = {"describe.model", "describe.prompt", "describe.sampling"}
    trace = {"trace.model", "trace.prompt", "trace.sampling", "seed"}
    common = {"version", "audio", "span", "question", "choices", "answer", "schema", "limits"}
    assert set(found["made"].fields) == common | describe | trace
    assert set(found["traced"].fields) == common | {"given"} | describe
    assert set(found["described"].fields) == common | {"given"} | trace
    assert set(found["both"].fields) == common | {"given"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (config(describe=DescribeConfig(prompt="What?")), {"made", "traced"}),
        (config(describe=DescribeConfig(max_tokens=5)), {"made", "traced"}),
        (config(describe=DescribeConfig(temperature=0.5)), {"made", "traced"}),
        (config(trace=TraceConfig(prompt="{question}")), {"made", "described"}),
        (config(trace=TraceConfig(chat_template_kwargs={"enable_thinking": False})), {"made", "described"}),
        (config(trace=TraceConfig(candidates=9)), {"made", "described"}),
        (config(trace=TraceConfig(model=ModelConfig("tracer", dtype="float32"))), {"made", "described"}),
        (config(seed=1), {"made", "described"}),
        (config(seed=1, trace=TraceConfig(temperature=0.0)), {"made", "described"}),
        (config(trace=TraceConfig(sections=("PLANNING",))), {"made", "traced", "described", "both"}),
        (config(engine=EngineConfig(max_model_len=99)), {"made", "traced", "described"}),
        (config(engine=EngineConfig(max_num_seqs=1, enforce_eager=True, cpu_kv_cache_gib=9)), set()),
        (config(part_samples=1), set()),
    ],
)
def test_a_setting_stales_what_depends_on_it(base, settings, expected):
    assert stale(base, settings, wants(base)) == expected


def test_a_tracer_named_as_the_describer_is_changes_nothing(base):
    assert stale(base, config(trace=TraceConfig(model=ModelConfig("student"))), wants(base)) == set()


def test_greedy_work_does_not_depend_on_the_seed(base):
    greedy = TraceConfig(temperature=0.0)
    before = wants(base, config(trace=greedy))
    assert stale(base, config(trace=greedy, seed=7), before) == set()


def test_a_changed_clip_or_word_stales_its_samples_alone(base):
    before = wants(base)
    (base / "a.wav").write_bytes(b"another")
    assert stale(base, config(), before) == {"made", "traced"}
    (base / "a.wav").write_bytes(b"a")
    for change, expected in [
        ({"question": "Why?"}, {"made"}),
        ({"answer": "one"}, {"made"}),
        ({"start": 1.0}, {"made"}),
    ]:
        write_rows(base, [ROWS[0] | change, *ROWS[1:]])
        assert stale(base, config(), before) == expected
    write_rows(base, [ROWS[0], ROWS[1], ROWS[2] | {"description": "noise"}, ROWS[3]])
    assert stale(base, config(), before) == {"described"}


def test_a_missing_clip_has_a_key_of_its_own(base):
    before = wants(base)
    (base / "a.wav").unlink()
    assert stale(base, config(), before) == {"made", "traced"}


def test_new_weights_stale_what_the_model_writes(base):
    before = wants(base)
    write_model(base / "student", b"other weights")
    assert stale(base, config(), before) == {"made", "traced", "described"}


def test_a_moved_run_keeps_its_keys(base, tmp_path_factory):
    before = wants(base)
    moved = tmp_path_factory.mktemp("elsewhere") / "run"
    base.rename(moved)
    assert {name: want.key for name, want in wants(moved).items()} == {name: w.key for name, w in before.items()}
    moved.rename(base)


def test_no_model_is_looked_for_when_the_manifest_brings_everything(base):
    write_rows(base, [ROWS[3]])
    settings = dataclasses.replace(config(), student=StudentConfig(ModelConfig("./nowhere")))
    assert list(wants(base, settings)) == ["both"]


def test_the_stages_are_light():
    code = (
        "import sys, kdpipe.stages.textualize.stage, kdpipe.stages.textualize.table, kdpipe.stages.evaluate.stage, "
        "kdpipe.stages.evaluate.scores\n"
        "heavy = {'torch', 'vllm', 'transformers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
