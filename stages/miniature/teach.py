"""Teaches the miniatures: a textual teacher that reasons well, and a base student that hears well but reasons little.

Prompts, tokens and features are made by the code that makes them at run time. Both models learn from freshly sampled
scenes whose tone sequences never occur in the test split. The student first learns to name the tone in each audio
token's 40 ms through its encoder; without that, next-token training stays on a plateau for minutes.
"""

import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from kdpipe.data.errors import KdpipeError
from kdpipe.stages.config import ModelConfig
from kdpipe.stages.miniature import models, world
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.models.inputs import Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model

Report = Callable[[str], None]

TOKEN_SECONDS = 0.04
"""Time that one audio token covers."""
LONGEST_RESPONSE = 80
"""Tokens; the longest gold trace has about 65."""
_ANSWER = re.compile(r"<RESPONSE>(.*?)</RESPONSE>")


@dataclass(frozen=True)
class _Clip:
    """A scene that was heard: its features, the length of its audio, and the tone that sounds in each audio token."""

    scene: world.Scene
    question: world.Question
    frames: int
    features: dict[str, torch.Tensor]
    tones: torch.Tensor


def make_taught_models(folder: Path, *, seed: int, report: Report) -> dict[str, float]:
    """Makes and teaches what the demo needs: `folder/teacher` (Qwen3) and `folder/student` (Qwen2.5-Omni).

    Both are taught at once, each in a process of its own with one thread: models this small gain little from threads,
    and the outcome does not depend on the number of cores.

    Args:
        folder: Receives both models.
        seed: Source of weights, scenes and order.
        report: Receives lines on the progress, in those processes; a function at the top level of a module.

    Returns:
        `teacher.*` and `student.*` scores of the two teach functions.
    """
    text_tokenizer, audio_tokenizer = models.make_tokenizers(seed=seed)
    teacher = models.make_qwen3(folder / "teacher", tokenizer=text_tokenizer, seed=seed)
    student = models.make_qwen2_5_omni(folder / "student", tokenizer=audio_tokenizer, seed=seed)
    with ProcessPoolExecutor(2, get_context("spawn"), begin_lesson) as pool:
        lessons = {
            "teacher": pool.submit(teach_textual_teacher, teacher, seed=seed, report=report),
            "student": pool.submit(teach_student, student, seed=seed, report=report),
        }
        scores = {model: lesson.result() for model, lesson in lessons.items()}
    return {f"{model}.{name}": value for model, values in scores.items() for name, value in values.items()}


def teach_textual_teacher(
    folder: Path, *, seed: int, report: Report, steps: int = 250, batch: int = 32, rate: float = 2e-3
) -> dict[str, float]:
    """Trains a Qwen3 miniature, in place, to write trace and answer from description and question.

    Args:
        folder: A model of `make_qwen3`.
        seed: Seed of scenes and order.
        report: Receives lines on the progress.
        steps: Optimizer steps.
        batch: Samples a step, all of them new.
        rate: Peak learning rate.

    Returns:
        `accuracy`: share of 200 held-out questions answered right under greedy decoding.
    """
    teacher, encoder = open_lesson(folder, "text")
    rng = np.random.default_rng([seed, 0])

    def prompt(scene: world.Scene, question: world.Question) -> list[int]:
        text = world.teacher_text(world.describe(scene), question)
        return encoder.prompt_ids(encoder.prompt_text(text))

    def loss(step: int) -> torch.Tensor:
        lessons = []
        for _ in range(batch):
            scene, question = world.sample_question(rng, held_out=False)
            lessons.append(Example("", prompt(scene, question), encoder.target_ids(world.trace(scene, question))))
        return next_token_loss(teacher, encoder, lessons)

    train_steps(teacher.model.parameters(), loss, steps, rate, "teacher: traces", report)
    models.save_weights(teacher.model, folder)
    exam = [world.sample_question(np.random.default_rng([seed, 1, row]), held_out=True) for row in range(200)]
    written = write_greedily(teacher, encoder, [Example("", prompt(scene, question)) for scene, question in exam])
    scores = {
        "accuracy": _mean(answer_in(text) == question.answer for text, (_, question) in zip(written, exam, strict=True))
    }
    report(f"teacher: answers {scores['accuracy']:.0%} of held-out questions")
    return scores


