"""Running evaluate: the untouched student, then the trained one, answer the split with vLLM."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from kdpipe.data.audio import decode
from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import Rejected
from kdpipe.data.hashing import digest
from kdpipe.data.manifest import Sample, check_sample
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.evaluate.results import assemble, to_table
from kdpipe.stages.evaluate.scores import judge
from kdpipe.stages.evaluate.stage import BASE, STAGE, STUDENT
from kdpipe.stages.models.drive import drive
from kdpipe.stages.models.engine import Completion, Engine, Request, Sampling, open_engine, seed_of
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.prompt import fill, refuse_special
from kdpipe.stages.progress import progress
from kdpipe.stages.textualize.parts import Parts

_TAG = re.compile(r"</?[A-Za-z][A-Za-z_]*>")


def run(ctx: Context, todo: Sequence[Wanted]) -> None:
    """Lets each model answer, commits part by part, then writes the result files.

    Args:
        ctx: the run.
        todo: what to make; never empty.

    Raises:
        KdpipeError: a model cannot be used, or vLLM does not start, or dies too often.
    """
    for source in (BASE, STUDENT):
        wants = [want for want in todo if want.source == source]
        if wants:
            _answer_all(ctx, source, wants)
    assemble(ctx)


def prediction_of(output: str) -> str:
    """The answer in a model's output: what stands in `<RESPONSE>`.

    An output without any tag is an answer by itself; one with tags but no response (it broke off, say) is none, and
    gives the empty string.
    """
    response = TraceSchema().extract_response(output)
    if response is not None:
        return response
    return "" if _TAG.search(output) else output.strip()


@dataclass
class _Unit:
    """One sample on its way through one model."""

    want: Wanted
    sample: Sample
    clips: list[np.ndarray] = field(default_factory=list)


class _Answers:
    """The steps of a unit, on one engine."""

    def __init__(self, ctx: Context, parts: Parts, engine: Engine, bar: tqdm):
        self._ctx, self._parts, self._engine, self._bar = ctx, parts, engine, bar

    def prepare(self, unit: _Unit) -> None:
        """Checks the sample and decodes its clips (in a thread)."""
        sample, encoder = unit.sample, self._engine.encoder
        check_sample(sample)
        refuse_special((sample.question, *sample.choices), encoder.special)
        seconds = self._ctx.config.data.max_seconds
        unit.clips = [
            decode(ref, rate=encoder.rate, start=sample.start, end=sample.end, max_seconds=seconds)
            for ref in sample.audio
        ]

    def advance(self, unit: _Unit, completion: Completion | None) -> Request | None:
        """Asks the question, then takes the answer."""
        if completion is None:
            return self._request(unit)
        sample, output = unit.sample, completion.outputs[0]
        prediction = prediction_of(output.text)
        record = {
            "id": sample.id,
            "source": unit.want.source,
            "key": unit.want.key,
            "task": sample.task,
            "answer": sample.answer,
            "prediction": prediction,
            "output": output.text,
            "correct": judge(sample, prediction),
            "finish_reason": output.finish_reason,
            "tokens": output.tokens,
        }
        self._leave(unit)
        self._parts.done(unit.want, record, tokens=output.tokens, content=digest(output.text))
        return None

    def reject(self, unit: _Unit, rejected: Rejected) -> None:
        """Records a rejection."""
        self._leave(unit)
        self._parts.reject(unit.want, rejected)

    def _leave(self, unit: _Unit) -> None:
        unit.clips.clear()
        self._bar.update()

    def _request(self, unit: _Unit) -> Request:
        student, config = self._ctx.config.student, self._ctx.config.evaluate
        prompt = self._engine.encoder.prompt_text(
            fill(student.prompt, unit.sample), system=student.system, clips=len(unit.clips)
        )
        sampling = Sampling(
            config.max_tokens,
            config.temperature,
            config.top_p,
            config.top_k,
            seed=seed_of(config.seed, unit.sample.id),
        )
        return Request(prompt, sampling, unit.clips)


def _answer_all(ctx: Context, source: str, wants: Sequence[Wanted]) -> None:
    config = ctx.config.evaluate
    folder = _model(ctx, source)
    samples = ctx.manifest.by_id
    units = [_Unit(want, samples[want.id]) for want in wants]
    parts = Parts(ctx, STAGE.name, wants, size=config.part_samples, to_table=to_table)
    clips = max(len(unit.sample.audio) for unit in units)
    ctx.say(f"{STAGE.name}: starting vLLM with the {source} model")
    with (
        open_engine(folder, config.engine, clips=clips, seed=config.seed, say=ctx.say) as engine,
        progress(len(units), f"{STAGE.name} {source}", "sample") as bar,
    ):
        ctx.recheck_model(folder.path)
        answers = _Answers(ctx, parts, engine, bar)
        drive(engine, units, prepare=answers.prepare, advance=answers.advance, reject=answers.reject)


def _model(ctx: Context, source: str) -> ModelFolder:
    model = ctx.config.student.model
    if source == STUDENT:
        trained = dataclasses.replace(model, path=str(ctx.folder("train") / "student"), revision=None)
        model = ctx.config.evaluate.model or trained
    return resolve(model, ctx.base, download=True)
