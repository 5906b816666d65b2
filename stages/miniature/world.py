"""A small world of tones: clips to hear, questions to reason about, gold descriptions and traces.

A scene is a sequence of 2 to 5 tones out of eight pitches, numbered 1 (lowest) to 8. Each question needs the tones to
be heard and then one small piece of reasoning: counting, comparing, finding a maximum, or the parity of a sum.
"""

import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

SAMPLE_RATE = 16_000
MAX_SECONDS = 3.0
PITCHES = 8
MIN_TONES, MAX_TONES = 2, 5
FREQUENCIES = tuple(220.0 * 2 ** (3 * step / (PITCHES - 1)) for step in range(PITCHES))
"""Hz of tones 1 to 8: three octaves from 220 to 1760 in equal steps."""

DESCRIBE_PROMPT = "Describe the audio."
"""User text beside the audio that asks for a description."""
QUESTION_PROMPT = "{question}\n{choices}"
"""User text beside the audio that asks for a trace and an answer."""
TEACHER_PROMPT = "{description}\n{question}\n{choices}"
"""User text for a text-only teacher, which reads the description instead of hearing the audio."""

TASKS = ("count", "direction", "highest", "parity")
_NAMES = ("one", "two", "three", "four", "five", "six", "seven", "eight")
_POSITIONS = ("first", "second", "third", "fourth", "fifth")
_QUESTIONS = {
    "count": ("How many tones are there?", "How many tones do you hear?", "What is the number of tones?"),
    "direction": (
        "Does it end higher or lower than it starts?",
        "Is the last tone higher or lower than the first?",
        "Compared with the first tone, is the last higher or lower?",
    ),
    "highest": ("Which tone is the highest?", "What is the highest tone?", "How high is the highest tone?"),
    "parity": (
        "Is the sum of the tones even or odd?",
        "Are the tones even or odd in sum?",
        "Do the tones add up to even or odd?",
    ),
}
_PLANS = {
    "count": ("Count the tones.", "Number the tones."),
    "direction": ("Compare the last with the first.", "Compare first and last."),
    "highest": ("Find the highest.", "Keep the highest."),
    "parity": ("Add the tones.", "Keep the sum."),
}


@dataclass(frozen=True)
class Scene:
    """A sequence of tones, each a number from 1 (lowest) to 8 (highest)."""

    tones: tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """A question about a scene, with its choices in the order shown and the one that is right."""

    task: str
    text: str
    choices: tuple[str, ...]
    answer: str


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's tone sequence belongs to the test split: one in five, and never taught or trained on."""
    return zlib.crc32(bytes(scene.tones)) % 5 == 0


def sample_question(rng: np.random.Generator, *, held_out: bool, task: str | None = None) -> tuple[Scene, Question]:
    """Draws a task (unless given), and a scene for which the task has exactly one right answer."""
    task = task if task is not None else TASKS[rng.integers(len(TASKS))]
    while True:
        length = int(rng.integers(MIN_TONES, MAX_TONES + 1))
        scene = Scene(tuple(int(tone) for tone in rng.integers(1, PITCHES + 1, length)))
        answer = _answer(scene, task)
        if answer is not None and is_held_out(scene) == held_out:
            break
    templates = _QUESTIONS[task]
    text = templates[rng.integers(len(templates))]
    return scene, Question(task, text, _choices(task, answer, rng), answer)


def describe(scene: Scene) -> str:
    """What is heard, in text: `tones: three one four`."""
    return "tones: " + " ".join(_names(scene.tones))


