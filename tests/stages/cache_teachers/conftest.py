"""Runs of the stage on a small world whose traces the manifest brings, and what naive forward passes say of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from kdpipe.data.audio import decode
from kdpipe.data.files import build_aside
from kdpipe.data.hashing import digest
from kdpipe.data.ledger import Ledger
from kdpipe.data.ledger_rows import Row
from kdpipe.data.store.distributions import StoredDistribution
from kdpipe.data.store.reader import Store
from kdpipe.stages.base import Context, StagePlan, compare
from kdpipe.stages.cache_teachers.requirements import Requirements, requirements
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import (
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualTeacherConfig,
    TrainConfig,
    WeightsConfig,
)
from kdpipe.stages.models.folder import ModelFolder, resolve
from kdpipe.stages.models.inputs import Batch, Encoder, Example
from kdpipe.stages.models.loaded import LoadedModel, load_model
from kdpipe.stages.models.prompt import fill
from kdpipe.stages.models.vocabulary import Alignment
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.textualize.table import read_traces, to_table

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

SECTIONS = ("PLANNING", "CAPTION", "REASONING", "SUMMARY")
TRACE = (
    "<THINK><PLANNING>count</PLANNING><CAPTION>tones: {n}</CAPTION><REASONING>{n}</REASONING>"
    "<SUMMARY>{n}</SUMMARY></THINK><RESPONSE>{n}</RESPONSE>"
)
CLIPS = {"a.wav": (16000, 0.7, 1), "b.flac": (44100, 1.9, 2), "c.ogg": (8000, 0.25, 1)}
"""Name to rate (Hz), seconds and channels."""
ROWS = (
    {"id": "s1", "audio": "a.wav", "question": "How many tones?", "choices": ["2", "3"], "n": 3},
    {"id": "s2", "audio": "b.flac", "question": "Which is higher?", "choices": [], "n": 2},
    {"id": "s3", "audio": "a.wav", "question": "Is the sum of the tones even?", "choices": ["yes", "no"], "n": 11},
    {"id": "s4", "audio": "c.ogg", "question": "How many?", "choices": [], "n": 5},
)


@dataclasses.dataclass(frozen=True)
class Naive:
    """One sample in one pass of transformers alone: logits [L, V] and states [L, H] by layer of the whole sequence."""

    loaded: LoadedModel
    batch: Batch
    logits: torch.Tensor
    states: Mapping[int, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder as one process sees it."""

    ctx: Context
    said: list[str]

    @property
    def base(self) -> Path:
        return self.ctx.base

    @property
    def needs(self) -> Requirements:
        return requirements(self.ctx)

    @property
    def ledger(self) -> Ledger:
        return self.ctx.ledger(STAGE.name)

    @property
    def store(self) -> Store:
        ledger = self.ledger
        return Store(ledger.parts, ledger)

    def again(self, base: Path | None = None, **changes: Any) -> Run:
        """The run as a new process sees it, perhaps elsewhere, with sections of the configuration replaced."""
        return Run(
            Context(dataclasses.replace(self.ctx.config, **changes), base or self.base, self.said.append), self.said
        )

    def teachers(self, **changes: Any) -> TeachersConfig:
        return dataclasses.replace(self.ctx.config.teachers, **changes)

    def copy(self, to: Path) -> Run:
        shutil.copytree(self.base, to)
        return self.again(to)

    def write_manifest(self, rows: Sequence[Mapping[str, Any]]) -> None:
        lines = []
        for row in rows:
            n = row["n"]
            given = {"description": f"tones: {n}", "trace": TRACE.format(n=n)}
            lines.append(json.dumps(given | {name: value for name, value in row.items() if name != "n"}))
        (self.base / "manifest.jsonl").write_text("\n".join(lines) + "\n")

    def textualize(self) -> StagePlan:
        """What textualize does with traces and descriptions that the manifest brings."""
        ledger = self.ctx.ledger("textualize")
        samples = {sample.id: sample for sample in self.ctx.samples("train")}
        plan = compare("textualize", TEXTUALIZE.wanted(self.ctx, {}), ledger)
        if plan.todo:
            records = [
                {"id": want.id, "key": want.key, "audio_samples": [1], "audio_rate": 16000}
                | {name: getattr(samples[want.id], name) for name in ("description", "trace")}
                for want in plan.todo
            ]
            name = digest(sorted(want.key for want in plan.todo))[:16] + ".parquet"
            with build_aside(ledger.tmp) as path:
                pq.write_table(to_table(records, SECTIONS), path)
                rows = [
                    Row(w.id, "trace", w.key, w.fields, name, place, content=digest([r["description"], r["trace"]]))
                    for place, (w, r) in enumerate(zip(plan.todo, records, strict=True))
                ]
                ledger.commit(rows, built={name: path})
        return compare("textualize", TEXTUALIZE.wanted(self.ctx, {}), ledger)

    def plan(self) -> StagePlan:
        plans = {"textualize": self.textualize()}
        return compare(STAGE.name, STAGE.wanted(self.ctx, plans), self.ledger)

    def stale(self) -> list[tuple[str, str]]:
        return sorted((want.id, want.source) for want in self.plan().todo)

    def bring_up(self) -> StagePlan:
        plan = self.plan()
        assert not any(want.pending for want in plan.todo)
        if plan.todo:
            STAGE.run(self.ctx, plan.todo)
        after = self.plan()
        assert not after.todo
        return after

    def naive(self, folder: ModelFolder | None, sample_id: str) -> Naive:
        """What a teacher (with clips if it hears) says of prompt and response of one sample."""
        assert folder is not None
        config = self.ctx.config
        sample = {sample.id: sample for sample in self.ctx.samples("train")}[sample_id]
        trace = read_traces(self.ctx)[sample_id]
        encoder, loaded = _live(str(folder.path), folder.settings.dtype)
        if folder.hears:
            clips = [decode(ref, rate=16000, max_seconds=30) for ref in sample.audio]
            text = encoder.prompt_text(
                fill(config.student.prompt, sample), system=config.student.system, clips=len(clips)
            )
        else:
            clips, asks = [], config.teachers.textual
            text = encoder.prompt_text(fill(asks.prompt, sample, trace.description), system=asks.system)
        prompt_ids = encoder.prompt_ids(text, [len(clip) for clip in clips])
        target_ids = Encoder(self.needs.student).target_ids(trace.trace)
        batch = encoder.collate([Example("x", prompt_ids, target_ids, encoder.features(clips))])
        with torch.no_grad(), loaded.capture(range(1, len(loaded.layers) + 1)) as states:
            logits = loaded.model(**batch.forward, use_cache=False).logits[0]
        return Naive(loaded, batch, logits, {layer: state[0] for layer, state in states.items()})


