"""Makes and teaches the experiment's models: a base student that hears but cannot reason, and a textual teacher.

The teacher (Qwen3) reads descriptions and learns every task. The student (Qwen2.5-Omni) first learns to name what
sounds, and who speaks, in each audio token's 40 ms; then to describe clips and to answer hearing questions. It never
sees a reasoning question. Both learn from texts and clips drawn on the spot; the clips hold training recordings only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from experiment import world
from experiment.recordings import SPEAKERS, Recordings
from kdpipe.data.answers import matches
from kdpipe.stages.miniature import models
from kdpipe.stages.miniature.teach import (
    TOKEN_SECONDS,
    answer_in,
    begin_lesson,
    next_token_loss,
    open_lesson,
    train_steps,
    write_greedily,
)
from kdpipe.stages.models.inputs import Encoder, Example

Report = Callable[[str], None]


@dataclass(frozen=True)
class Effort:
    """How much the models are taught; optimizer steps of 32 samples each.

    Attributes:
        clips: clips the student learns from.
        frame_steps: steps in which encoder and projector learn to name what sounds.
        describe_steps: steps in which the student learns to describe.
        text_steps: steps in which it learns to answer hearing questions as well.
        teacher_steps: steps of the teacher.
        exam: questions that each is asked at the end.
    """

    clips: int = 3000
    frame_steps: int = 600
    describe_steps: int = 400
    text_steps: int = 1000
    teacher_steps: int = 700
    exam: int = 180


_HARDEST = "sum"
"""A task that the teacher sees oftener than others."""


@dataclass(frozen=True)
class _Heard:
    """A clip with its question: features, length, and for each audio token what sounds and who speaks."""

    scene: world.Scene
    question: world.Question
    frames: int
    features: dict[str, torch.Tensor]
    events: torch.Tensor
    voices: torch.Tensor


def make_models(folder: Path, recordings: Path, effort: Effort, *, seed: int, report: Report) -> dict[str, float]:
    """Makes and teaches `folder/teacher` and `folder/student`, at once, each in a process with one thread.

    Args:
        folder: receives both models.
        recordings: holds `fsdd/` and `esc10/`.
        effort: how much they are taught.
        seed: source of weights, scenes and order.
        report: receives lines on the progress, in those processes; a function at the top level of a module.

    Returns:
        What each model can do on scenes of validation recordings.
    """
    text_tokenizer, audio_tokenizer = models.make_tokenizers(texts=list(world.texts(400, seed=seed)))
    teacher = models.make_qwen3(folder / "teacher", tokenizer=text_tokenizer, seed=seed)
    student = models.make_qwen2_5_omni(
        folder / "student", tokenizer=audio_tokenizer, hidden=128, encoder_hidden=128, encoder_layers=3, seed=seed
    )
    with ProcessPoolExecutor(2, get_context("spawn"), begin_lesson) as pool:
        lessons = [
            pool.submit(teach_teacher, teacher, effort, seed=seed, report=report),
            pool.submit(teach_student, student, recordings, effort, seed=seed, report=report),
        ]
        return {name: value for lesson in lessons for name, value in lesson.result().items()}


def teach_teacher(folder: Path, effort: Effort, *, seed: int, report: Report, batch: int = 32) -> dict[str, float]:
    """Trains a Qwen3 miniature, in place, to write trace and answer from description and question."""
    teacher, encoder = open_lesson(folder, "text")
    rng = np.random.default_rng([seed, 0])

    def prompt(scene: world.Scene, question: world.Question) -> list[int]:
        return encoder.prompt_ids(encoder.prompt_text(world.teacher_text(world.describe(scene), question)))

    def loss(step: int) -> torch.Tensor:
        lessons = []
        for _ in range(batch):
            task = _HARDEST if rng.random() < 0.2 else None
            scene, question = world.sample_question(rng, task)
            lessons.append(Example("", prompt(scene, question), encoder.target_ids(world.trace(scene, question, rng))))
        return next_token_loss(teacher, encoder, lessons)

    train_steps(teacher.model.parameters(), loss, effort.teacher_steps, 2e-3, "teacher: traces", report)
    models.save_weights(teacher.model, folder)
    exam = [world.sample_question(np.random.default_rng([seed, 1, row])) for row in range(effort.exam)]
    written = write_greedily(teacher, encoder, [Example("", prompt(*asked)) for asked in exam])
    return _graded("teacher", written, [question for _, question in exam], report)


def teach_student(
    folder: Path, recordings: Path, effort: Effort, *, seed: int, report: Report, batch: int = 32, rate: float = 2e-3
) -> dict[str, float]:
    """Trains a Qwen2.5-Omni miniature, in place, to hear, to describe, and to answer hearing questions."""
    student, encoder = open_lesson(folder, "qwen2_5_omni")
    known = Recordings(recordings, "train")
    lessons = _listen(encoder, known, effort.clips, world.HEARING, [seed, 2])
    rng = np.random.default_rng([seed, 3])
    torch.manual_seed(seed)
    naming = torch.nn.Linear(student.width, world.EVENTS + 1 + len(SPEAKERS))
    network: Any = student.model

    def frame_loss(step: int) -> torch.Tensor:
        heard = [lessons[row] for row in rng.integers(len(lessons), size=batch)]
        merged = encoder.collate([Example("", [], [], clip.features) for clip in heard]).features
        scores = naming(network.get_audio_features(**merged).last_hidden_state)
        events = functional.cross_entropy(scores[:, : world.EVENTS], torch.cat([clip.events for clip in heard]))
        voices = functional.cross_entropy(scores[:, world.EVENTS :], torch.cat([clip.voices for clip in heard]))
        return events + voices

    def text_loss(share: float) -> torch.Tensor:
        """Of a batch in which this share of the clips is described, and a question is asked of the others."""
        examples = []
        for describes in rng.random(batch) < share:
            clip = lessons[rng.integers(len(lessons))]
            response = world.describe(clip.scene) if describes else world.trace(clip.scene, clip.question, rng)
            example = _described(encoder, clip) if describes else _asked(encoder, clip)
            examples.append(replace(example, target_ids=encoder.target_ids(response)))
        return next_token_loss(student, encoder, examples)

    tower = [*network.audio_tower.parameters(), *naming.parameters()]
    train_steps(tower, frame_loss, effort.frame_steps, rate, "student: what sounds", report)
    # From here on the encoder stays as it is: a text stack that cannot read it yet would teach it to forget the digits.
    network.audio_tower.requires_grad_(False)
    every = list(student.model.parameters())
    train_steps(every, lambda _: text_loss(1.0), effort.describe_steps, rate, "student: descriptions", report)
    train_steps(every, lambda _: text_loss(0.4), effort.text_steps, rate, "student: questions", report)
    models.save_weights(student.model, folder)

    exam = _listen(encoder, Recordings(recordings, "val"), effort.exam, world.TASKS, [seed, 4])
    described = write_greedily(student, encoder, [_described(encoder, clip) for clip in exam])
    right = np.mean([text == world.describe(clip.scene) for text, clip in zip(described, exam, strict=True)])
    report(f"student: describes {right:.0%} of validation clips exactly")
    written = write_greedily(student, encoder, [_asked(encoder, clip) for clip in exam])
    return _graded("student", written, [clip.question for clip in exam], report) | {"student.describes": float(right)}


def _graded(name: str, written: Sequence[str], questions: Sequence[world.Question], report: Report) -> dict[str, float]:
    right: dict[str, list[bool]] = {}
    for text, question in zip(written, questions, strict=True):
        right.setdefault(question.task, []).append(
            matches(question.answer, answer_in(text) or "", question.choices),
        )
    scores = {f"{name}.{task}": float(np.mean(right[task])) for task in world.TASKS if task in right}
    report(f"{name} on validation: " + ", ".join(f"{task} {value:.0%}" for task, value in scores.items()))
    return scores


def _listen(
    encoder: Encoder, recordings: Recordings, count: int, tasks: Sequence[str], seed: Sequence[int]
) -> list[_Heard]:
    """Draws scenes with questions and renders them, all features in one go."""
    drawn = []
    for row in range(count):
        rng = np.random.default_rng([*seed, row])
        scene, question = world.sample_question(rng, tasks[row % len(tasks)])
        drawn.append((scene, question, world.render(scene, recordings, rng)))
    features = encoder.features([clip.samples for _, _, clip in drawn])
    heard = []
    for row, (scene, question, clip) in enumerate(drawn):
        frames = len(clip.samples)
        centres = (np.arange(encoder.audio_tokens(frames)) + 0.5) * TOKEN_SECONDS * encoder.rate
        events = torch.from_numpy(clip.events[np.minimum(centres.astype(int), frames - 1)])
        spoken = (events >= 1) & (events <= len(world.DIGITS))
        voices = torch.where(spoken, 1 + SPEAKERS.index(scene.speaker), 0)
        own = {name: value[row : row + 1] for name, value in features.items()}
        heard.append(_Heard(scene, question, frames, own, events, voices))
    return heard


def _described(encoder: Encoder, clip: _Heard) -> Example:
    return _prompted(encoder, clip, world.DESCRIBE_PROMPT)


def _asked(encoder: Encoder, clip: _Heard) -> Example:
    return _prompted(encoder, clip, world.question_text(clip.question))


def _prompted(encoder: Encoder, clip: _Heard, text: str) -> Example:
    prompt = encoder.prompt_ids(encoder.prompt_text(text, clips=1), [clip.frames])
    return Example("", prompt, features=clip.features)
