"""Samples of the evaluation with both answers, their traces and their clips; and what was forgotten."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from kdpipe.data.manifest import Sample
from kdpipe.pipeline.report.accuracy import BASE, STUDENT
from kdpipe.pipeline.report.reading import NotThere, Prediction, read_forgotten, read_predictions, samples_by_id
from kdpipe.pipeline.report.sound import Clip, Room, clip_of
from kdpipe.pipeline.report.values import text
from kdpipe.stages.base import Context

PER_KIND = 2
MOST_FORGOTTEN = 50
_MOST_CLIPS = 4  # of one sample
_ROOM = 4_000_000  # characters of sound in a page

KINDS = {
    "gained": "Gained: the base was wrong, the student is right",
    "forgotten": "Forgotten: the base was right, the student is wrong",
    "both right": "Both right",
    "both wrong": "Both wrong",
    "right": "Right",
    "wrong": "Wrong",
    "unscored": "Without an answer in the manifest",
}
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z_]{0,40})>")


@dataclass(frozen=True)
class Answer:
    """What one model said: who, its answer, whether it is right, its trace by section, and how it ended."""

    model: str
    prediction: str
    correct: bool | None
    sections: Sequence[tuple[str, str]]
    finish_reason: str
    tokens: int


@dataclass(frozen=True)
class Example:
    """One sample of the evaluation with what was answered; `clips` is None where the manifest has it not."""

    id: str
    task: str
    kind: str
    question: str
    choices: Sequence[str]
    answer: str
    answers: Sequence[Answer]
    clips: Sequence[Clip] | None


@dataclass(frozen=True)
class Forgotten:
    """One line of the list of what was forgotten."""

    id: str
    task: str
    question: str
    choices: Sequence[str]
    answer: str
    base: str
    student: str


def examples(ctx: Context, *, audio: bool) -> tuple[list[tuple[str, int, list[Example]]], str]:
    """Some samples of each kind, the same ones each time: those whose ids have the lowest SHA-256.

    Args:
        ctx: the run.
        audio: whether the page holds the sound.

    Returns:
        Kind, how many there are of it, and those shown; and what is wrong with the manifest, or an empty text.

    Raises:
        NotThere: there are no predictions.
        KdpipeError: they cannot be read.
    """
    by_id: dict[str, dict[str, Prediction]] = {}
    for one in read_predictions(ctx):
        by_id.setdefault(one.id, {})[one.source] = one
    samples, problem = samples_by_id(ctx)
    kinds: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name, answers in by_id.items():
        kinds[_kind(answers)].append(name)
    room = Room(_ROOM if audio else 0)
    found = []
    for kind, names in kinds.items():
        names.sort(key=lambda name: sha256(name.encode("utf-8", "surrogatepass")).digest())
        shown = [_example(ctx, kind, by_id[name], samples.get(name), room) for name in names[:PER_KIND]]
        if shown:
            found.append((KINDS[kind], len(names), shown))
    return found, problem


def _kind(answers: Mapping[str, Prediction]) -> str:
    if any(one.correct is None for one in answers.values()):
        return "unscored"
    base, student = answers.get(BASE), answers.get(STUDENT)
    if base is None or student is None:
        return "right" if next(iter(answers.values())).correct else "wrong"
    kinds = {
        (False, True): "gained",
        (True, False): "forgotten",
        (True, True): "both right",
        (False, False): "both wrong",
    }
    return kinds[bool(base.correct), bool(student.correct)]


def _example(ctx: Context, kind: str, answers: Mapping[str, Prediction], sample: Sample | None, room: Room) -> Example:
    one = next(iter(answers.values()))
    order = sorted(answers.values(), key=lambda answer: (answer.source != STUDENT, answer.source))
    return Example(
        id=one.id,
        task=one.task,
        kind=kind,
        question="" if sample is None else sample.question,
        choices=() if sample is None else sample.choices,
        answer=one.answer or "",
        answers=[_answer(answer) for answer in order],
        clips=None if sample is None else _clips(ctx, sample, room),
    )


def _answer(one: Prediction) -> Answer:
    return Answer(one.source, one.prediction, one.correct, sections_of(one.output), one.finish_reason, one.tokens)


def _clips(ctx: Context, sample: Sample, room: Room) -> list[Clip]:
    seconds = ctx.config.data.max_seconds
    return [
        clip_of(ref, start=sample.start, end=sample.end, max_seconds=seconds, room=room)
        for ref in sample.audio[:_MOST_CLIPS]
    ]


def sections_of(output: str) -> list[tuple[str, str]]:
    """The texts of an output, each under the tag that stands before it; what has none, under an empty name.

    Reads broken outputs too: a tag that is never closed holds all that follows up to the next.
    """
    found, name, at = [], "", 0
    for tag in _TAG.finditer(output):
        found.append((name, output[at : tag.start()].strip()))
        name, at = ("" if tag[1] else tag[2].upper()), tag.end()
    found.append((name, output[at:].strip()))
    return [(name, body) for name, body in found if body]


def forgotten(ctx: Context) -> tuple[list[Forgotten], int]:
    """What the base answered rightly and the student does not: the first 50, and how many there are.

    Reads evaluate/forgotten.jsonl, or finds them in the predictions where that file is not there.

    Raises:
        NotThere: nothing was evaluated.
        KdpipeError: the file cannot be read.
    """
    try:
        found = [
            Forgotten(
                id=text(line.get("id")),
                task=text(line.get("task")),
                question=text(line.get("question")),
                choices=tuple(map(str, choices)) if isinstance(choices := line.get("choices"), list) else (),
                answer=text(line.get("answer")),
                base=text(line.get("base")),
                student=text(line.get("student")),
            )
            for line in read_forgotten(ctx)
        ]
    except NotThere:
        found = list(_from_predictions(ctx))
    return found[:MOST_FORGOTTEN], len(found)


def _from_predictions(ctx: Context) -> Iterable[Forgotten]:
    predictions = read_predictions(ctx)
    right = {one.id: one for one in predictions if one.source == BASE and one.correct}
    samples, _ = samples_by_id(ctx)
    for one in predictions:
        base, sample = right.get(one.id), samples.get(one.id)
        if one.source == STUDENT and one.correct is False and base is not None:
            question, choices = ("", ()) if sample is None else (sample.question, sample.choices)
            answers = one.answer or "", base.prediction, one.prediction
            yield Forgotten(one.id, one.task, question, choices, *answers)