def teach_student(
    folder: Path,
    *,
    seed: int,
    report: Report,
    clips: int = 1200,
    frame_steps: int = 200,
    text_steps: int = 280,
    batch: int = 32,
    rate: float = 2e-3,
    questions: int = 160,
    question_share: float = 0.3,
) -> dict[str, float]:
    """Trains a Qwen2.5-Omni miniature, in place, to hear: it describes well, and has seen few questions.

    Args:
        folder: A model of `make_qwen2_5_omni`.
        seed: Seed of scenes and order.
        report: Receives lines on the progress.
        clips: Clips to learn from.
        frame_steps: Optimizer steps in which the encoder alone learns which tone sounds in each audio token.
        text_steps: Optimizer steps in which the whole model learns to write.
        batch: Samples a step.
        rate: Peak learning rate of both.
        questions: Clips whose question and gold trace are shown too; with more, the student reasons better.
        question_share: Share of those among the samples of `text_steps`.

    Returns:
        Of 100 held-out clips under greedy decoding: `describes`, the share described exactly; `accuracy`, the share of
        questions answered right; `formed`, the share of responses that hold an answer.

    Raises:
        KdpipeError: `folder` holds a model of another family.
    """
    student, encoder = open_lesson(folder, "qwen2_5_omni")
    lessons = _listen(encoder, clips, held_out=False, seed=seed)
    rng = np.random.default_rng([seed, 2])
    torch.manual_seed(seed)
    naming = torch.nn.Linear(student.width, world.PITCHES + 1)
    network: Any = student.model

    def frame_loss(step: int) -> torch.Tensor:
        heard = [lessons[row] for row in rng.integers(clips, size=batch)]
        merged = encoder.collate([Example("", [], [], clip.features) for clip in heard]).features
        states = network.get_audio_features(**merged).last_hidden_state
        return functional.cross_entropy(naming(states), torch.cat([clip.tones for clip in heard]))

    def text_loss(step: int) -> torch.Tensor:
        examples = []
        for asked in rng.random(batch) < question_share:
            clip = lessons[rng.integers(questions if asked else clips)]
            response = world.trace(clip.scene, clip.question) if asked else world.describe(clip.scene)
            example = _question(encoder, clip) if asked else _description(encoder, clip)
            examples.append(replace(example, target_ids=encoder.target_ids(response)))
        return next_token_loss(student, encoder, examples)

    tower = network.audio_tower
    train_steps([*tower.parameters(), *naming.parameters()], frame_loss, frame_steps, rate, "student: tones", report)
    train_steps(student.model.parameters(), text_loss, text_steps, rate, "student: texts", report)
    models.save_weights(student.model, folder)

    exam = _listen(encoder, 100, held_out=True, seed=seed)
    described = write_greedily(student, encoder, [_description(encoder, clip) for clip in exam])
    answered = [
        answer_in(text) for text in write_greedily(student, encoder, [_question(encoder, clip) for clip in exam])
    ]
    scores = {
        "describes": _mean(text == world.describe(clip.scene) for text, clip in zip(described, exam, strict=True)),
        "accuracy": _mean(answer == clip.question.answer for answer, clip in zip(answered, exam, strict=True)),
        "formed": _mean(answer is not None for answer in answered),
    }
    report("student: describes {describes:.0%} of held-out clips exactly, answers {accuracy:.0%}".format(**scores))
    return scores


def begin_lesson() -> None:
    """Sets up a process for one lesson, which ends when the process that asked for it does."""
    torch.set_num_threads(1)
    asker = parent_process()
    assert asker is not None

    def end_with_asker() -> None:
        asker.join()
        os._exit(1)

    threading.Thread(target=end_with_asker, daemon=True).start()


