"""The evaluate stage: what it wants of each sample of the evaluation split, from the student and the untouched one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest
from kdpipe.stages.base import Context, StagePlan, Wanted
from kdpipe.stages.config import Config, identity_of
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.textualize.stage import SAMPLE_FIELDS, sample_fields

BASE, STUDENT = "base", "student"
"""Sources of this stage's rows: answers of the student's checkpoint before training, and after."""


_PLACES = {name: place for place, name in enumerate(SAMPLE_FIELDS)}


@dataclass(frozen=True)
class Evaluate:
    """Answers to the evaluation split, one row a sample and model."""

    name: str = "evaluate"
    version: int = 1
    whole: bool = False

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose outputs it reads: none where the configuration names the model to score."""
        return ("train",) if config.evaluate.model is None else ()

    def wanted(self, ctx: Context, plans: Mapping[str, StagePlan]) -> list[Wanted]:
        """One want a sample and model; the student's are pending until it is trained.

        Raises:
            ModelError: the student's checkpoint, or that of `evaluate.model`, cannot be found.
        """
        config, student = ctx.config.evaluate, ctx.config.student
        sampling = identity_of(config)
        engine = sampling.pop("engine")
        del sampling["model"]  # its files count, whatever it is called
        common = {
            "version": str(self.version),
            "prompt": digest([student.system, student.prompt]),
            "sampling": digest(sampling),
            "limits": digest([ctx.config.data.max_seconds, engine]),
        }
        models: dict[str, tuple[str, str | None]] = {}
        if config.base:
            models[BASE] = (resolve(student.model, ctx.base).digest(ctx.prints), None)
        if config.model is not None:
            models[STUDENT] = (resolve(config.model, ctx.base).digest(ctx.prints), None)
        else:
            train = plans["train"]
            trained = bool(train.wanted) and not train.todo and not train.removed
            models[STUDENT] = (digest(sorted(want.key for want in train.wanted)), None) if trained else ("", "train")
        samples = [(sample.id, sample_fields(ctx, sample)) for sample in ctx.samples(ctx.config.data.eval_split)]
        return [
            Wanted(sample, source, Fields(names, own), pending=pending)
            for source, (model, pending) in models.items()
            for names in [Names(common | {"model": model}, _PLACES)]
            for sample, own in samples
        ]

    def run(self, ctx: Context, todo: Sequence[Wanted]) -> None:
        """Makes `todo`; see `kdpipe.stages.evaluate.run`."""
        from kdpipe.stages.evaluate.run import run

        run(ctx, todo)


STAGE = Evaluate()
