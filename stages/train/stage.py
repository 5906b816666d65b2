"""The train stage: one student from all samples together. Light: `run` imports what it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cache_results

from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest
from kdpipe.data.manifest import Sample
from kdpipe.stages.base import Context, StagePlan, Wanted, compare
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import Config, identity_of
from kdpipe.stages.environment import environment
from kdpipe.stages.textualize.stage import SAMPLE_FIELDS, sample_fields
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train.held_out import held_out
from kdpipe.stages.train.terms import resolve_terms

SOURCE, ADAPTER = "student", "adapter"
"""Folders of the stage: the student, and with LoRA its adapter alone."""
_OF_SAMPLE = ("audio", "span", "question", "choices")
AUDIO = SAMPLE_FIELDS.index("audio")
"""Where the digest of its clips stands in what `sample_fields` gives."""
_WHAT = ("id", "content", "held_as", "key")  # the content of what came out, or for want of one the key it was made as
_APART = (
    "validation_fraction",
    "weights",
    "task_weights",
    "weight_schedule",
    "divergence",
    "beta",
    "alpha",
    "temperature",
    "scale_by_temperature_squared",
    "z_loss",
)
"""Fields of `train` that count by what they do: as terms, as weights of a sample, or as samples left out."""


@dataclass(frozen=True)
class Train:
    """Trains the student from the cached teachers and writes `train/student`."""

    name: str = "train"
    version: int = 1
    whole: bool = True

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose outputs it reads."""
        return ("textualize", "cache-teachers")

    def wanted(self, ctx: Context, plans: Mapping[str, StagePlan]) -> list[Wanted]:
        """One want for each training sample that nothing upstream rejected and that is not held out.

        Raises:
            KdpipeError: the manifest or a model folder cannot be read, or the objective is empty.
        """
        config = ctx.config
        needs = requirements(ctx)
        terms = resolve_terms(config, needs)
        settings = {name: value for name, value in identity_of(config.train).items() if name not in _APART}
        if config.train.lora is None:
            del settings["lora"]  # students of releases without LoRA stay fresh
        if config.train.export == "last":
            del settings["export"]  # likewise
        else:
            settings["validate_steps"] = config.train.validate_steps  # it decides which steps are looked at
        shared = {
            "version": str(self.version),
            "objective": digest(terms.identity()),
            "optimization": digest(settings),
            "student": needs.student.digest(ctx.prints),
            "prompt": digest([config.student.system, config.student.prompt]),
        }
        cache = plans[CACHE_TEACHERS.name]
        made = {
            source: {
                sample: content or held_as or key
                for sample, content, held_as, key in cache.ledger.values(source, *_WHAT)
            }
            for source in needs.sources
        }
        wants = []

        @cache_results
        def names(sources: tuple[str, ...], task: str | None) -> Names:
            """Of samples that have these sources, of a task with weights of its own or None."""
            weights = {} if task is None else {"weights": digest(terms.weights_of(task))}
            places = {name: SAMPLE_FIELDS.index(name) for name in _OF_SAMPLE}
            places |= {source: len(SAMPLE_FIELDS) + place for place, source in enumerate(sources)}
            return Names(shared | weights, places)

        for sample, heard, upstream in usable(ctx, cache):
            if held_out(heard[AUDIO], config.train.validation_fraction):
                continue
            task = sample.task if sample.task in terms.tasks else None
            waiting = [want for want in upstream if (want.id, want.source) not in cache.fresh]
            if waiting:
                pending = next((want.pending for want in waiting if want.pending), CACHE_TEACHERS.name)
                wants.append(Wanted(sample.id, SOURCE, Fields(names((), task), heard), pending=pending))
                continue
            own = (*heard, *(made[want.source][want.id] for want in upstream))
            sources = tuple(want.source for want in upstream)
            wants.append(Wanted(sample.id, SOURCE, Fields(names(sources, task), own)))
        return wants

    def run(self, ctx: Context, todo: Sequence[Wanted]) -> None:
        """Trains on all that is wanted, exports the student and with LoRA its adapter, and records them.

        Raises:
            KdpipeError: training cannot start or go on; says why.
            KeyboardInterrupt: SIGINT or SIGTERM came; a checkpoint was written.
        """
        # cuBLAS reads this once, when CUDA starts; without it, matrix products differ from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        from kdpipe.stages.train.run import run

        run(ctx, current_plans(ctx))


def usable(ctx: Context, cache: StagePlan) -> Iterator[tuple[Sample, tuple[str, ...], list[Wanted]]]:
    """Samples of the training split that nothing upstream rejected, their digests as `sample_fields` gives them, and
    what is cached of them.

    Args:
        ctx: the run.
        cache: plan of the cache-teachers stage.
    """
    cached: dict[str, list[Wanted]] = {}
    for want in cache.wanted:
        cached.setdefault(want.id, []).append(want)
    for sample in ctx.samples(ctx.config.data.train_split):
        upstream = cached.get(sample.id, [])
        if upstream and not any((want.id, want.source) in cache.rejected for want in upstream):
            yield sample, sample_fields(ctx, sample), upstream


def current_plans(ctx: Context) -> dict[str, StagePlan]:
    """Plans of this stage and of those it reads, as things are on disk now."""
    plans: dict[str, StagePlan] = {}
    for stage in (TEXTUALIZE, CACHE_TEACHERS, STAGE):
        made_with = environment(ctx, stage.name)
        plans[stage.name] = compare(stage.name, stage.wanted(ctx, plans), ctx.ledger(stage.name), made_with)
    return plans


def student_identity(plan: StagePlan) -> str:
    """Identity of the student that a plan of this stage asks for."""
    return digest(sorted(want.key for want in plan.wanted))


STAGE = Train()
