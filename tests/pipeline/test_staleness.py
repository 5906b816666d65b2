"""Every field of the configuration and every input file, and what it makes stale: the table in docs/staleness.md.

A run of four samples whose ledgers say that everything is done (nothing is computed); then one thing is changed at a
time. `KDPIPE_STALENESS=write pytest tests/pipeline/test_staleness.py` writes the table anew; look at the difference.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import typing
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import yaml

from kdpipe.data.errors import KdpipeError
from kdpipe.data.ledger_rows import Row
from kdpipe.pipeline.lock_file import write_lock_file
from kdpipe.pipeline.plan import STAGES, make_plans, why
from kdpipe.stages.base import Context
from kdpipe.stages.config import (
    AcousticTeacherConfig,
    Config,
    DataConfig,
    DescribeConfig,
    LayersConfig,
    LoraConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualizeConfig,
    TextualTeacherConfig,
    TraceConfig,
    TrainConfig,
    WeightsConfig,
)
from kdpipe.stages.config_train import ScheduleConfig, TaskWeightsConfig
from kdpipe.stages.environment import environment

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

PAGE = Path(__file__).parents[2] / "docs" / "staleness.md"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"

OTHER: dict[str, Any] = {
    "data.manifest": "copy.jsonl",
    "data.train_split": "test",
    "data.eval_split": "train",
    "run.folder": "./.",
    "run.cache": ".",
    "student.system": "Listen.",
    "textualize.trace.sections": ("PLANNING", "SUMMARY"),
    "textualize.trace.chat_template_kwargs": {"enable_thinking": False},
    "teachers.textual.system": "Read.",
    "teachers.textual.chat_template_kwargs": {"enable_thinking": False},
    "teachers.temperatures": (1.0, 2.0),
    "teachers.k": 90,
    "teachers.mass": 0.995,
    "teachers.max_length": 4000,
    "layers.map": {2: 3},
    "train.task_weights": {"ser": TaskWeightsConfig(sft=2.0)},
    "train.weight_schedule": {"sft": ScheduleConfig()},
    "train.betas": (0.8, 0.9),
    "train.max_steps": 7,
    "train.freeze": ("audio_tower",),
    "train.lora.targets": ("q_proj",),
    "train.log_to": ("tensorboard",),
    "evaluate.model": ModelConfig("models/student-other", dtype="float32"),
}
"""Values for fields that no rule gives another value of."""

LEFT_OUT = {"evaluate.model"}
"""Sections that the run does not have: each is changed as a whole."""

INACTIVE = "nothing here"


def fields(section: type, prefix: str = "") -> Iterator[tuple[str, Any, bool]]:
    """All fields below a section: name, type, and whether they are execution."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        kinds = [kind for kind in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(kind)]
        if kinds and typing.get_origin(hint) is not Mapping and name not in LEFT_OUT:
            yield from fields(typing.cast(type, kinds[0]), f"{name}.")
        else:
            yield name, hint, bool(field.metadata.get("execution"))


