"""How many tokens the units to be made have: exact where the ledger says so, else from a sample, else a bound."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from kdpipe.data.cota import TraceSchema
from kdpipe.data.errors import Rejected
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.data.manifest import AudioRef, Sample
from kdpipe.stages.base import Context, Wanted
from kdpipe.stages.models.folder import ModelFolder
from kdpipe.stages.models.prompt import fill
from kdpipe.stages.textualize.choose import given_trace
from kdpipe.stages.textualize.table import read_traces

MOST_SAMPLES = 256
"""Samples measured where not all are known; they lie evenly in the manifest's order."""

_TEMPLATE_TOKENS = 16
"""Of a chat template, around system message and user text."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of units.

    Attributes:
        tokens: int64 [units], in their order.
        known: units whose number is exact.
        sampled: samples that were measured to estimate others; 0: none were.
        bounded: units of which nothing is known but that they have at most so many.
    """

    tokens: np.ndarray
    known: int
    sampled: int = 0
    bounded: int = 0

    @property
    def total(self) -> int:
        """All of them (tokens)."""
        return int(self.tokens.sum())


def traces_of(ctx: Context, wants: Sequence[Wanted]) -> list[tuple[str, str] | None]:
    """Description and trace of samples: of textualize where they are fresh, else as the manifest brings them.

    Only the parts that hold these samples are read. None stands for a sample that will be rejected.

    Raises:
        StoreError: a part of textualize is damaged.
    """
    fresh = {want.id for want in wants if want.pending is None}
    rows = read_traces(ctx.ledger("textualize"), fresh) if fresh else {}
    schema, samples = TraceSchema(tuple(ctx.config.textualize.trace.sections)), ctx.manifest.by_id

    def of(want: Wanted) -> tuple[str, str] | None:
        if want.id in fresh:
            row = rows.get(want.id)
            return (row.description, row.trace) if row is not None else None
        sample = samples[want.id]
        try:
            return sample.description or "", schema.render(given_trace(sample, schema).trace)
        except Rejected:
            return None

    return [of(want) for want in wants]


def has_trace(ctx: Context, want: Wanted) -> bool:
    """Whether the trace of a sample is there in some form."""
    return want.pending is None or ctx.manifest.by_id[want.id].trace is not None


def response_lengths(
    ctx: Context, ledger: Ledger, student: ModelFolder, wants: Sequence[Wanted], targets: Mapping[str, Wanted]
) -> Lengths:
    """Response tokens of each want, end token included.

    Args:
        ctx: the run.
        ledger: of cache-teachers.
        student: whose tokenizer makes the targets.
        wants: one a unit.
        targets: the want of each sample's targets, by id: their row counts if it has its key.
    """
    rows = [known_targets(ledger, targets, want.id) for want in wants]
    unknown = [want for want, row in zip(wants, rows, strict=True) if row is None]
    there = [want for want in unknown if has_trace(ctx, want)]
    found: list[int] = []
    if there:
        count = _counter(student)
        some, samples = evenly(there), ctx.manifest.by_id
        heard = [audio_tokens(ctx, student, samples[want.id]) > 0 for want in some]
        texts = [trace if ok else None for ok, trace in zip(heard, traces_of(ctx, some), strict=True)]
        found = [count(trace[1]) + 1 if trace is not None else 0 for trace in texts]
    most = ctx.config.textualize.trace.max_tokens + 1
    likely = dict(zip((want.id for want in there), stretched(found, len(there)), strict=True))
    tokens = [
        row.tokens if row is not None else likely.get(want.id, most) for want, row in zip(wants, rows, strict=True)
    ]
    return Lengths(np.array(tokens, np.int64), len(wants) - len(unknown), len(found), bounded=len(unknown) - len(there))


def audio_lengths(ctx: Context, ledger: Ledger, acoustic: ModelFolder, wants: Sequence[Wanted]) -> Lengths:
    """Audio tokens of each want, of all its clips together.

    Args:
        ctx: the run.
        ledger: of cache-teachers; a row of the same key, whosever it is, says how many.
        acoustic: the teacher that hears.
        wants: one a unit.
    """
    by_key = {row.key: row.tokens for row in ledger.rows() if row.source == "acoustic"}
    known = [by_key.get(want.key) for want in wants]
    unknown = [want for want, tokens in zip(wants, known, strict=True) if tokens is None]
    samples = ctx.manifest.by_id
    found = [audio_tokens(ctx, acoustic, samples[want.id]) for want in evenly(unknown)]
    likely = iter(stretched(found, len(unknown)))
    tokens = [next(likely) if tokens is None else tokens for tokens in known]
    return Lengths(np.array(tokens, np.int64), len(wants) - len(unknown), len(found))


