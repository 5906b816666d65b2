"""One run of the stage: targets first, then one teacher at a time, each freed before the next is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kdpipe.data.audio import decode
from kdpipe.data.errors import KdpipeError, ModelError, Rejected
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.ledger_rows import Row
from kdpipe.data.manifest import Sample
from kdpipe.data.store.format import TARGET_IDS
from kdpipe.data.store.reader import Store
from kdpipe.data.stream import prefetch
from kdpipe.stages.base import Context, Wanted, covers
from kdpipe.stages.cache_teachers.capture import Job
from kdpipe.stages.cache_teachers.parts import adopt
from kdpipe.stages.cache_teachers.requirements import Requirements, requirements
from kdpipe.stages.cache_teachers.shape import WINDOW_PARTS, together
from kdpipe.stages.cache_teachers.stage import STAGE, UPSTREAM
from kdpipe.stages.cache_teachers.targets import THREADS, make_targets, refuse_long
from kdpipe.stages.cache_teachers.teach import Built, Task, Teacher, write_served
from kdpipe.stages.models.inputs import AUDIO_TOKEN, Encoder, Example
from kdpipe.stages.models.prompt import fill, refuse_special
from kdpipe.stages.textualize.table import read_descriptions


@dataclass(frozen=True)
class Work:
    """What all sources share.

    Attributes:
        ctx: the run.
        ledger: of this stage.
        traces: the ledger of textualize.
        needs: what is asked of the teachers.
        samples: by id, in the manifest's order.
        places: place of each in the manifest.
        store: what is there.
    """

    ctx: Context
    ledger: Ledger
    traces: Ledger
    needs: Requirements
    samples: Mapping[str, Sample]
    places: Mapping[str, int]
    store: Store

    @staticmethod
    def of(ctx: Context) -> Work:
        ledger = ctx.ledger(STAGE.name)
        samples = {sample.id: sample for sample in ctx.samples(ctx.config.data.train_split)}
        places = {sample: place for place, sample in enumerate(samples)}
        store = Store(ledger.parts, ledger, open_parts=WINDOW_PARTS)  # targets are read in the order of the manifest
        return Work(ctx, ledger, ctx.ledger(UPSTREAM), requirements(ctx), samples, places, store)


def run(ctx: Context, todo: Sequence[Wanted]) -> None:
    """Makes and commits `todo`, part by part.

    Args:
        ctx: the run.
        todo: nothing pending.

    Raises:
        KdpipeError: a model cannot be loaded, the tokenizers disagree, or an input changed meanwhile.
    """
    work = Work.of(ctx)
    ledger, needs = work.ledger, work.needs
    try:
        _make(work, adopt(ledger, todo))
    finally:
        ledger.flush()
    known = {row.id for row in work.traces.rows()} & work.samples.keys()
    rejected = {r.id for r in ledger.rejects() if r.source in needs.sources} & known
    ctx.say(f"cache-teachers: {len(known) - len(rejected)} samples are cached, {len(rejected)} rejected")


def _make(work: Work, todo: Sequence[Wanted]) -> None:
    ledger, needs = work.ledger, work.needs
    wants: dict[str, list[Wanted]] = {source: [] for source in needs.sources}
    for want in todo:
        wants[want.source].append(want)
    make_targets(work.ctx, ledger, needs, wants["targets"], work.samples, work.traces)
    later = {
        source: [want for want in asked if ledger.get(want.id, "targets") is not None]
        for source, asked in wants.items()
    }
    if later.get("textual"):
        _textual(work, later["textual"])
    if later.get("acoustic") or later.get("acoustic_top"):
        _acoustic(work, later.get("acoustic", []), later.get("acoustic_top", []))


def _textual(work: Work, wants: Sequence[Wanted]) -> None:
    folder, asks = work.needs.textual, work.ctx.config.teachers.textual
    assert folder is not None
    encoder = Encoder(folder)

    def build(wants: Sequence[Wanted]) -> Built:
        said = read_descriptions(work.traces, {want.id for want in wants})
        return _build_all(wants, lambda want: read_job(work, encoder, want, said[want.id]))

    task = Task("textual", wants, "response", build)
    if asks.engine == "vllm":
        write_served(work.ctx, work.ledger, work.needs, folder, work.places, task)
        return
    with Teacher(work.ctx, work.ledger, work.needs, folder, encoder, work.places) as teacher:
        teacher.write(task)


def _acoustic(work: Work, heard: Sequence[Wanted], answered: Sequence[Wanted]) -> None:
    folder = work.needs.acoustic
    assert folder is not None
    encoder = Encoder(folder)

    def build_heard(wants: Sequence[Wanted]) -> Built:
        by_key: dict[str, list[Wanted]] = {}
        for want in _link_known(work, wants):
            by_key.setdefault(want.key, []).append(want)
        return _build_all(list(by_key.values()), lambda wants: hear_job(work, encoder, wants))

    def build_answered(wants: Sequence[Wanted]) -> Built:
        return _build_all(wants, lambda want: answer_job(work, encoder, want))

    def features(job: Job) -> Example:
        return with_features(work, encoder, job)

    with Teacher(work.ctx, work.ledger, work.needs, folder, encoder, work.places) as teacher:
        teacher.write(Task("acoustic", heard, "audio", build_heard, features, ahead=False))
        teacher.write(Task("acoustic_top", answered, "response", build_answered, features))


def read_job(work: Work, encoder: Encoder, want: Wanted, description: str) -> Job:
    """What the teacher that reads makes of a sample.

    Raises:
        Rejected: `special_token_in_text` or `too_long`.
    """
    sample, asks = work.samples[want.id], work.ctx.config.teachers.textual
    refuse_special((sample.question, *sample.choices, description), encoder.special)
    text = encoder.prompt_text(fill(asks.prompt, sample, description), system=asks.system, **asks.chat_template_kwargs)
    example = _with_targets(work, sample, encoder.prompt_ids(text))
    return Job((want,), (sample,), example, _kept_too(work, [want]))


def hear_job(work: Work, encoder: Encoder, wants: Sequence[Wanted]) -> Job:
    """What the teacher that hears makes of the clips that samples share, all under one key."""
    first, system = wants[0], work.ctx.config.student.system
    frames = _frames(work, first.id)
    prompt_ids = encoder.prompt_ids(_audio_prefix(encoder, system, len(frames)), frames)
    return _heard(work, encoder, wants, Example(first.key, np.array(prompt_ids, np.int32)))


def answer_job(work: Work, encoder: Encoder, want: Wanted) -> Job:
    """What the teacher that hears makes of a sample's response.

    Raises:
        Rejected: `too_long`.
    """
    sample, student, frames = work.samples[want.id], work.ctx.config.student, _frames(work, want.id)
    text = encoder.prompt_text(fill(student.prompt, sample), system=student.system, clips=len(frames))
    return _heard(work, encoder, [want], _with_targets(work, sample, encoder.prompt_ids(text, frames)))


def with_features(work: Work, encoder: Encoder, job: Job) -> Example:
    """The example of a job with the features of its clips.

    Raises:
        KdpipeError: a clip cannot be read any more, or has another length than its targets were made for.
    """
    sample = job.samples[0]
    return replace(job.example, features=_features(work.ctx, encoder, sample, _frames(work, sample.id)))


def _heard(work: Work, encoder: Encoder, wants: Sequence[Wanted], example: Example) -> Job:
    tower = sum(encoder.tower_positions(frames) for frames in _frames(work, wants[0].id))
    samples = tuple(work.samples[want.id] for want in wants)
    return Job(tuple(wants), samples, example, _kept_too(work, wants), tower)


def _build_all(items: Sequence[Any], build: Callable[[Any], Job]) -> Built:
    """Builds the jobs in threads; what cannot be built is rejected."""

    def attempt(item: Any) -> Job | list[Reject]:
        try:
            return build(item)
        except Rejected as rejected:
            wants = item if isinstance(item, list) else [item]
            return [Reject(want.id, want.source, want.key, rejected.reason, rejected.detail) for want in wants]

    jobs: list[Job] = []
    covers: dict[str, Mapping[str, Any]] = {}
    rejects: list[Reject] = []
    for made in prefetch(items, attempt, depth=16 * THREADS, threads=THREADS):
        if isinstance(made, Job):
            jobs.append(replace(made, cover=covers.setdefault(repr(made.cover), made.cover)))
        else:
            rejects += made
    return Built(jobs, rejects)


def _with_targets(work: Work, sample: Sample, prompt_ids: Sequence[int]) -> Example:
    part, row = work.store.get(sample.id, "targets")
    ids = part.read(row, [TARGET_IDS])[TARGET_IDS]
    refuse_long(len(prompt_ids), len(ids), work.ctx.config.teachers.max_length)
    # Examples of all samples wait together to be sorted; lists of integers would take nine times the memory.
    return Example(sample.id, np.array(prompt_ids, np.int32), ids.astype(np.int32))


def _frames(work: Work, sample: str) -> Sequence[int]:
    part, row = work.store.get(sample, "targets")
    return part.units[row]["frames"]


def _features(ctx: Context, encoder: Encoder, sample: Sample, frames: Sequence[int]) -> dict[str, torch.Tensor]:
    seconds = ctx.config.data.max_seconds
    try:
        clips = [
            decode(ref, rate=encoder.rate, start=sample.start, end=sample.end, max_seconds=seconds)
            for ref in sample.audio
        ]
        if [len(clip) for clip in clips] != list(frames):
            raise KdpipeError(
                f"sample {sample.id!r}: a clip has another length than a moment ago: it changed while the stage was "
                "running; nothing made from it was recorded. Run the command again."
            )
        return encoder.features(clips)
    except Rejected as rejected:
        raise KdpipeError(
            f"sample {sample.id!r}: {rejected.detail} ({rejected.reason}); it could be read a moment ago. "
            "Run the command again."
        ) from None


def _audio_prefix(encoder: Encoder, system: str | None, clips: int) -> str:
    """The prompt up to its last clip, which must not depend on the question.

    Raises:
        ModelError: the chat template puts the text before the clips.
    """
    prefixes = {
        text[: text.rindex(AUDIO_TOKEN) + len(AUDIO_TOKEN)]
        for text in (encoder.prompt_text(words, system=system, clips=clips) for words in ("a", "b c"))
    }
    if len(prefixes) != 1:
        raise ModelError(
            f"{encoder.folder.name}: its chat template puts the question before the audio, so that acoustic states "
            "depend on it; not supported."
        )
    return prefixes.pop()


def _kept_too(work: Work, wants: Sequence[Wanted]) -> dict[str, Any]:
    """What wants of one key ask for, and what the rows to be replaced hold: another run may use that."""
    rows = [work.ledger.get(want.id, want.source) for want in wants]
    held = [row.cover for row in rows if row is not None and row.key == wants[0].key]
    # In one order, since what the ledger gives back is sorted: the same work gives the same bytes.
    return dict(sorted(together([*held, *(want.cover for want in wants)]).items()))


def _link_known(work: Work, wants: Sequence[Wanted]) -> list[Wanted]:
    """Points wants at units that other samples with the same clips have already; gives those that are left."""
    asked, lost = {want.key for want in wants}, work.ledger.lost_parts()
    known: dict[str, Row] = {
        row.key: row
        for row in work.ledger.rows()
        if row.source == "acoustic" and row.key in asked and row.part not in lost
    }
    rows, left = [], []
    for want in wants:
        row = known.get(want.key)
        if row is not None and covers(row.cover, want.cover):
            rows.append(replace(row, id=want.id, fields=want.fields))
        else:
            left.append(want)
    if rows:
        work.ctx.recheck([work.samples[row.id] for row in rows])
        work.ledger.commit(rows, soon=True)
    return left