def open_lesson(folder: Path, family: str) -> tuple[LoadedModel, Encoder]:
    """Loads a miniature for training on the CPU.

    Raises:
        KdpipeError: `folder` holds a model of another family.
    """
    found = resolve(ModelConfig(str(folder.resolve()), dtype="float32"), Path())
    if found.family != family:
        raise KdpipeError(f"{folder}: is a {found.family} model, and this lesson is for {family}. Name another folder.")
    return load_model(found, device="cpu", train=True), Encoder(found)


def _listen(encoder: Encoder, count: int, *, held_out: bool, seed: int) -> list[_Clip]:
    """Samples scenes with questions and renders them, all features in one go."""
    drawn = []
    for row in range(count):
        rng = np.random.default_rng([seed, 3 + held_out, row])
        scene, question = world.sample_question(rng, held_out=held_out)
        drawn.append((scene, question, *world.render(scene, rng)))
    features = encoder.features([samples for _, _, samples, _ in drawn])
    clips = []
    for row, (scene, question, samples, tone_at) in enumerate(drawn):
        centres = (np.arange(encoder.audio_tokens(len(samples))) + 0.5) * TOKEN_SECONDS * encoder.rate
        tones = torch.from_numpy(tone_at[np.minimum(centres.astype(int), len(tone_at) - 1)])
        own = {name: value[row : row + 1] for name, value in features.items()}
        clips.append(_Clip(scene, question, len(samples), own, tones))
    return clips


def _description(encoder: Encoder, clip: _Clip) -> Example:
    return _heard(encoder, clip, world.DESCRIBE_PROMPT)


def _question(encoder: Encoder, clip: _Clip) -> Example:
    return _heard(encoder, clip, world.question_text(clip.question))


def _heard(encoder: Encoder, clip: _Clip, text: str) -> Example:
    prompt = encoder.prompt_ids(encoder.prompt_text(text, clips=1), [clip.frames])
    return Example("", prompt, features=clip.features)


def next_token_loss(model: LoadedModel, encoder: Encoder, examples: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy of the responses' tokens (nats)."""
    batch = encoder.collate(examples)
    hidden = model.hidden(batch).flatten(0, 1)[batch.response_rows]
    return functional.cross_entropy(functional.linear(hidden, model.head_weight), batch.targets)


def train_steps(
    parameters: Iterable[torch.nn.Parameter],
    loss: Callable[[int], torch.Tensor],
    steps: int,
    rate: float,
    name: str,
    report: Report,
) -> None:
    """AdamW with 20 steps of warm-up and a cosine to a twentieth of the peak rate."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.98))
    for step in range(steps):
        cosine = 0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * min(cosine, (step + 1) / 20)
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            report(f"{name}: step {step + 1} of {steps}, loss {value.item():.3f}")


@torch.no_grad()
def write_greedily(model: LoadedModel, encoder: Encoder, examples: Sequence[Example]) -> list[str]:
    """Greedy responses, without the end token."""
    longest = max(example.length for example in examples)
    batch = encoder.collate(examples)
    # Generation continues at the right edge, so the padding goes to the left.
    shifts = longest - batch.attention_mask.sum(1)
    inputs = {
        name: torch.stack([row.roll(int(shift)) for row, shift in zip(value, shifts, strict=True)])
        for name, value in (("input_ids", batch.input_ids), ("attention_mask", batch.attention_mask))
    }
    model.model.eval()
    network: Any = model.model
    written = network.generate(
        **inputs, **batch.features, max_new_tokens=LONGEST_RESPONSE, do_sample=False, eos_token_id=encoder.end_id
    )
    return encoder.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)


def answer_in(text: str) -> str | None:
    """What stands in the response of a trace."""
    found = _ANSWER.search(text)
    return found[1] if found else None


def _mean(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
