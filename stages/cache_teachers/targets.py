"""Targets: each response as token ids of the student, once, for both teachers and the student alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from kdpipe.data.audio import decode
from kdpipe.data.errors import Rejected
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.manifest import Sample
from kdpipe.data.store.format import TARGET_IDS, ArraySpec
from kdpipe.data.stream import prefetch
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.cache_teachers.parts import building
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.prompt import fill, refuse_special
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.progress import progress
from kdpipe.stages.textualize.table import TraceRow, read_traces

THREADS = min(8, os.cpu_count() or 1)
"""Threads that decode clips and tokenize ahead."""


@dataclass(frozen=True)
class Target:
    """One sample's response, and what it needs around it.

    Attributes:
        ids: token ids, end token included.
        prompt: tokens of the student's prompt, audio included.
        frames: length of each clip at the student's rate.
    """

    ids: tuple[int, ...]
    prompt: int
    frames: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the student's whole sequence."""
        return self.prompt + len(self.ids)


def make_target(ctx: Context, encoder: Encoder, alignment: Alignment, sample: Sample, trace: TraceRow | None) -> Target:
    """Tokenizes a response and measures the student's sequence.

    Args:
        ctx: the run.
        encoder: of the student.
        alignment: ids that teachers share with the student.
        sample: the sample; its clips are decoded.
        trace: what the student shall write.

    Raises:
        Rejected: `trace_missing`, `special_token_in_text`, `target_not_shared`, `too_long`, or a reason of
            `kdpipe.data.audio.decode` or `Encoder.audio_tokens`.
    """
    student = ctx.config.student
    if trace is None or not trace.trace:
        raise Rejected("trace_missing", "textualize holds no trace for it")
    refuse_special((sample.question, *sample.choices, trace.trace), encoder.special)
    ids = encoder.target_ids(trace.trace)
    _refuse_unshared(ids, encoder, alignment)
    frames = tuple(
        len(decode(ref, rate=encoder.rate, start=sample.start, end=sample.end, max_seconds=ctx.config.data.max_seconds))
        for ref in sample.audio
    )
    text = encoder.prompt_text(fill(student.prompt, sample), system=student.system, clips=len(frames))
    target = Target(tuple(ids), len(encoder.prompt_ids(text, frames)), frames)
    refuse_long(target.prompt, len(ids), ctx.config.teachers.max_length)
    return target


def refuse_long(prompt: int, response: int, limit: int) -> None:
    """Rejects a sequence longer than `limit` tokens.

    Raises:
        Rejected: `too_long`.
    """
    if prompt + response > limit:
        raise Rejected(
            "too_long",
            f"{prompt + response} tokens (prompt {prompt}, response {response}) and teachers.max_length is {limit}",
        )


def make_targets(
    ctx: Context,
    ledger: Ledger,
    needs: Requirements,
    wants: Sequence[Wanted],
    samples: Mapping[str, Sample],
    traces: Ledger,
) -> None:
    """Makes and commits the targets of `wants`, part by part, in their order.

    Args:
        ctx: the run.
        ledger: of this stage.
        needs: what is asked of the teachers.
        wants: of the source `targets`.
        samples: by id.
        traces: the ledger of textualize.
    """
    if not wants:
        return
    encoder = Encoder(needs.student)
    ctx.recheck_model(needs.student.path)

    def load(found: Mapping[str, TraceRow], want: Wanted) -> Target | Rejected:
        try:
            return make_target(ctx, encoder, needs.alignment, samples[want.id], found.get(want.id))
        except Rejected as rejected:
            return rejected

    size = ctx.config.teachers.part_samples
    with progress(len(wants), "targets", "sample") as bar:
        for start in range(0, len(wants), size):
            part_wants = wants[start : start + size]
            rejects = []
            found = read_traces(traces, {want.id for want in part_wants})
            loaded = prefetch(part_wants, partial(load, found), depth=4 * THREADS, threads=THREADS)
            with (
                closing(loaded),
                building(ctx, ledger, "targets", [ArraySpec(TARGET_IDS, (), "uint32")], {}, {}) as part,
            ):
                for want, made in zip(part_wants, loaded, strict=True):
                    bar.update()
                    if isinstance(made, Rejected):
                        rejects.append(Reject(want.id, want.source, want.key, made.reason, made.detail))
                        continue
                    part.add(
                        [want],
                        {TARGET_IDS: np.array(made.ids, np.uint32)},
                        length=made.length,
                        content=digest([made.ids, made.length]),
                        info={"frames": made.frames},
                    )
                part.commit([samples[want.id] for want in part_wants], rejects=rejects)


def _refuse_unshared(ids: Sequence[int], encoder: Encoder, alignment: Alignment) -> None:
    masked = set(alignment.masked)
    for index in ids:
        if index >= alignment.valid or index in masked:
            token = encoder.tokenizer.convert_ids_to_tokens(index)
            raise Rejected(
                "target_not_shared",
                f"the response holds token {index} ({token!r}), which teacher and student do not share",
            )