@functools.lru_cache(maxsize=4)
def _live(path: str, dtype: Any) -> tuple[Encoder, LoadedModel]:
    folder = resolve(ModelConfig(path, dtype=dtype), Path())
    return Encoder(folder), load_model(folder, device="cpu")


def full_logprobs(stored: StoredDistribution, valid: int) -> torch.Tensor:
    """[T, valid] of a stored distribution; -inf where nothing is kept."""
    full = np.full((len(stored.ids), valid), -np.inf, np.float32)
    np.put_along_axis(full, stored.ids, stored.logprob, 1)
    return torch.from_numpy(full)


def masked_log_softmax(logits: torch.Tensor, alignment: Alignment, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities over the shared ids, by PyTorch alone."""
    logits = logits[:, : alignment.valid].clone()
    logits[:, list(alignment.masked)] = -torch.inf
    return torch.log_softmax(logits / temperature, 1)


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def begin(family: Miniatures) -> Callable[..., Run]:
    """Makes a run folder with clips and a manifest; further arguments are settings of `teachers`."""

    def make(
        base: Path,
        student: str = "qwen2_5_omni",
        *,
        rows: Sequence[Mapping[str, Any]] = ROWS,
        weights: WeightsConfig | None = None,
        layers: LayersConfig | None = None,
        **teachers: Any,
    ) -> Run:
        settings = {"k": 1000, "logprob_dtype": "float32", "states": "float32", "device": "cpu", "temperatures": (2.0,)}
        textual = TextualTeacherConfig(ModelConfig(str(family.teacher), dtype="float32"))
        config = Config(
            DataConfig("manifest.jsonl", max_reject_fraction=0.5),
            StudentConfig(ModelConfig(str(getattr(family, student)), dtype="float32")),
            TeachersConfig(textual, **(settings | teachers)),
            layers=layers or LayersConfig("all"),
            train=TrainConfig(weights=weights or WeightsConfig(acoustic_top=0.1)),
        )
        said: list[str] = []
        run = Run(Context(config, base, said.append), said)
        base.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0)
        for name, (rate, seconds, channels) in CLIPS.items():
            time = np.arange(int(rate * seconds)) / rate
            tone = 0.3 * np.sin(2 * np.pi * 440 * time) + noise.normal(0, 0.02, len(time))
            soundfile.write(base / name, np.stack([tone] * channels, 1), rate)
        run.write_manifest(rows)
        return run

    return make


@pytest.fixture(scope="session")
def made(begin: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with few kept entries; copy it before changing it."""
    run = begin(tmp_path_factory.mktemp("made") / "run", k=8, tail_blocks=3)
    run.bring_up()
    return run


@pytest.fixture(scope="session")
def rows() -> Sequence[Mapping[str, Any]]:
    """The manifest's rows of a run."""
    return ROWS


@pytest.fixture(scope="session")
def full() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """`full_logprobs` and `masked_log_softmax`."""
    return full_logprobs, masked_log_softmax