def trace(scene: Scene, question: Question) -> str:
    """The gold CoTA trace with its response.

    Two wordings of the plan and two of the summary occur in turn, by a hash of scene and question: no model can tell
    which comes, so a good one spreads its probability over both.
    """
    tones, names, answer = scene.tones, _names(scene.tones), question.answer
    variant = zlib.crc32(repr((tones, question.text, question.choices)).encode())
    plan = _PLANS[question.task][variant % 2]
    summary = (f"So {answer}.", f"It is {answer}.")[variant // 2 % 2]
    if question.task == "count":
        pairs = zip(_POSITIONS, names, strict=False)
    elif question.task == "direction":
        top, place = (names[0], "first") if answer == "lower" else (names[-1], "last")
        pairs = ((names[0], "first"), (names[-1], "last"), ("top", top, place))
    elif question.task == "highest":
        pairs = zip(names, _names(np.maximum.accumulate(tones)), strict=True)
    else:
        pairs = zip(names, map(_parity, np.cumsum(tones)), strict=True)
    reasoning = ", ".join(" ".join(pair) for pair in pairs)
    return (
        f"<THINK><PLANNING>{plan}</PLANNING><CAPTION>{describe(scene)}</CAPTION>"
        f"<REASONING>{reasoning}</REASONING><SUMMARY>{summary}</SUMMARY></THINK><RESPONSE>{answer}</RESPONSE>"
    )


def question_text(question: Question) -> str:
    """The user text of a question beside the audio."""
    return QUESTION_PROMPT.format(question=question.text, choices=_choices_text(question))


def teacher_text(description: str, question: Question) -> str:
    """The user text of a question for a text-only teacher."""
    return TEACHER_PROMPT.format(description=description, question=question.text, choices=_choices_text(question))


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Synthesizes the scene.

    Tones of 0.3 to 0.5 s with silences of 0.04 to 0.08 s around them; loudness, phase and timbre (strength of two
    overtones) vary by tone, and light noise lies over all.

    Args:
        scene: The tones.
        rng: Source of every variation.

    Returns:
        Mono samples, float32 `[samples]` in -1 to 1 at 16 kHz, at most 3 s; and the number of the tone that sounds at
        each sample, int64 `[samples]`, 0 in silence.
    """
    pieces, numbers = [], []

    def add(wave: np.ndarray, number: int) -> None:
        pieces.append(wave)
        numbers.append(np.full(len(wave), number))

    def silence() -> np.ndarray:
        return np.zeros(int(rng.uniform(0.04, 0.08) * SAMPLE_RATE))

    add(silence(), 0)
    for tone in scene.tones:
        seconds = np.arange(int(rng.uniform(0.3, 0.5) * SAMPLE_RATE)) / SAMPLE_RATE
        overtones = (1.0, rng.uniform(0, 0.4), rng.uniform(0, 0.2))
        phases = rng.uniform(0, 2 * np.pi, len(overtones))
        wave = np.zeros(len(seconds))
        for order, (strength, phase) in enumerate(zip(overtones, phases, strict=True), start=1):
            wave += strength * np.sin(2 * np.pi * order * FREQUENCIES[tone - 1] * seconds + phase)
        ramp = np.minimum(1.0, np.minimum(seconds, seconds[::-1]) / 0.01)
        add(rng.uniform(0.15, 0.5) * wave * ramp, tone)
        add(silence(), 0)
    samples = np.concatenate(pieces)
    samples += rng.normal(0, rng.uniform(0.001, 0.01), len(samples))
    return np.clip(samples, -1, 1).astype(np.float32), np.concatenate(numbers)


def texts(count: int, *, seed: int) -> Iterator[str]:
    """Texts of this world as the models see them (prompts, descriptions, traces), to train a tokenizer on."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        scene, question = sample_question(rng, held_out=False)
        yield f"system\nYou are a helpful assistant.\nuser\nAudio 1: \n{DESCRIBE_PROMPT}\nassistant\n{describe(scene)}"
        yield teacher_text(describe(scene), question)
        yield trace(scene, question)


def make_world(folder: Path, *, n_train: int, n_test: int, seed: int) -> Path:
    """Writes clips and a manifest.

    One train row in four brings its gold trace in the column `trace`; for the others it is to be written by a teacher.
    Each row has a clip of its own, and the same seed gives the same bytes.

    Args:
        folder: Receives `clips/*.wav` (16 kHz, mono, 16 bit) and `manifest.jsonl`.
        n_train: Rows with split `train`.
        n_test: Rows with split `test`, of tone sequences that no train row has.
        seed: Source of all variation.

    Returns:
        The path of the manifest.
    """
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    lines = []
    for split, split_number, count in (("train", 0, n_train), ("test", 1, n_test)):
        for index in range(count):
            rng = np.random.default_rng([seed, split_number, index])
            scene, question = sample_question(rng, held_out=split == "test", task=TASKS[index % len(TASKS)])
            name = f"{split}-{index:04d}"
            soundfile.write(clips / f"{name}.wav", render(scene, rng)[0], SAMPLE_RATE, subtype="PCM_16")
            row: dict[str, Any] = {
                "id": name,
                "audio": f"clips/{name}.wav",
                "question": question.text,
                "choices": list(question.choices),
                "answer": question.answer,
                "task": question.task,
                "split": split,
            }
            # A stride that is coprime with the number of tasks, so that every task has rows with a trace.
            if split == "train" and (index + index // len(TASKS)) % 4 == 0:
                row["trace"] = trace(scene, question)
            lines.append(json.dumps(row) + "\n")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def _answer(scene: Scene, task: str) -> str | None:
    """The right answer, or None where there is none."""
    tones = scene.tones
    if task == "count":
        return str(len(tones))
    if task == "direction":
        return None if tones[0] == tones[-1] else ("higher" if tones[-1] > tones[0] else "lower")
    if task == "highest":
        return _NAMES[max(tones) - 1]
    return _parity(sum(tones))


def _choices_text(question: Question) -> str:
    """As kdpipe fills `{choices}` in a prompt template."""
    return f"Choices: {', '.join(question.choices)}"


def _choices(task: str, answer: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Choices in the order shown, the answer among them."""
    if task == "count":
        return tuple(map(str, range(MIN_TONES, MAX_TONES + 1)))
    if task == "highest":
        others = [name for name in _NAMES if name != answer]
        shown = {answer, *rng.choice(others, 3, replace=False)}
        return tuple(name for name in _NAMES if name in shown)
    pair = ("higher", "lower") if task == "direction" else ("even", "odd")
    return pair if rng.integers(2) else pair[::-1]


def _parity(number: int) -> str:
    return "odd" if number % 2 else "even"


def _names(tones: Iterable[int]) -> list[str]:
    return [_NAMES[tone - 1] for tone in tones]
