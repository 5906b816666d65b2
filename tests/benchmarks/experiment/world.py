"""Clips of several real recordings, what is heard in them, questions about it, and gold traces.

A scene is two or three digits by one speaker and one sound before, between or after them. Hearing questions ask for
what is heard; reasoning questions need one small step beyond. Every answer follows from the description alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from experiment.recordings import DIGITS, SAMPLE_RATE, SOUNDS, SPEAKERS, SPLITS, Recordings, excerpt, samples_of

HEARING = ("digit", "voice", "sound", "order")
REASONING = ("sum", "parity", "compare", "count", "across")
TASKS = HEARING + REASONING
MAX_SECONDS, SOUND_SECONDS = 3.0, 0.6
PLACES = ("first", "second", "third")
NUMBERS = (*DIGITS, "ten")
LARGEST_ADDED = 5
"""Larger digits are not added: of all 100 pairs the training samples would show too few."""

DESCRIBE_PROMPT = "Describe the audio."
QUESTION_PROMPT = "{question}\n{choices}"
TEACHER_PROMPT = "{description}\n{question}\n{choices}"

_QUESTIONS = {
    "digit": "Which digit is {place}?",
    "voice": "Who speaks?",
    "sound": "Which sound is heard?",
    "order": "Where is the sound?",
    "sum": "What is the sum of the first and the last digit?",
    "parity": "Is the sum of the first and the last digit even or odd?",
    "compare": "Which digit is larger, the first or the last?",
    "count": "How many digits are above four?",
    "across": "Which digit follows the sound?",
}
_PLANS = {
    "digit": ("Find the digit.", "Look at its place.", "Go through the digits."),
    "voice": ("Find the speaker.", "Listen to the voice.", "Know the speaker."),
    "sound": ("Find the sound.", "Listen for the sound.", "Leave out the digits."),
    "order": ("Find the sound.", "Look where the sound is.", "Place the sound."),
    "sum": ("Add the digits.", "Take both and add.", "Find first and last, then add."),
    "parity": ("Look at both digits.", "Take both as even or odd.", "Find first and last."),
    "compare": ("Compare the digits.", "Take both and compare.", "Find first and last, then compare."),
    "count": ("Go through the digits.", "Look at each digit.", "Check each digit."),
    "across": ("Find the sound.", "Look after the sound.", "Go to the sound."),
}
_SUMMARIES = ("So {}.", "It is {}.", "The answer is {}.", "That gives {}.")


@dataclass(frozen=True)
class Scene:
    """What a clip holds.

    Attributes:
        speaker: who says the digits.
        digits: two or three.
        sound: a word of `SOUNDS`.
        place: digits before the sound.
    """

    speaker: str
    digits: tuple[int, ...]
    sound: str
    place: int


@dataclass(frozen=True)
class Question:
    """A question about a scene; `choices` is empty where the answer is a number."""

    task: str
    text: str
    choices: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class Clip:
    """A rendered scene.

    Attributes:
        samples: float32 `[samples]` at 16 kHz.
        events: what sounds at each sample, int64 `[samples]`: 0 silence, 1 to 10 a digit, from 11 a sound.
        sources: the recordings it is made of, in order.
    """

    samples: np.ndarray
    events: np.ndarray
    sources: tuple[Path, ...]


EVENTS = 1 + len(DIGITS) + len(SOUNDS)


def sample_question(rng: np.random.Generator, task: str | None = None) -> tuple[Scene, Question]:
    """Draws a task (unless given), and a scene for which it has exactly one right answer."""
    task = task if task is not None else TASKS[rng.integers(len(TASKS))]
    while True:
        digits = tuple(int(digit) for digit in rng.integers(10, size=rng.integers(2, 4)))
        place = int(rng.integers(len(digits) + 1))
        scene = Scene(str(rng.choice(SPEAKERS)), digits, str(rng.choice(list(SOUNDS))), place)
        asked = int(rng.integers(len(digits)))
        answer = answer_of(scene, task, asked)
        if answer is not None:
            text = _QUESTIONS[task].format(place=PLACES[asked])
            return scene, Question(task, text, _choices(task, answer, rng), answer)


def answer_of(scene: Scene, task: str, asked: int = 0) -> str | None:
    """The right answer, or None where there is none.

    Args:
        scene: the scene.
        task: one of `TASKS`.
        asked: for the task `digit`, which place from 0.
    """
    first, last = scene.digits[0], scene.digits[-1]
    if task == "digit":
        return DIGITS[scene.digits[asked]]
    if task == "voice":
        return scene.speaker
    if task == "sound":
        return scene.sound
    if task == "order":
        return "before" if scene.place == 0 else "after" if scene.place == len(scene.digits) else "between"
    if task == "sum":
        return NUMBERS[first + last] if max(first, last) <= LARGEST_ADDED else None
    if task == "parity":
        return _parity(first + last)
    if task == "compare":
        return None if first == last else DIGITS[max(first, last)]
    if task == "count":
        return NUMBERS[sum(digit > 4 for digit in scene.digits)]
    return None if scene.place == len(scene.digits) else DIGITS[scene.digits[scene.place]]


def describe(scene: Scene) -> str:
    """What is heard, in text: `theo: three dog five`."""
    words = [DIGITS[digit] for digit in scene.digits]
    words.insert(scene.place, scene.sound)
    return f"{scene.speaker}: {' '.join(words)}"


def trace(scene: Scene, question: Question, rng: np.random.Generator) -> str:
    """A gold trace with its response. Plan, reasoning and summary are worded in one of several ways, by chance."""
    plan = rng.choice(_PLANS[question.task])
    reasoning = rng.choice(_reasoning(scene, question))
    summary = rng.choice(_SUMMARIES).format(question.answer)
    return (
        f"<THINK><PLANNING>{plan}</PLANNING><CAPTION>{describe(scene)}</CAPTION>"
        f"<REASONING>{reasoning}</REASONING><SUMMARY>{summary}</SUMMARY></THINK><RESPONSE>{question.answer}</RESPONSE>"
    )


def question_text(question: Question) -> str:
    """The user text of a question beside the audio, as kdpipe fills the template."""
    return QUESTION_PROMPT.format(question=question.text, choices=_choices_text(question)).strip()


def teacher_text(description: str, question: Question) -> str:
    """The user text of a question for a text-only teacher."""
    return TEACHER_PROMPT.format(
        description=description, question=question.text, choices=_choices_text(question)
    ).strip()


def render(scene: Scene, recordings: Recordings, rng: np.random.Generator) -> Clip:
    """Composes the scene from recordings chosen by chance; loudness, gaps and a light noise vary."""
    pieces, events, sources = [], [], []

    def add(wave: np.ndarray, event: int) -> None:
        pieces.append(wave)
        events.append(np.full(len(wave), event))

    def gap() -> None:
        add(np.zeros(int(rng.uniform(0.02, 0.06) * SAMPLE_RATE), np.float32), 0)

    parts: list[int | str] = [*scene.digits]
    parts.insert(scene.place, scene.sound)
    gap()
    for part in parts:
        known = recordings.sounds[part] if isinstance(part, str) else recordings.digits[scene.speaker, part]
        path = known[rng.integers(len(known))]
        wave = samples_of(path)
        if isinstance(part, str):
            wave = excerpt(wave, int(SOUND_SECONDS * SAMPLE_RATE), rng)
        event = 1 + part if isinstance(part, int) else 1 + len(DIGITS) + list(SOUNDS).index(part)
        loudness = rng.uniform(0.05, 0.12) / max(1e-4, float(np.sqrt(np.mean(wave**2))))
        add(wave * loudness, event)
        sources.append(path)
        gap()
    samples = np.concatenate(pieces)
    samples = samples + rng.normal(0, rng.uniform(0.0003, 0.003), len(samples))
    return Clip(np.clip(samples, -1, 1).astype(np.float32), np.concatenate(events), tuple(sources))


def texts(count: int, *, seed: int) -> Iterator[str]:
    """Texts of this world as the models see them, to train a tokenizer on."""
    rng = np.random.default_rng([seed, 9])
    for _ in range(count):
        scene, question = sample_question(rng)
        yield f"system\nYou are a helpful assistant.\nuser\n{DESCRIBE_PROMPT}\nassistant\n{describe(scene)}"
        yield teacher_text(describe(scene), question)
        yield trace(scene, question, rng)


def make_world(folder: Path, recordings: Path, counts: Mapping[str, tuple[int, int]], *, seed: int) -> Path:
    """Writes clips and a manifest; the same seed gives the same bytes.

    Args:
        folder: receives `clips/*.wav` (16 kHz, mono, 16 bit) and `manifest.jsonl`, whose column `sources` names the
            recordings of each clip.
        recordings: holds `fsdd/` and `esc10/`.
        counts: by split, questions of each hearing task and of each reasoning task.
        seed: source of all variation.

    Returns:
        The path of the manifest.
    """
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, split in enumerate(SPLITS):
        if split not in counts:
            continue
        own = Recordings(recordings, split)
        for which, tasks in enumerate((HEARING, REASONING)):
            for task in tasks:
                for index in range(counts[split][which]):
                    rng = np.random.default_rng([seed, number, TASKS.index(task), index])
                    scene, question = sample_question(rng, task)
                    clip = render(scene, own, rng)
                    name = f"{split}-{task}-{index:03d}"
                    soundfile.write(clips / f"{name}.wav", clip.samples, SAMPLE_RATE, subtype="PCM_16")
                    lines.append(json.dumps(_row(name, split, scene, question, clip, recordings)) + "\n")
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(lines), encoding="utf-8")
    return manifest


def _row(name: str, split: str, scene: Scene, question: Question, clip: Clip, root: Path) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": name,
        "audio": f"clips/{name}.wav",
        "question": question.text,
        "answer": question.answer,
        "task": question.task,
        "split": split,
        "category": "hearing" if question.task in HEARING else "reasoning",
        "heard": describe(scene),
        "sources": [path.relative_to(root).as_posix() for path in clip.sources],
    }
    return row | ({"choices": list(question.choices)} if question.choices else {})


def _reasoning(scene: Scene, question: Question) -> tuple[str, ...]:
    """The step from what is heard to the answer, in each of its wordings."""
    words = [DIGITS[digit] for digit in scene.digits]
    first, last, answer = words[0], words[-1], question.answer
    if question.task == "digit":
        listed = ", ".join(f"{place} {word}" for place, word in zip(PLACES, words, strict=False))
        return (listed, f"the digits are {' '.join(words)}")
    if question.task == "voice":
        return (f"{answer} speaks", f"the voice of {answer}")
    if question.task == "sound":
        return (f"there is {answer}", f"besides digits {answer}")
    if question.task == "order":
        return (f"{scene.sound} {answer} the digits", f"{answer} the digits there is {scene.sound}")
    if question.task == "sum":
        return (f"{first} plus {last} is {answer}", f"{first} and {last} make {answer}")
    if question.task == "parity":
        kinds = [_parity(scene.digits[place]) for place in (0, -1)]
        return (f"{first} {kinds[0]}, {last} {kinds[1]}, so {answer}", f"{kinds[0]} and {kinds[1]} make {answer}")
    if question.task == "compare":
        less = last if answer == first else first
        return (f"{first} or {last}, {answer} is larger", f"{answer} is above {less}")
    if question.task == "count":
        checks = [(word, digit > 4) for word, digit in zip(words, scene.digits, strict=True)]
        return (
            ", ".join(f"{word} {'yes' if above else 'no'}" for word, above in checks),
            ", ".join(f"{word} is {'above' if above else 'not'}" for word, above in checks),
        )
    return (f"after {scene.sound} comes {answer}", f"{scene.sound}, then {answer}")


def _choices(task: str, answer: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Choices in the order shown; none where the answer is a number."""
    if task == "voice":
        return tuple(str(name) for name in rng.permutation(SPEAKERS))
    if task == "sound":
        others = [word for word in SOUNDS if word != answer]
        return tuple(str(word) for word in rng.permutation([answer, *rng.choice(others, 3, replace=False)]))
    if task == "order":
        return ("before", "between", "after")
    if task == "parity":
        return ("even", "odd") if rng.integers(2) else ("odd", "even")
    return ()


def _choices_text(question: Question) -> str:
    return f"Choices: {', '.join(question.choices)}" if question.choices else ""


def _parity(number: int) -> str:
    return "odd" if number % 2 else "even"
