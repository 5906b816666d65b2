"""A teacher at work: windows of samples, cut into parts, cut into batches; written while the next batch is computed.

Samples are taken in windows of `WINDOW_PARTS` parts, by their place in the manifest: no more than a window's prompts
are in memory, and each window is sorted by length, so that batches have next to no padding. Windows, parts and batches
depend on the manifest and on what is stored, not on where an earlier run stopped: the same work gives the same bytes,
and so does the rest after an interruption.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from tqdm import tqdm

from kdpipe.data.errors import KdpipeError, Rejected
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_files import Reject
from kdpipe.data.store.distributions import narrowed
from kdpipe.data.store.format import TOP, is_low_rank, under
from kdpipe.data.stream import prefetch
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.cache_teachers.basis import SAMPLES, fit_bases, grams_of, known_bases
from kdpipe.stages.cache_teachers.capture import Job, Scribe, batches
from kdpipe.stages.cache_teachers.cost.speed import record_speed
from kdpipe.stages.cache_teachers.record import Recorder
from kdpipe.stages.cache_teachers.requirements import Requirements
from kdpipe.stages.cache_teachers.served import ServedTeacher, serve
from kdpipe.stages.cache_teachers.shape import WINDOW_PARTS, Shape
from kdpipe.stages.cache_teachers.targets import THREADS
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel
from kdpipe.stages.models.parallel import open_teacher
from kdpipe.stages.oom import out_of_memory
from kdpipe.stages.progress import progress

T = TypeVar("T")


class Built(NamedTuple):
    """Jobs, and what was rejected."""

    jobs: list[Job]
    rejects: list[Reject]


@dataclass(frozen=True)
class Task:
    """What a teacher is to make.

    Attributes:
        source: `textual`, `acoustic` or `acoustic_top`.
        wants: the samples.
        over: which positions it is about.
        build: makes the jobs of some wants, and says which cannot be made; records what is there already.
        features: adds the clips' features to a job's example, in threads ahead; None for text.
        ahead: a window may be built while the one before it is made: it does not matter what is there already.
    """

    source: str
    wants: Sequence[Wanted]
    over: Literal["response", "audio"]
    build: Callable[[Sequence[Wanted]], Built]
    features: Callable[[Job], Example] | None = None
    ahead: bool = True

    def windows(
        self, places: Mapping[str, int], part_samples: int
    ) -> Generator[tuple[Sequence[Wanted], Built], None, None]:
        """Its windows, and what is built of each."""
        cut = windows(self.wants, places, part_samples)
        return prefetch(cut, lambda window: (window, self.build(window)), depth=2, threads=int(self.ahead))


class Teacher:
    """A teacher that is loaded when there is something to do; a context manager, after which its memory is free.

    Args:
        ctx: the run.
        ledger: takes the parts.
        needs: what is asked of the teachers.
        folder: the teacher.
        encoder: its own.
        places: place of each sample in the manifest.
    """

    def __init__(
        self,
        ctx: Context,
        ledger: Ledger,
        needs: Requirements,
        folder: ModelFolder,
        encoder: Encoder,
        places: Mapping[str, int],
    ):
        self._ctx = ctx
        self._ledger = ledger
        self._needs = needs
        self._folder = folder
        self._encoder = encoder
        self._places = places
        self._config = ctx.config.teachers
        self._bases: dict[int, np.ndarray] = {}
        self._budget = ctx.config.teachers.batch_tokens
        self._stack = ExitStack()

    def __enter__(self) -> Teacher:
        return self

    def __exit__(self, *error: Any) -> None:
        was_loaded = self.__dict__.pop("loaded", None) is not None
        self._stack.close()
        if was_loaded:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model, loaded when it is first asked for."""
        loaded = self._stack.enter_context(open_teacher(self._folder, self._config))
        self._ctx.recheck_model(self._folder.path)
        return loaded

    def write(self, task: Task) -> None:
        """Makes and commits the parts of a task.

        Raises:
            KdpipeError: the teacher gives NaN or infinity, has no memory for one sample, or an input changed meanwhile.
        """
        if not task.wants:
            return
        with (
            progress(len(task.wants), f"{task.source} teacher", "sample") as bar,
            Recorder(self._ctx, self._ledger, task.source) as recorder,
            closing(task.windows(self._places, self._config.part_samples)) as ready,
        ):
            for window, (jobs, rejects) in ready:
                if rejects:
                    self._ledger.commit(rejects=rejects, soon=True)
                bar.update(len(window) - sum(len(job.wants) for job in jobs))
                seconds = 0.0
                for part in parts(jobs, self._config.part_samples):
                    shape = self._shape(task, part[0], recorder)
                    before = time.perf_counter()
                    self._write_part(task, part, shape, recorder, bar)
                    seconds += time.perf_counter() - before
                before = time.perf_counter()
                recorder.wait()
                seconds += time.perf_counter() - before
                _note(self._ctx, self._folder, task.source, jobs, seconds)

    def _write_part(self, task: Task, jobs: Sequence[Job], shape: Shape, recorder: Recorder, bar: tqdm) -> None:
        scribe = Scribe(self.loaded, shape, task.over)
        recorder.begin(shape)
        with closing(self._batches(task, jobs)) as ready:
            for batch_jobs, examples in ready:
                for some, made in self._attempt(scribe, recorder, batch_jobs, examples):
                    recorder.add(some, made)
                bar.update(sum(len(job.wants) for job in batch_jobs))
        heard = [sample for job in jobs for sample in job.samples] if task.features else []
        recorder.commit(heard, lambda: scribe.measured)

    def _attempt(
        self, work: Callable[[Batch], T], recorder: Recorder, jobs: Sequence[Job], examples: Sequence[Example]
    ) -> Iterator[tuple[Sequence[Job], T]]:
        """Does work on a batch; on halves of it, and on smaller batches from then on, where it gets no memory.

        Raises:
            KdpipeError: one sample alone gets none, or the teacher is shared out to several processes.
        """
        batch, reason = self._encoder.collate(examples), None
        try:
            made = work(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            # The frames of the pass hold its tensors, and the error holds the frames.
            traceback.clear_frames(error.__traceback__)
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        else:
            yield jobs, made
            return
        rows, tokens = batch.input_ids.shape[0], batch.input_ids.numel()
        if rows == 1 or self._config.tensor_parallel_size > 1:
            alone = (
                "Lower teachers.head_chunk or teachers.max_length, or spread the teacher over several GPUs "
                "(teachers.device_map, teachers.tensor_parallel_size)"
                if rows == 1
                else f"Lower teachers.batch_tokens below {tokens}"
            )
            raise KdpipeError(
                f"{self._folder.name}: {rows} sequence{'s' * (rows > 1)} of {tokens:,} tokens together "
                f"({', '.join(batch.ids[:3])}{', ...' * (rows > 3)}) get no memory: {reason}. {alone}. What was "
                "committed is kept; run the command again."
            )
        recorder.wait()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._budget = min(self._budget, tokens // 2)
        self._ctx.say(
            f"cache-teachers: a batch of {rows} samples, {tokens:,} tokens, got no memory ({reason}). Goes on with "
            f"batches of {self._budget:,} tokens; set teachers.batch_tokens: {self._budget} to begin with them."
        )
        for half in (slice(0, rows // 2), slice(rows // 2, rows)):
            yield from self._attempt(work, recorder, jobs[half], examples[half])

    def _batches(self, task: Task, jobs: Sequence[Job]) -> Generator[tuple[Sequence[Job], list[Example]], None, None]:
        ready = prefetch(
            jobs, task.features or _as_is, depth=4 * THREADS, threads=THREADS if task.features is not None else 0
        )
        with closing(ready):
            for batch_jobs in batches(jobs, lambda: self._budget):
                yield batch_jobs, [next(ready) for _ in batch_jobs]

    def _shape(self, task: Task, job: Job, recorder: Recorder) -> Shape:
        hidden = job.cover.get("hidden", [])
        unknown = [layer for layer in hidden if layer not in self._bases]
        if unknown and is_low_rank(self._config.states):
            recorder.wait()
            self._learn_bases(task, job, unknown, recorder)
        bases = {layer: self._bases[layer] for layer in hidden if layer in self._bases}
        alignment = self._needs.alignment if job.cover.get("k") else None
        return Shape(self._config, job.cover, self.loaded.width, len(self.loaded.layers), alignment, bases)

    def _learn_bases(self, task: Task, job: Job, layers: Sequence[int], recorder: Recorder) -> None:
        """Finds or fits the bases of layers; commits what `task.build` does."""
        self._bases |= known_bases(self._ledger, job.wants[0], layers)
        missing = [layer for layer in layers if layer not in self._bases]
        if missing:
            chosen = task.wants[:: max(1, len(task.wants) // SAMPLES)][:SAMPLES]
            jobs = sorted(task.build(chosen).jobs, key=_place)
            work = partial(grams_of, self.loaded, layers=missing, over=task.over)
            seen = (
                grams
                for some, examples in self._batches(task, jobs)
                for _, grams in self._attempt(work, recorder, some, examples)
            )
            self._bases |= fit_bases(seen, self._config.rank, self._ctx.say, self._folder.name)


def _note(ctx: Context, folder: ModelFolder, source: str, jobs: Sequence[Job], seconds: float) -> None:
    """Remembers how fast a teacher was, for estimates."""
    if jobs:
        record_speed(
            ctx,
            source,
            folder,
            tokens=sum(job.example.length for job in jobs),
            seconds=seconds,
            head_rows=sum(
                len(job.example.target_ids) * (1 + len(job.cover.get("lens", []))) for job in jobs if job.cover.get("k")
            ),
            tower=sum(job.tower for job in jobs),
        )


def write_served(
    ctx: Context,
    ledger: Ledger,
    needs: Requirements,
    folder: ModelFolder,
    places: Mapping[str, int],
    task: Task,
) -> None:
    """Makes and commits the parts of a task with vLLM as the teacher; see `served`.

    Raises:
        KdpipeError: vLLM does not start, dies too often, or refused a sample.
    """
    config = ctx.config.teachers
    held = [row for want in task.wants if (row := ledger.get(want.id, want.source)) is not None and row.key == want.key]
    k = max([needs.k, *(row.cover["k"] for row in held)])
    with ExitStack() as stack:
        bar = stack.enter_context(progress(len(task.wants), f"{task.source} teacher (vLLM)", "sample"))
        recorder = stack.enter_context(Recorder(ctx, ledger, task.source))
        served: ServedTeacher | None = None
        for window, (jobs, rejects) in stack.enter_context(closing(task.windows(places, config.part_samples))):
            if rejects:
                ledger.commit(rejects=rejects, soon=True)
            bar.update(len(window) - len(jobs))
            before = time.perf_counter()
            for part in parts(jobs, config.part_samples):
                if served is None:
                    served = stack.enter_context(serve(folder, config, needs.alignment, k, ctx.say))
                    ctx.recheck_model(folder.path)
                    before = time.perf_counter()
                shape = Shape(config, part[0].cover, folder.width, folder.layers, needs.alignment, {})
                recorder.begin(shape)
                for job, (_, made) in zip(part, served(job.example for job in part), strict=True):
                    if isinstance(made, Rejected):
                        recorder.wait()
                        (want,) = job.wants
                        ledger.commit(rejects=[Reject(want.id, want.source, want.key, made.reason, made.detail)])
                    else:
                        recorder.add([job], partial(_encoded, shape, made))
                    bar.update()
                recorder.commit([], dict)
            recorder.wait()
            _note(ctx, folder, task.source, jobs, time.perf_counter() - before)


def _encoded(shape: Shape, made: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of one unit from entries of one number a token."""
    layout = shape.layout
    assert layout is not None
    whole = replace(layout, mass=None)
    cut = narrowed(made, whole, k=layout.kept, mass=layout.mass, min_k=layout.min_k, temperatures=(1.0,))
    return [under(TOP, layout.encode({name: getattr(cut, name) for name in made}))]


def windows(wants: Sequence[Wanted], places: Mapping[str, int], part_samples: int) -> Iterator[list[Wanted]]:
    """Wants window by window, in the manifest's order; a window without any is left out."""
    size = WINDOW_PARTS * part_samples
    ordered = sorted(wants, key=lambda want: places[want.id])
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or places[ordered[stop].id] // size != places[ordered[start].id] // size:
            yield ordered[start:stop]
            start = stop


def parts(jobs: Sequence[Job], size: int) -> Iterator[Sequence[Job]]:
    """Jobs of each part: sorted by what they store, then by length, then by id."""
    ordered = sorted(jobs, key=_place)
    start = 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or stop - start == size or ordered[stop].cover != ordered[start].cover:
            yield ordered[start:stop]
            start = stop


def _place(job: Job) -> tuple[str, int, str]:
    return repr(sorted(job.cover.items())), job.example.length, job.example.id


def _as_is(job: Job) -> Example:
    return job.example
