"""The experiment on real speech, so small that it takes seconds: the world, the configuration, the table."""

import importlib
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdpipe.data.cota import TraceSchema
from kdpipe.data.manifest import check_sample, load_manifest
from kdpipe.pipeline.config import load_config

HERE = Path(__file__).parent
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SMALL = {"train": (1, 2), "val": (1, 1), "test": (2, 2)}


@pytest.fixture(scope="module")
def bench():
    """`bench_experiment.py`, which finds its neighbours as a script does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(HERE))
        yield importlib.import_module("bench_experiment")


@pytest.fixture(scope="module")
def manifest(bench, recordings, tmp_path_factory):
    return bench.world.make_world(tmp_path_factory.mktemp("world"), recordings, SMALL, seed=1)


def _right(heard: str, question: str) -> str:
    """The answer from the description, without the help of the code under test."""
    speaker, words = heard.split(": ")
    parts = words.split()
    digits = [DIGITS.index(word) for word in parts if word in DIGITS]
    (place,) = [index for index, word in enumerate(parts) if word not in DIGITS]
    first, last = digits[0], digits[-1]
    if question.startswith("Which digit is larger"):
        return DIGITS[max(first, last)]
    if question.startswith("Which digit is "):
        return DIGITS[digits[("first", "second", "third").index(question.split()[-1].rstrip("?"))]]
    return {
        "Who speaks?": lambda: speaker,
        "Which sound is heard?": lambda: parts[place],
        "Where is the sound?": lambda: {0: "before", len(parts) - 1: "after"}.get(place, "between"),
        "What is the sum of the first and the last digit?": lambda: [*DIGITS, "ten"][first + last],
        "Is the sum of the first and the last digit even or odd?": lambda: "even" if (first + last) % 2 == 0 else "odd",
        "How many digits are above four?": lambda: DIGITS[len([digit for digit in digits if digit >= 5])],
        "Which digit follows the sound?": lambda: parts[place + 1],
    }[question]()


def test_answers_follow_from_what_is_in_the_clip(manifest):
    loaded = load_manifest(manifest)
    tasks = defaultdict(int)
    for sample in loaded.samples:
        check_sample(sample)
        assert sample.answer == _right(sample.extra["heard"], sample.question)
        assert not sample.choices or sample.answer in sample.choices
        speaker, words = sample.extra["heard"].split(": ")
        for word, source in zip(words.split(), sample.extra["sources"], strict=True):
            if word in DIGITS:
                assert Path(source).name.startswith(f"{DIGITS.index(word)}_{speaker}_")
            else:
                assert word in source
        tasks[sample.split, sample.task] += 1
        wave, rate = soundfile.read(sample.audio[0].path)
        assert rate == 16_000 and 0.8 < len(wave) / rate <= 3.0 and np.abs(wave).max() > 0.05
    reasoning = ("sum", "parity", "compare", "count", "across")
    hearing = ("digit", "voice", "sound", "order")
    assert tasks == {
        (split, task): n
        for split in SMALL
        for n, own in zip(SMALL[split], (hearing, reasoning), strict=True)
        for task in own
    }


@pytest.fixture(scope="module")
def known(bench, recordings):
    """The recordings of each split."""
    found = {split: bench.world.Recordings(recordings, split) for split in bench.world.SPLITS}
    return {
        split: {path for paths in (*own.digits.values(), *own.sounds.values()) for path in paths}
        for split, own in found.items()
    }


def test_no_recording_is_heard_in_two_splits(known):
    assert all(known.values())
    assert not known["train"] & known["val"] and not known["test"] & (known["train"] | known["val"])
    for path in known["test"]:
        assert path.name.startswith("3-") if path.suffix == ".ogg" else int(path.stem.split("_")[2]) < 5
    assert not any(path.name.startswith("3-") for path in known["train"] | known["val"])


def test_clips_use_only_recordings_of_their_split(known, recordings, manifest):
    for sample in load_manifest(manifest).samples:
        assert {recordings / source for source in sample.extra["sources"]} <= known[sample.split]


def test_the_same_seed_gives_the_same_bytes(bench, recordings, manifest, tmp_path):
    again = bench.world.make_world(tmp_path, recordings, SMALL, seed=1)
    assert again.read_bytes() == manifest.read_bytes()
    for clip in (tmp_path / "clips").iterdir():
        assert clip.read_bytes() == (manifest.parent / "clips" / clip.name).read_bytes()


def test_gold_traces_parse_and_fit_their_limits(bench):
    rng = np.random.default_rng(0)
    for _ in range(300):
        scene, question = bench.world.sample_question(rng)
        assert question.answer == _right(bench.world.describe(scene), question.text)
        trace = TraceSchema().parse(bench.world.trace(scene, question, rng))
        assert trace.response == question.answer and trace.sections["CAPTION"] == bench.world.describe(scene)
        assert max(map(len, trace.sections.values())) <= 80


def test_the_configuration_loads(bench, tmp_path):
    (tmp_path / "kdpipe.yaml").write_text(bench.CONFIG)
    config = load_config(tmp_path / "kdpipe.yaml")
    assert set(config.train.task_weights) <= set(bench.world.TASKS)
    assert config.evaluate.temperature == 0


def test_data_and_models_are_made_once(bench, recordings, tmp_path, monkeypatch):
    """At a tiny scale, and with an end in between: the second call makes only what is missing."""
    monkeypatch.setattr(bench, "make_models", _stopped)
    with pytest.raises(KeyboardInterrupt):
        bench.prepare(tmp_path, recordings, 0.01)
    written = (tmp_path / "data" / "manifest.jsonl").stat().st_mtime_ns
    assert not (tmp_path / "models").exists() and not list((tmp_path / "tmp").iterdir())

    monkeypatch.setattr(bench, "make_models", _made)
    bench.prepare(tmp_path, recordings, 0.01)
    assert (tmp_path / "data" / "manifest.jsonl").stat().st_mtime_ns == written
    assert json.loads((tmp_path / "models" / "scores.json").read_text()) == {"student.digit": 0.5}
    assert len(load_manifest(tmp_path / "data" / "manifest.jsonl").samples) == 3 * 9


def test_both_models_are_taught(bench, recordings, tmp_path):
    """A step or two each: that the lessons run on what the models and the recordings are."""
    lessons = importlib.import_module("experiment.lessons")
    text_tokenizer, audio_tokenizer = lessons.models.make_tokenizers(texts=list(bench.world.texts(400, seed=0)))
    effort = replace(bench.effort_at(0.001), clips=8, exam=9)
    lines = []
    for name, make, tokenizer in (
        ("teacher", lessons.models.make_qwen3, text_tokenizer),
        ("student", lessons.models.make_qwen2_5_omni, audio_tokenizer),
    ):
        folder = make(tmp_path / name, tokenizer=tokenizer, seed=0)
        before = (folder / "model.safetensors").read_bytes()
        if name == "teacher":
            scores = lessons.teach_teacher(folder, effort, seed=0, report=lines.append, batch=2)
        else:
            scores = lessons.teach_student(folder, recordings, effort, seed=0, report=lines.append, batch=2)
        assert scores and all(score.startswith(f"{name}.") and 0 <= scores[score] <= 1 for score in scores)
        assert (folder / "model.safetensors").read_bytes() != before
    assert lines[-1].startswith("student on validation: ")


def test_table_and_plot_show_every_row(bench, tmp_path):
    def row(name, accuracy, against):
        found = {"accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1], "n": 100}
        return {
            "name": name,
            "title": name.upper(),
            "seeds": [0, 1],
            "groups": dict.fromkeys(("reasoning", "hearing", "all"), found),
            "tasks": dict.fromkeys(bench.world.TASKS, found),
            "by_seed": {"0": {"reasoning": accuracy, "hearing": accuracy}},
            "against": {other: dict.fromkeys(("reasoning", "hearing"), over) for other, over in against.items()},
        }

    over = {"difference": 0.2, "interval": [-0.05, 0.45], "n": 100}
    none = {"difference": None, "interval": None, "n": 0}
    results = {"format": 1, "rows": [row("base", 0.5, {"sft": none}), row("sft", 0.7, {"base": over})]}
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "results.json").write_text(json.dumps(results))
    bench.draw(tmp_path)
    base, sft = (tmp_path / "results.md").read_text().splitlines()[2:]
    assert base.startswith("| BASE | 50.0 (40.0 to 60.0) |  | 50.0 (40.0 to 60.0) |  | 50.0 |")
    assert sft.startswith("| SFT | 70.0 (60.0 to 80.0) |  | 70.0 (60.0 to 80.0) | +20.0 (-5.0 to +45.0) | 70.0 |")
    drawn = (tmp_path / "results.svg").read_bytes()
    assert b"<!-- BASE -->" in drawn and b"<!-- SFT -->" in drawn
    bench.draw(tmp_path)
    assert (tmp_path / "results.svg").read_bytes() == drawn


def _stopped(*args, **kwargs):
    raise KeyboardInterrupt


def _made(folder, *args, **kwargs):
    return {"student.digit": 0.5}
