"""Running textualize: each sample through description and trace, with one engine or with two in turn."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kdpipe.data.audio import decode
from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import Rejected
from kdpipe.data.hashing import digest
from kdpipe.data.manifest import Sample, check_sample
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.config import identity_of
from kdpipe.stages.models.drive import drive
from kdpipe.stages.models.engine import Completion, Request, Sampling, open_engine, seed_of
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.prompt import fill, refuse_special
from kdpipe.stages.progress import progress
from kdpipe.stages.textualize.choose import Chosen, choose, given_trace, response_pattern
from kdpipe.stages.textualize.descriptions import Description, Descriptions
from kdpipe.stages.textualize.parts import Parts
from kdpipe.stages.textualize.table import section_column, to_table

STAGE_NAME = "textualize"


def run(ctx: Context, todo: Sequence[Wanted]) -> None:
    """Describes clips and writes traces, and commits them part by part.

    Args:
        ctx: the run.
        todo: what to make; never empty.

    Raises:
        KdpipeError: a model cannot be used, or vLLM does not start, or dies too often.
    """
    config = ctx.config.textualize
    samples = ctx.manifest.by_id
    units = [_Unit(want, samples[want.id]) for want in todo]
    parts = Parts(
        ctx,
        STAGE_NAME,
        todo,
        size=config.part_samples,
        to_table=lambda records: to_table(records, config.trace.sections),
    )
    with Descriptions(ctx.tmp(STAGE_NAME) / "descriptions.jsonl") as descriptions:
        _Work(ctx, parts, descriptions).finish(units)


@dataclass
class _Unit:
    """One sample on its way.

    Attributes:
        want: what is made.
        sample: its manifest row.
        clips: its decoded clips, at the rate of the model that works on it.
        frames: their lengths at the describer's rate.
        description: once there is one.
        given: the manifest's trace, once it is checked.
    """

    want: Wanted
    sample: Sample
    clips: list[np.ndarray] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    description: Description | None = None
    given: Chosen | None = None

    @property
    def describe_key(self) -> str:
        """Digest of all that a generated description depends on."""
        apart = ("answer", "schema", "given")
        fields = {
            name: value
            for name, value in self.want.fields.items()
            if name not in apart and not name.startswith("trace.")
        }
        return digest([self.sample.id, fields])


class _Work:
    """The steps of a unit, and which engine takes them."""

    def __init__(self, ctx: Context, parts: Parts, descriptions: Descriptions):
        self._ctx = ctx
        self._parts = parts
        self._descriptions = descriptions
        self._config = ctx.config.textualize
        self._schema = TraceSchema(tuple(self._config.trace.sections))
        self._describer = resolve(ctx.config.describer, ctx.base, download=True)
        self._one_engine = ctx.config.tracer == ctx.config.describer
        self._hearing = Encoder(self._describer)
        self._tracer: ModelFolder | None = None
        self._reading: Encoder | None = None
        self._parked: list[_Unit] = []

    def finish(self, units: Sequence[_Unit]) -> None:
        """Takes all units to their record or rejection."""
        if any(unit.sample.trace is None for unit in units):
            self._tracer = resolve(self._ctx.config.tracer, self._ctx.base, download=True)
            self._reading = self._hearing if self._one_engine else Encoder(self._tracer)
        for unit in units:
            if unit.sample.description is not None:
                unit.description = Description(unit.sample.description.strip())
            else:
                unit.description = self._descriptions.get(unit.describe_key)
        needs_engine = any(
            unit.description is None or (self._one_engine and unit.sample.trace is None) for unit in units
        )
        self._pass(units, self._describer if needs_engine else None, prepare=self._prepare, advance=self._describe)
        if self._parked:
            self._pass(self._parked, self._tracer, prepare=self._decode_again, advance=self._trace)

    def _pass(
        self,
        units: Sequence[_Unit],
        folder: ModelFolder | None,
        *,
        prepare: Callable[[_Unit], None],
        advance: Callable[[_Unit, Completion | None], Request | None],
    ) -> None:
        """Takes units through one engine, or through none."""
        with contextlib.ExitStack() as stack:
            engine = None
            if folder is not None:
                clips = max(len(unit.sample.audio) for unit in units) if folder.hears else 0
                self._ctx.say(f"{STAGE_NAME}: starting vLLM with {folder.name}")
                config, say = self._config, self._ctx.say
                opened = open_engine(folder, config.engine, clips=clips, seed=config.seed, say=say)
                engine = stack.enter_context(opened)
                self._ctx.recheck_model(folder.path)
            self._bar = stack.enter_context(progress(len(units), STAGE_NAME, "sample"))
            drive(engine, units, prepare=prepare, advance=advance, reject=self._reject)

    def _reject(self, unit: _Unit, rejected: Rejected) -> None:
        self._leave(unit)
        self._parts.reject(unit.want, rejected)

    def _leave(self, unit: _Unit) -> None:
        """A unit is done with this engine."""
        unit.clips.clear()
        self._bar.update()

    def _prepare(self, unit: _Unit) -> None:
        """Checks what the manifest brings and decodes the clips (in a thread)."""
        sample = unit.sample
        check_sample(sample)
        if sample.description is not None and not sample.description.strip():
            raise Rejected("description_empty", "the manifest's description is blank")
        words = (sample.question, *sample.choices)
        if unit.description is None:
            refuse_special(words, self._hearing.special)
        if sample.trace is None:
            assert self._reading is not None
            refuse_special((*words, sample.description), self._reading.special)
        else:
            unit.given = given_trace(sample, self._schema)
        unit.clips = self._decode(sample, self._hearing.rate)
        unit.frames = [len(clip) for clip in unit.clips]

    def _decode_again(self, unit: _Unit) -> None:
        """Decodes the clips for a tracer that hears (in a thread)."""
        assert self._tracer is not None and self._reading is not None
        if self._tracer.hears:
            unit.clips = self._decode(unit.sample, self._reading.rate)

    def _decode(self, sample: Sample, rate: int) -> list[np.ndarray]:
        seconds = self._ctx.config.data.max_seconds
        return [decode(ref, rate=rate, start=sample.start, end=sample.end, max_seconds=seconds) for ref in sample.audio]

    def _describe(self, unit: _Unit, completion: Completion | None) -> Request | None:
        """The steps of a unit on the describer; where another model writes traces, it is parked behind them."""
        if unit.description is None:
            if completion is None:
                return self._describe_request(unit)
            unit.description, completion = _description(completion), None
            self._descriptions.add(unit.describe_key, unit.description)
        if unit.given is not None:
            self._record(unit, unit.given, None)
            return None
        if self._one_engine:
            return self._trace(unit, completion)
        self._leave(unit)
        self._parked.append(unit)
        return None

    def _trace(self, unit: _Unit, completion: Completion | None) -> Request | None:
        """The last step: asks for the trace, or takes it."""
        if completion is None:
            return self._trace_request(unit)
        config = self._config.trace
        chosen = choose(unit.sample, completion.outputs, self._schema, require_match=config.require_match)
        self._record(unit, chosen, completion)
        return None

    def _describe_request(self, unit: _Unit) -> Request:
        config = self._config.describe
        text = fill(config.prompt, unit.sample)
        sampling = Sampling(
            config.max_tokens,
            config.temperature,
            config.top_p,
            seed=seed_of(self._config.seed, unit.sample.id, "describe"),
        )
        return Request(self._hearing.prompt_text(text, clips=len(unit.clips)), sampling, unit.clips)

    def _trace_request(self, unit: _Unit) -> Request:
        assert self._reading is not None and self._tracer is not None and unit.description is not None
        config = self._config.trace
        refuse_special((unit.description.text,), self._reading.special)
        clips = unit.clips if self._tracer.hears else []
        text = fill(config.prompt, unit.sample, unit.description.text)
        sampling = Sampling(
            config.max_tokens,
            config.temperature,
            config.top_p,
            n=config.candidates,
            seed=seed_of(self._config.seed, unit.sample.id, "trace"),
            regex=response_pattern(unit.sample, self._schema, config.max_section_chars) if config.structured else None,
        )
        prompt = self._reading.prompt_text(text, clips=len(clips), **config.chat_template_kwargs)
        return Request(prompt, sampling, clips)

    def _record(self, unit: _Unit, chosen: Chosen, completion: Completion | None) -> None:
        description = unit.description
        assert description is not None
        trace = self._schema.render(chosen.trace)
        described, traced = unit.sample.description is None, completion is not None
        rate = self._hearing.rate
        record = {
            "id": unit.sample.id,
            "key": unit.want.key,
            "description": description.text,
            "trace": trace,
            **{section_column(name): chosen.trace.sections[name] for name in self._schema.sections},
            "response": chosen.trace.response,
            "answer_match": chosen.answer_match,
            "finish_reason": chosen.output.finish_reason if chosen.output is not None else None,
            "candidate": chosen.index,
            "describe_prompt_tokens": description.prompt_tokens,
            "describe_completion_tokens": description.completion_tokens,
            "describe_finish_reason": description.finish_reason,
            "trace_prompt_tokens": completion.prompt_tokens if completion is not None else None,
            "trace_completion_tokens": chosen.output.tokens if chosen.output is not None else None,
            "audio_seconds": sum(unit.frames) / rate,
            "audio_samples": unit.frames,
            "audio_rate": rate,
            "describe_model": self._describer.name if described else None,
            "trace_model": self._tracer.name if traced and self._tracer is not None else None,
            "sampling": self._sampling_json(described, traced),
        }
        self._leave(unit)
        tokens = (description.completion_tokens or 0) + (chosen.output.tokens if chosen.output is not None else 0)
        self._parts.done(unit.want, record, tokens=tokens, content=digest([description.text, trace]))

    def _sampling_json(self, described: bool, traced: bool) -> str | None:
        settings = {}
        for name, used in (("describe", described), ("trace", traced)):
            if used:
                section = identity_of(getattr(self._config, name))
                kept = ("max_tokens", "temperature", "top_p", "candidates", "structured", "max_section_chars")
                settings[name] = {key: section[key] for key in kept if key in section}
        return json.dumps({**settings, "seed": self._config.seed}, sort_keys=True) if settings else None


def _description(completion: Completion) -> Description:
    output = completion.outputs[0]
    text = output.text.strip()
    if not text:
        raise Rejected("description_empty", f"the describer wrote nothing (finish reason {output.finish_reason})")
    return Description(text, completion.prompt_tokens, output.tokens, output.finish_reason)
