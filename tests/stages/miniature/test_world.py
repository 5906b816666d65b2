"""The world of tones: right answers, traces that parse, and the same bytes from the same seed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kdpipe.stages.miniature import world

TRACE = re.compile(
    r"<THINK><PLANNING>(.+)</PLANNING><CAPTION>(.+)</CAPTION><REASONING>(.+)</REASONING>"
    r"<SUMMARY>(.+)</SUMMARY></THINK><RESPONSE>(.+)</RESPONSE>"
)
NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight")


def right_answer(tones: tuple[int, ...], task: str) -> str:
    """Answers without the help of the code under test."""
    return {
        "count": str(len(tones)),
        "direction": "higher" if tones[-1] > tones[0] else "lower",
        "highest": NAMES[max(tones) - 1],
        "parity": "even" if sum(tones) % 2 == 0 else "odd",
    }[task]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("world"), n_train=32, n_test=12, seed=7)


def rows_of(manifest: Path) -> list[dict]:
    return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("task", world.TASKS)
def test_answers_are_right_and_among_distinct_choices(task: str) -> None:
    rng = np.random.default_rng(0)
    answers = set()
    for _ in range(200):
        scene, question = world.sample_question(rng, held_out=False, task=task)
        assert question.answer == right_answer(scene.tones, task)
        assert question.choices.count(question.answer) == 1
        assert len(set(question.choices)) == len(question.choices)
        answers.add(question.answer)
    assert len(answers) >= 2


def test_the_order_of_pairs_says_nothing_about_the_answer() -> None:
    rng = np.random.default_rng(1)
    for task in ("direction", "parity"):
        first = [
            question.choices[0] == question.answer
            for _, question in (world.sample_question(rng, held_out=False, task=task) for _ in range(400))
        ]
        assert 0.4 < np.mean(first) < 0.6


def test_gold_traces_parse_and_end_in_the_right_answer() -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        scene, question = world.sample_question(rng, held_out=False)
        match = TRACE.fullmatch(world.trace(scene, question))
        assert match, world.trace(scene, question)
        _, caption, reasoning, summary, response = match.groups()
        assert caption == world.describe(scene)
        assert response == question.answer
        assert summary.rstrip(".").split()[-1] == question.answer
        assert all(NAMES[tone - 1] in reasoning for tone in (scene.tones[0], scene.tones[-1]))


def test_traces_come_in_several_wordings_that_the_scene_alone_decides() -> None:
    rng = np.random.default_rng(3)
    drawn = [world.sample_question(rng, held_out=False, task="count") for _ in range(60)]
    plans = {world.trace(*pair).split("</PLANNING>")[0] for pair in drawn}
    assert len(plans) == 2
    assert [world.trace(*pair) for pair in drawn] == [world.trace(*pair) for pair in drawn]


def test_held_out_sequences_never_meet_the_others() -> None:
    rng = np.random.default_rng(4)
    taught = {world.sample_question(rng, held_out=False)[0] for _ in range(500)}
    held = {world.sample_question(rng, held_out=True)[0] for _ in range(200)}
    assert not taught & held
    assert all(world.is_held_out(scene) for scene in held)


def test_render_sounds_the_tones_it_says() -> None:
    scene = world.Scene((8, 1, 5))
    samples, tone_at = world.render(scene, np.random.default_rng(5))
    assert samples.dtype == np.float32
    assert samples.shape == tone_at.shape
    assert np.abs(samples).max() <= 1
    starts = np.flatnonzero((tone_at > 0) & (np.roll(tone_at, 1) == 0))
    assert [int(tone_at[start]) for start in starts] == [8, 1, 5]
    for start in starts:
        tone = int(tone_at[start])
        window = samples[start : start + 4096] * np.hanning(4096)
        loudest = np.abs(np.fft.rfft(window)).argmax() * world.SAMPLE_RATE / 4096
        assert loudest == pytest.approx(world.FREQUENCIES[tone - 1], abs=5)


def test_clips_are_never_longer_than_promised() -> None:
    rng = np.random.default_rng(6)
    for _ in range(50):
        samples, _ = world.render(world.Scene((1,) * world.MAX_TONES), rng)
        assert len(samples) <= world.MAX_SECONDS * world.SAMPLE_RATE


def test_manifest_rows_are_complete(made: Path) -> None:
    rows = rows_of(made)
    assert len({row["id"] for row in rows}) == len(rows) == 44
    assert len({row["audio"] for row in rows}) == len(rows)
    assert [row["split"] for row in rows] == ["train"] * 32 + ["test"] * 12
    for row in rows:
        assert row["answer"] in row["choices"]
        assert row["task"] in world.TASKS
        info = soundfile.info(made.parent / row["audio"])
        assert (info.samplerate, info.channels, info.subtype) == (16_000, 1, "PCM_16")
        assert 0.5 < info.duration <= world.MAX_SECONDS


def test_one_train_row_in_four_brings_a_trace_in_every_task(made: Path) -> None:
    with_trace = [row for row in rows_of(made) if "trace" in row]
    assert len(with_trace) == 8
    assert {row["split"] for row in with_trace} == {"train"}
    assert {row["task"] for row in with_trace} == set(world.TASKS)
    for row in with_trace:
        assert row["trace"].endswith(f"<RESPONSE>{row['answer']}</RESPONSE>")


def test_same_seed_same_bytes(made: Path, tmp_path: Path) -> None:
    again = world.make_world(tmp_path / "again", n_train=32, n_test=12, seed=7)
    other = world.make_world(tmp_path / "other", n_train=32, n_test=12, seed=8)

    def content(manifest: Path) -> dict[str, bytes]:
        folder = manifest.parent
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    assert content(again) == content(made)
    assert content(other) != content(made)


def test_growing_the_world_keeps_the_rows_it_had(made: Path, tmp_path: Path) -> None:
    larger = world.make_world(tmp_path, n_train=40, n_test=12, seed=7)
    assert rows_of(larger)[:32] == rows_of(made)[:32]
