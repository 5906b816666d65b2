"""The cache-teachers stage: what it wants of each sample, and under which keys. Light: `run` imports what it needs.

Sources of a sample, each with a key of its own:
    targets: the response as token ids of the student; every other source is aligned to them.
    textual: what the textual teacher says at each response position.
    acoustic: hidden states of the acoustic teacher at the audio positions. The model is causal and the clips stand
        first in the prompt, so they depend on clips and system message alone, and samples with the same clips share
        one stored unit.
    acoustic_top: what the acoustic teacher says at each response position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdpipe.data.fields import Fields, Names
from kdpipe.data.hashing import digest
from kdpipe.data.store.format import is_low_rank
from kdpipe.stages.base import Context, StagePlan, Wanted
from kdpipe.stages.cache_teachers.requirements import Requirements, requirements
from kdpipe.stages.config import Config, TeachersConfig
from kdpipe.stages.textualize.stage import SAMPLE_FIELDS, sample_fields

UPSTREAM = "textualize"


@dataclass(frozen=True)
class CacheTeachers:
    """Targets, and what the teachers know about them."""

    name: str = "cache-teachers"
    version: int = 2
    whole: bool = False

    def needs(self, config: Config) -> tuple[str, ...]:
        """The stages whose outputs it reads."""
        return (UPSTREAM,)

    def wanted(self, ctx: Context, plans: Mapping[str, StagePlan]) -> list[Wanted]:
        """One want for each source of each training sample that textualize did not reject.

        A sample whose targets are rejected has no other wants: nothing could be aligned to them.

        Raises:
            ConfigError: the models do not fit together.
            ModelError: a model cannot be found.
            VocabularyError: the tokenizers disagree.
        """
        needs = requirements(ctx)
        names = {
            source: Names(common, _PLACES[source])
            for source, common in _common_fields(ctx, needs, self.version).items()
        }
        covers = _covers(needs)
        upstream = plans[UPSTREAM]
        rejected = self._rejected_targets(ctx)
        contents = dict(upstream.ledger.values("trace", "id", "content"))
        wants = []
        for sample in ctx.samples(ctx.config.data.train_split):
            pair = (sample.id, "trace")
            if pair in upstream.rejected:
                continue
            content = contents[sample.id] if pair in upstream.fresh else None
            own = (*sample_fields(ctx, sample), content or "")
            for source in needs.sources:
                fields = Fields(names[source], own)
                want = Wanted(sample.id, source, fields, covers[source], UPSTREAM if content is None else None)
                wants.append(want)
                if source == "targets" and content is not None and rejected.get(sample.id) == want.key:
                    break
        return wants

    def _rejected_targets(self, ctx: Context) -> dict[str, str]:
        """Key under which a sample's targets were rejected."""
        if not (ctx.folder(self.name) / "rejects.parquet").exists():
            return {}
        return {r.id: r.key for r in ctx.ledger(self.name).rejects() if r.source == "targets"}

    def run(self, ctx: Context, todo: Sequence[Wanted]) -> None:
        """Makes `todo`; see `kdpipe.stages.cache_teachers.run`."""
        from kdpipe.stages.cache_teachers.run import run

        run(ctx, todo)


_OF_SAMPLE = {
    "targets": ("content", "question", "choices", "audio", "span"),
    "textual": ("content", "question", "choices"),
    "acoustic": ("audio", "span"),
    "acoustic_top": ("content", "question", "choices", "audio", "span"),
}
"""Which digests of a sample are in the key of each source."""

_OWN = (*SAMPLE_FIELDS, "content")
_PLACES = {source: {name: _OWN.index(name) for name in names} for source, names in _OF_SAMPLE.items()}


def _common_fields(ctx: Context, needs: Requirements, version: int) -> dict[str, dict[str, str]]:
    """The part of the keys that is the same for all samples."""
    config, teachers = ctx.config, ctx.config.teachers
    tokenizer = {"version": str(version), "student.tokenizer": needs.student.tokenizer_digest(ctx.prints)}
    prompt = {"student.prompt": digest([config.student.system, config.student.prompt])}
    seconds, length = config.data.max_seconds, teachers.max_length
    alignment = {"alignment": digest(needs.alignment)}
    # The bounds of the blocks follow from their number and the shared ids, which `alignment` stands for.
    numerics = {"logprob_dtype": teachers.logprob_dtype, "tail_blocks": str(teachers.tail_blocks)}
    fields = {"targets": tokenizer | prompt | alignment | {"limits": digest([length, seconds])}}
    if needs.textual is not None:
        asks = teachers.textual
        fields["textual"] = (
            tokenizer
            | alignment
            | numerics
            | {
                "teacher.model": needs.textual.digest(ctx.prints),
                "teacher.prompt": digest([asks.system, asks.prompt, asks.chat_template_kwargs]),
                "limits": digest([length]),
            }
        )
        if needs.hidden:
            fields["textual"]["codec"] = _codec(teachers)
        if asks.engine != "transformers":
            # Only where it is not the default, whose keys are older than the choice.
            fields["textual"]["engine"] = asks.engine
    if needs.acoustic is not None:
        model = {"version": str(version), "acoustic.model": needs.acoustic.digest(ctx.prints)}
        limits = {"limits": digest([length, seconds])}
        fields["acoustic"] = model | {"system": digest(config.student.system), "codec": _codec(teachers)}
        fields["acoustic_top"] = tokenizer | model | prompt | alignment | numerics | limits
    return fields


def _codec(teachers: TeachersConfig) -> str:
    return f"{teachers.states} rank {teachers.rank}" if is_low_rank(teachers.states) else teachers.states


def _covers(needs: Requirements) -> dict[str, dict[str, Any]]:
    """What must be stored beyond the key: more than is asked for serves, too."""
    kept: dict[str, Any] = {"k": needs.k, "mass": needs.mass, "min_k": needs.min_k}
    kept["temperatures"] = list(needs.temperatures)
    if needs.draws:
        kept["draws"] = {"count": needs.draws, "k": needs.k}
    inner = {name: list(layers) for name, layers in (("lens", needs.lens), ("hidden", needs.hidden)) if layers}
    return {
        "targets": {},
        "textual": kept | inner,
        "acoustic": {"hidden": list(needs.heard)},
        "acoustic_top": kept,
    }


STAGE = CacheTeachers()
