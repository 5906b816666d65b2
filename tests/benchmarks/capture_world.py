"""Models, samples and run folders of bench_store.py's phase `capture`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import soundfile

from kdpipe.data.files import build_aside
from kdpipe.data.hashing import digest
from kdpipe.data.ledger_rows import Row
from kdpipe.stages.base import Context, StagePlan, Wanted, compare
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import (
    Config,
    DataConfig,
    LaunchConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
    TrainConfig,
    WeightsConfig,
)
from kdpipe.stages.miniature.models import make_family, make_qwen2_5_omni, make_qwen3
from kdpipe.stages.miniature.tokenizer import AUDIO_SPECIALS, TEXT_SPECIALS, train_tokenizer
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.textualize.table import to_table

SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
CLIPS = ("a.wav", "b.wav", "c.wav")
RATE = 16000


@dataclass(frozen=True)
class Sizes:
    """How large the teacher and its samples are.

    Attributes:
        ids: ordinary ids of the tokenizer.
        rows: of the teacher's output head.
        hidden: width of the teacher.
        layers: depth of the teacher.
        description: mean words of a description.
        response: mean words of a trace.
    """

    ids: int = 16_000
    rows: int = 16_384
    hidden: int = 512
    layers: int = 8
    description: int = 45
    response: int = 64


class Words:
    """Pseudo-words of syllables, frequent and rare ones.

    Args:
        count: of different words.
        seed: of the words and of what is drawn of them.
    """

    def __init__(self, count: int, seed: int):
        self._random = np.random.default_rng(seed)
        syllables = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in ("", "", "n", "r", "s", "l")]
        made: dict[str, None] = {}
        while len(made) < count:
            made["".join(self._random.choice(syllables, self._random.integers(1, 5)))] = None
        self.all = list(made)
        rank = np.arange(count) + 2.7
        self._sum = np.cumsum(1 / rank) / (1 / rank).sum()

    def text(self, mean: float) -> str:
        """As many words as a gamma distribution says, at least one."""
        count = 1 + int(self._random.gamma(4, mean / 4))
        return " ".join(self.all[place] for place in np.searchsorted(self._sum, self._random.random(count)))


def make_models(folder: Path, sizes: Sizes) -> None:
    """Writes `teacher/` and `student/`, untaught, with one byte-level BPE of `sizes.ids` ordinary ids."""
    words = Words(2 * sizes.ids, 0)
    tags = "".join(f"<{name}>{name.lower()}</{name}>" for name in ("THINK", *SECTIONS, "RESPONSE"))
    texts = [tags * 8, *("\n".join(words.all[place : place + 64]) for place in range(0, len(words.all), 64))]
    texts += [" " + " ".join(words.all), *(words.text(2000) for _ in range(40))]
    text, audio = (train_tokenizer(texts, sizes.ids, specials) for specials in (TEXT_SPECIALS, AUDIO_SPECIALS))
    make_qwen3(folder / "teacher", tokenizer=text, hidden=sizes.hidden, layers=sizes.layers, rows=sizes.rows)
    make_qwen2_5_omni(folder / "student", tokenizer=audio, rows=sizes.rows)


def make_miniatures(folder: Path) -> None:
    """Writes the miniature family's `teacher/` and `student/`."""
    family = make_family(folder)
    family.qwen2_5_omni.rename(folder / "student")


def write_run(base: Path, samples: int, sizes: Sizes, seed: int) -> None:
    """Writes a manifest that brings descriptions and traces, and its clips."""
    base.mkdir(parents=True)
    for place, name in enumerate(CLIPS):
        noise = np.random.default_rng(place).normal(0, 0.05, int(RATE * (0.4 + 0.2 * place)))
        soundfile.write(base / name, noise, RATE)
    words = Words(2 * sizes.ids, seed)

    def rows() -> Iterator[str]:
        for place in range(samples):
            said = [words.text(sizes.response / len(SECTIONS)) for _ in SECTIONS]
            inner = "".join(f"<{name}>{text}</{name}>" for name, text in zip(SECTIONS, said, strict=True))
            trace = f"<THINK>{inner}</THINK><RESPONSE>{words.text(2)}</RESPONSE>"
            row = {"id": f"s{place:06}", "audio": CLIPS[place % len(CLIPS)], "question": words.text(8) + "?"}
            yield json.dumps(row | {"description": words.text(sizes.description), "trace": trace}) + "\n"

    with open(base / "manifest.jsonl", "w") as file:
        file.writelines(rows())


def configuration(
    models: Path,
    *,
    dtype: Any = "float32",
    weights: WeightsConfig | None = None,
    layers: Mapping[int, int] | None = None,
    **teachers: Any,
) -> Config:
    """What a run asks for; only the top of the textual teacher, unless weights and a map of layers are given."""
    textual = TextualTeacherConfig(ModelConfig(str(models / "teacher"), dtype=dtype))
    settings = {"k": 64, "device": "cpu", "max_length": 1024, "serve": LaunchConfig(cpu_kv_cache_gib=1)} | teachers
    return Config(
        DataConfig("manifest.jsonl"),
        StudentConfig(ModelConfig(str(models / "student"), dtype="float32")),
        TeachersConfig(textual, **settings),
        layers=LayersConfig("map", map=layers) if layers else LayersConfig(),
        train=TrainConfig(weights=weights or WeightsConfig(layer=0.05 if layers else 0.0, acoustic=0.0)),
    )


def textualize(ctx: Context) -> StagePlan:
    """What textualize does with descriptions and traces that the manifest brings."""
    ledger = ctx.ledger(TEXTUALIZE.name)
    plan = compare(TEXTUALIZE.name, TEXTUALIZE.wanted(ctx, {}), ledger)
    samples = {sample.id: sample for sample in ctx.samples(ctx.config.data.train_split)}
    size, rows, built = ctx.config.textualize.part_samples, [], {}
    for start in range(0, len(plan.todo), size):
        part = plan.todo[start : start + size]
        with build_aside(ledger.tmp) as path:
            records = [_record(want, samples[want.id].description, samples[want.id].trace) for want in part]
            pq.write_table(to_table(records, SECTIONS), path)
            name = digest([want.key for want in part])[:16] + ".parquet"
            kept = path.with_name(name)
            path.rename(kept)
        built[name] = kept
        rows += [
            Row(w.id, "trace", w.key, w.fields, name, place, content=digest([r["description"], r["trace"]]))
            for place, (w, r) in enumerate(zip(part, records, strict=True))
        ]
    if rows:
        ledger.commit(rows, built=built)
    return compare(TEXTUALIZE.name, TEXTUALIZE.wanted(ctx, {}), ctx.ledger(TEXTUALIZE.name))


def _record(want: Wanted, description: str | None, trace: str | None) -> dict[str, Any]:
    about = {"id": want.id, "key": want.key, "audio_samples": [1], "audio_rate": RATE}
    return about | {"description": description, "trace": trace}


def to_make(ctx: Context) -> Sequence[Wanted]:
    """What cache-teachers has to make; traces must be there."""
    upstream = compare(TEXTUALIZE.name, TEXTUALIZE.wanted(ctx, {}), ctx.ledger(TEXTUALIZE.name))
    plan = compare(STAGE.name, STAGE.wanted(ctx, {TEXTUALIZE.name: upstream}), ctx.ledger(STAGE.name))
    assert not any(want.pending for want in plan.todo)
    return plan.todo
