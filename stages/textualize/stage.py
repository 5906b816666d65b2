"""The textualize stage: what it wants of each sample, and why a sample is stale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from sys import intern

from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest, digest_bytes
from kdpipe.data.manifest import AudioRef, Sample
from kdpipe.stages.base import Context, StagePlan, Wanted
from kdpipe.stages.config import Config, ModelConfig, identity_of
from kdpipe.stages.models.folder import resolve
from kdpipe.stages.textualize.table import SOURCE

SAMPLE_FIELDS = ("audio", "span", "question", "choices", "answer")
"""Names of what `sample_fields` gives, in order."""

_PLACES = {name: place for place, name in enumerate(SAMPLE_FIELDS)}
_PLACES_GIVEN = _PLACES | {"given": len(_PLACES)}


def sample_fields(ctx: Context, sample: Sample) -> tuple[str, ...]:
    """Digests of what the manifest says of a sample and of its clips' bytes, in the order of `SAMPLE_FIELDS`.

    A clip that cannot be read gives `missing`: the sample is then rejected, and tried again when the clip appears.
    Found once for each sample of a context.
    """
    found = ctx.digests.get(sample.id)
    if found is None:
        found = ctx.digests[sample.id] = (
            _digest_of_many(tuple([_audio_digest(ctx, ref) for ref in sample.audio])),
            intern(digest([sample.start, sample.end])),
            digest(sample.question),
            _digest_of_many(sample.choices),
            _digest_of_many(sample.answer),
        )
    return found


@lru_cache(maxsize=4096)
def _digest_of_many(value: str | tuple[str, ...] | None) -> str:
    """Of what many samples have alike."""
    return intern(digest(value))


def _audio_digest(ctx: Context, ref: AudioRef) -> str:
    if ref.data is not None:
        return digest_bytes(ref.data)
    try:
        return ctx.prints.file(ref.path) if ref.path is not None else "missing"
    except OSError:
        return "missing"


@dataclass(frozen=True)
class Textualize:
    """Descriptions and traces of the train split, one row a sample."""

    name: str = "textualize"
    version: int = 1
    whole: bool = False

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose outputs it reads."""
        return ()

    def wanted(self, ctx: Context, plans: Mapping[str, StagePlan]) -> list[Wanted]:
        """One want a sample. What the manifest brings does not depend on the model that would have made it.

        Raises:
            ModelError: the describer or the tracer cannot be found.
        """
        del plans
        config = ctx.config.textualize
        samples = ctx.samples(ctx.config.data.train_split)
        describe, trace = identity_of(config.describe), identity_of(config.trace)
        describe_fields = {"describe.prompt": digest(describe["prompt"]), "describe.sampling": _sampling(describe)}
        trace_fields = {
            "trace.prompt": digest([trace["prompt"], trace["chat_template_kwargs"]]),
            "trace.sampling": _sampling(trace),
        }
        # A model that nothing needs is neither looked for nor hashed.
        if any(sample.description is None for sample in samples):
            describe_fields["describe.model"] = _model_digest(ctx, ctx.config.describer)
        if any(sample.trace is None for sample in samples):
            trace_fields["trace.model"] = _model_digest(ctx, ctx.config.tracer)
        common = {"version": str(self.version), "schema": digest(trace["sections"])}
        seconds = ctx.config.data.max_seconds
        decoded, generated = digest([seconds]), digest([seconds, identity_of(config.engine)])
        seed = digest(config.seed)

        @cache
        def shared(describes: bool, traces: bool) -> Names:
            fields = common | {"limits": generated if describes or traces else decoded}
            if describes:
                fields |= describe_fields
            if traces:
                fields |= trace_fields
            if (describes and config.describe.temperature > 0) or (traces and config.trace.temperature > 0):
                fields["seed"] = seed
            return Names(fields, _PLACES if describes and traces else _PLACES_GIVEN)

        wants = []
        for sample in samples:
            describes, traces = sample.description is None, sample.trace is None
            own = sample_fields(ctx, sample)
            if not describes or not traces:
                given = digest([sample.description, *((sample.trace, sample.response) if not traces else ())])
                own = (*own, given)
            wants.append(Wanted(sample.id, SOURCE, Fields(shared(describes, traces), own)))
        return wants

    def run(self, ctx: Context, todo: Sequence[Wanted]) -> None:
        """Makes `todo`; see `kdpipe.stages.textualize.run`."""
        from kdpipe.stages.textualize.run import run

        run(ctx, todo)


def _model_digest(ctx: Context, model: ModelConfig) -> str:
    return resolve(model, ctx.base).digest(ctx.prints)


def _sampling(section: Mapping[str, object]) -> str:
    apart = ("model", "prompt", "chat_template_kwargs", "sections")
    return digest({name: value for name, value in section.items() if name not in apart})


STAGE = Textualize()