def changed(config: Any, name: str, hint: Any, models: Mapping[str, str]) -> Any:
    """The configuration with another value at `name`."""

    def at(section: Any, path: list[str]) -> Any:
        head, *rest = path
        value = getattr(section, head)
        return replace(section, **{head: at(value, rest) if rest else other(value)})

    def other(value: Any) -> Any:
        if name in OTHER:
            return OTHER[name]
        if name.endswith("model.path"):
            return models[value]
        choices = [
            c
            for kind in (hint, *typing.get_args(hint))
            if typing.get_origin(kind) is typing.Literal
            for c in typing.get_args(kind)
        ]
        if choices:
            return next(choice for choice in choices if choice != value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return value + 1
        if isinstance(value, float):
            return value * 0.9 if value else 0.1
        if isinstance(value, str):
            return f"{value} Please."
        if value is None and str in typing.get_args(hint):
            return "main"
        if value is None:
            return 0.5
        raise AssertionError(f"{name}: say in OTHER what else it could be")

    return at(config, name.split("."))


@pytest.fixture(scope="module")
def done(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path, dict[str, str]]:
    """A run that is done, its folder, and for each model a copy whose weights and tokenizer differ."""
    base = tmp_path_factory.mktemp("staleness")
    models = {}
    for name in ("describer", "tracer", "student", "acoustic", "textual"):
        source = family.teacher if name in ("textual", "tracer") else family.qwen2_5_omni
        for kind in ("", "-other"):
            shutil.copytree(source, base / "models" / f"{name}{kind}")
        card = base / "models" / f"{name}-other" / "config.json"
        card.write_text(card.read_text() + "\n")
        models[f"models/{name}"] = f"models/{name}-other"
    rng = np.random.default_rng(0)
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(base / name, rng.normal(0, 0.05, 4000), 16000)
    given = {"description": "one tone", "trace": "<THINK></THINK><RESPONSE>1</RESPONSE>"}
    rows = [
        {"id": "given", "audio": "a.wav", "question": "How many?", "task": "ser", **given},
        {"id": "asked", "audio": "b.wav", "question": "How many?", "choices": ["1", "2"], "answer": "1"},
        {"id": "test", "audio": "c.wav", "question": "How many?", "answer": "1", "split": "test"},
    ]
    for name in ("manifest.jsonl", "copy.jsonl"):
        (base / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def model(name: str) -> ModelConfig:
        return ModelConfig(f"models/{name}", dtype="float32")

    config = Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(model("student")),
        TeachersConfig(
            TextualTeacherConfig(model("textual")),
            AcousticTeacherConfig(model("acoustic")),
            mass=0.99,
            min_k=4,
            states="low_rank",
            rank=8,
        ),
        textualize=TextualizeConfig(DescribeConfig(model("describer"), temperature=0.5), TraceConfig(model("tracer"))),
        layers=LayersConfig("skip", every=2),
        train=TrainConfig(weights=WeightsConfig(acoustic_top=0.1), lora=LoraConfig(rank=4), validation_fraction=0.0),
    )
    ctx = Context(config, base)
    for _ in range(5):
        for plan in make_plans(ctx).values():
            rows = []
            for want in plan.todo:
                if want.pending is None:
                    part = f"{want.source}.zarr"
                    (plan.ledger.parts / part).mkdir(parents=True, exist_ok=True)
                    key, cover = want.key, dict(want.cover)
                    made_with = environment(ctx, plan.stage).text
                    place = part, len(rows), 9, 9, want.id, cover, "", made_with
                    rows.append(Row(want.id, want.source, key, want.fields, *place))
            plan.ledger.commit(rows)
    assert not any(plan.todo for plan in make_plans(ctx).values())
    return config, base, models


def stale(config: Config, base: Path) -> str:
    """What has to be made anew, where it can be known; what waits for it is left out."""
    found = []
    for name, plan in make_plans(Context(config, base)).items():
        sources = Counter(want.source for want in plan.todo if want.pending is None)
        if sources:
            found.append(f"{name}: {', '.join(sorted(sources))}" if name in SEVERAL_SOURCES else name)
        elif plan.removed and STAGES[name].whole and not plan.todo:
            found.append(name)
    return "; ".join(found) or INACTIVE


SEVERAL_SOURCES = ("cache-teachers", "evaluate")


def page_table() -> dict[str, str]:
    text = PAGE.read_text()
    lines = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    return {cells[1].strip("` "): cells[2].strip() for line in lines if len(cells := line.split("|")) > 3}


def test_the_table_of_fields(done: tuple[Config, Path, dict[str, str]]) -> None:
    config, base, models = done
    found = {}
    for name, hint, execution in fields(Config):
        found[name] = stale(changed(config, name, hint, models), base)
        if execution and not name.startswith("data."):
            assert found[name] == INACTIVE, f"{name} says how, not what"
    if os.environ.get("KDPIPE_STALENESS") == "write":
        rows = "".join(f"| `{name}` | {what} |\n" for name, what in found.items())
        text = PAGE.read_text()
        head = f"{BEGIN}\n| field | made anew |\n|---|---|\n"
        PAGE.write_text(text[: text.index(BEGIN)] + head + rows + text[text.index(END) :])
    assert found == page_table()


def test_every_input_file(done: tuple[Config, Path, dict[str, str]]) -> None:
    """One byte more in a file of a model, or another clip."""
    config, base, models = done
    found = {}
    for folder in [*models, "."]:
        for path in sorted((base / folder).iterdir()):
            if path.is_dir() or path.suffix in (".yaml", ".lock") or path.name.startswith("copy"):
                continue
            before, name = path.read_bytes(), f"{folder}/{path.name}".removeprefix("./")
            shutil.copy2(path, base / "kept")
            path.write_bytes(before + b"\n")
            found[name] = stale(config, base)
            shutil.move(base / "kept", path)
    assert stale(config, base) == INACTIVE
    acoustic, textual = "cache-teachers: acoustic, acoustic_top", "cache-teachers: textual"
    expected = {"describer": "textualize", "tracer": "textualize", "acoustic": acoustic, "textual": textual}
    for name, what in found.items():
        folder, _, file = name.rpartition("/")
        kind = folder.removeprefix("models/")
        if kind == "student":
            # What makes texts and clips into ids is in the keys of all that is about its tokens.
            alone = file in ("config.json", "generation_config.json", "model.safetensors")
            tokens = "cache-teachers: acoustic_top, targets, textual; evaluate: base"
            assert what == ("train; evaluate: base" if alone else tokens), name
        elif kind:
            assert what == expected[kind], name
    assert len(found) > 25 and len({name for name in found if name.startswith("models/student/")}) >= 5
    # Of the clips: one whose trace the manifest brings, one to be described, one for evaluation alone.
    assert [found[name] for name in ("a.wav", "b.wav", "c.wav")] == [
        "textualize",
        "textualize",
        "evaluate: base, student",
    ]
    assert found["manifest.jsonl"] == INACTIVE, "what is in it counts"


@pytest.mark.parametrize(
    ("sample", "column", "expected"),
    [
        ("given", "question", "textualize"),
        ("given", "description", "textualize"),
        ("given", "trace", "textualize"),
        ("given", "task", INACTIVE),
        ("given", "choices", "textualize"),
        ("given", "answer", "textualize"),
        ("asked", "question", "textualize"),
        ("test", "question", "evaluate: base, student"),
        ("test", "answer", "evaluate: base, student"),
    ],
)
def test_every_column(done: tuple[Config, Path, dict[str, str]], sample: str, column: str, expected: str) -> None:
    config, base, _ = done
    rows = [json.loads(line) for line in (base / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        if row["id"] == sample:
            row[column] = ["1", "3"] if column == "choices" else f"{row.get(column, '')} 2"
    (base / "copy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert stale(replace(config, data=replace(config.data, manifest="copy.jsonl")), base) == expected


def test_why_one_sample_is_stale(done: tuple[Config, Path, dict[str, str]]) -> None:
    config, base, _ = done
    teachers = replace(config.teachers, k=90, textual=replace(config.teachers.textual, prompt="{description}"))
    plans = make_plans(Context(replace(config, teachers=teachers), base))
    lines = {(stage, source): (state, reason) for stage, source, state, reason in why(plans, "given")}
    assert next(iter(lines)) == ("textualize", "trace") and lines["textualize", "trace"] == (
        "fresh",
        "trace.zarr, row 0",
    )
    state, reason = lines["cache-teachers", "textual"]
    assert state == "stale" and re.fullmatch(r"teacher\.prompt [0-9a-f]{8} -> [0-9a-f]{8}", reason)
    assert lines["cache-teachers", "acoustic_top"] == ("stale", "k 64 -> 90")
    assert lines["train", "student"] == ("waiting", "waits for cache-teachers")
    assert {stage for stage, _ in lines} == {"textualize", "cache-teachers", "train"}, "it is not evaluated"
    with pytest.raises(KdpipeError, match=r"no stage has a sample of that id.*Did you mean given"):
        why(plans, "givem")


def test_why_of_a_sample_that_only_the_store_has(done: tuple[Config, Path, dict[str, str]]) -> None:
    config, base, _ = done
    rows = (base / "manifest.jsonl").read_text().splitlines(keepends=True)
    (base / "fewer.jsonl").write_text("".join(row for row in rows if json.loads(row)["id"] != "given"))
    fewer = replace(config, data=replace(config.data, manifest="fewer.jsonl"))
    lines = {
        (stage, source): (state, reason)
        for stage, source, state, reason in why(make_plans(Context(fewer, base)), "given")
    }
    gone = "is kept; the sample is not in the manifest any more, or in no split that is used"
    assert lines.pop(("train", "student")) == ("stale", "made from this sample, which is no longer wanted")
    assert lines["textualize", "trace"] == ("unasked", f"trace.zarr, row 0, {gone}")
    assert {source for stage, source in lines if stage == "cache-teachers"} > {"targets", "textual"}
    assert all(state == "unasked" and reason.endswith(gone) for state, reason in lines.values())


def test_kdpipe_lock_says_how_much_is_asked_for(done: tuple[Config, Path, dict[str, str]]) -> None:
    config, base, _ = done
    ctx = Context(replace(config, run=replace(config.run, folder="locked")), base)
    write_lock_file(ctx, make_plans(ctx))
    covers = yaml.safe_load((base / "locked" / "kdpipe.lock").read_text())["stages"]["cache-teachers"]["covers"]
    kept = {"k": "64", "mass": "0.99", "min_k": "4", "temperatures": "1.0"}
    assert covers == {"textual": {**kept, "lens": "3"}, "acoustic": {"hidden": "1, 2, 3, 4"}, "acoustic_top": kept}