def text_prompt_tokens(
    ctx: Context, folder: ModelFolder, wants: Sequence[Wanted], template: str, system: str | None
) -> float:
    """Mean tokens of the text of the prompts of `wants`, in at most `MOST_SAMPLES` of them; about right."""
    if not wants:
        return 0.0
    count, samples = _counter(folder), ctx.manifest.by_id
    found = [_TEMPLATE_TOKENS + count(system or "")] * min(len(wants), MOST_SAMPLES)
    described = "{description}" in template
    some = evenly(wants)
    given = traces_of(ctx, [want for want in some if has_trace(ctx, want)]) if described else []
    descriptions = iter(given)
    for place, want in enumerate(some):
        trace = next(descriptions) if described and has_trace(ctx, want) else None
        found[place] += count(fill(template, samples[want.id], trace[0] if trace is not None else ""))
        if described and trace is None:
            found[place] += ctx.config.textualize.describe.max_tokens
    return float(np.mean(found))


def known_targets(ledger: Ledger, targets: Mapping[str, Wanted], sample: str) -> Row | None:
    """The row of a sample's targets, if it was made under the key that is wanted now."""
    want, row = targets.get(sample), ledger.get(sample, "targets")
    right = want is not None and row is not None and want.pending is None and row.key == want.key
    return row if right else None


def audio_tokens(ctx: Context, folder: ModelFolder, sample: Sample) -> int:
    """Audio tokens of a sample from the headers of its clips; 0 where these say that it will be rejected."""
    rate, hop, most = _hearing(folder.path)
    total = 0
    for ref in sample.audio:
        seconds = clip_seconds(ref)
        heard = (seconds if sample.end is None else min(seconds, sample.end)) - (sample.start or 0.0)
        frames = round(heard * rate)
        mel = -(-frames // hop)
        tokens = ((mel - 1) // 2 - 1) // 2 + 1  # as `Encoder.audio_tokens`
        if tokens < 1 or frames > most or heard > ctx.config.data.max_seconds:
            return 0
        total += tokens
    return total


def clip_seconds(ref: AudioRef) -> float:
    """Length of a clip as its header says (seconds); 0 where it cannot be read."""
    import soundfile

    try:
        if ref.data is not None:
            info = soundfile.info(BytesIO(ref.data))
        elif ref.path is not None and ref.path.is_file():
            # A descriptor has no suffix that libsndfile would believe.
            with closing(os.fdopen(os.open(ref.path, os.O_RDONLY), "rb")) as stream:
                info = soundfile.info(stream)
        else:
            return 0.0
        return info.frames / info.samplerate
    except (OSError, ValueError, RuntimeError, ZeroDivisionError):
        return 0.0


def evenly(items: Sequence[Any], most: int | None = None) -> list[Any]:
    """At most `most` items (None: `MOST_SAMPLES`), evenly spaced; always the same ones."""
    most = MOST_SAMPLES if most is None else most
    if len(items) <= most:
        return list(items)
    return [items[(2 * place + 1) * len(items) // (2 * most)] for place in range(most)]


def stretched(found: Sequence[int], count: int) -> np.ndarray:
    """`count` numbers of which `evenly` chose those found, each standing for its neighbours: int64 [count]."""
    if not found:
        return np.zeros(count, np.int64)
    places = ((np.arange(count) + 0.5) * len(found) / max(1, count)).astype(np.int64)
    return np.array(found, np.int64)[places]


@lru_cache(maxsize=4)
def _hearing(folder: Path) -> tuple[int, int, int]:
    """Sample rate (Hz), hop and longest clip (samples) of a model's feature extractor."""
    about: Mapping[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = folder / name
        if file.exists():
            try:
                read = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            about = read.get("feature_extractor", read)
            break
    rate = int(about.get("sampling_rate", 16_000))
    return rate, int(about.get("hop_length", 160)), int(about.get("n_samples", about.get("chunk_length", 30) * rate))


def _counter(folder: ModelFolder) -> Callable[[str], int]:
    """Counts the tokens of a text in a model's tokenizer, special tokens as plain text."""
    return _counter_of(folder.path / "tokenizer.json") or _slow_counter(folder)


@lru_cache(maxsize=4)
def _counter_of(file: Path) -> Callable[[str], int] | None:
    if not file.exists():
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def _slow_counter(folder: ModelFolder) -> Callable[[str], int]:
    from kdpipe.stages.models.inputs import Encoder

    encoder = Encoder(folder)
    return lambda text: len(encoder.target_ids(text)) - 1
