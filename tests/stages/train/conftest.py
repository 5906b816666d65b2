"""Cached runs for the tests of training: a small world, its traces, and what miniature teachers say about them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kdpipe.stages.base import Context, StagePlan, compare
from kdpipe.stages.cache_teachers.stage import STAGE as CACHE_TEACHERS
from kdpipe.stages.config import (
    Config,
    DataConfig,
    LayersConfig,
    ModelConfig,
    StudentConfig,
    TeachersConfig,
    TextualizeConfig,
    TextualTeacherConfig,
    TraceConfig,
    TrainConfig,
    WeightsConfig,
)
from kdpipe.stages.textualize.stage import STAGE as TEXTUALIZE
from kdpipe.stages.train.metrics import read_metrics
from kdpipe.stages.train.stage import STAGE as TRAIN

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

SETTINGS: dict[str, tuple[WeightsConfig, LayersConfig]] = {
    "SFT only": (WeightsConfig(top=0, layer=0, acoustic=0, sft=1), LayersConfig()),
    "top + SFT": (WeightsConfig(layer=0, acoustic=0), LayersConfig(mode="top")),
    "skip + SFT": (WeightsConfig(acoustic=0), LayersConfig(mode="skip", every=2)),
    "all + SFT": (WeightsConfig(acoustic=0), LayersConfig()),
    "all + acoustic + SFT": (WeightsConfig(), LayersConfig()),
    "hidden + acoustic top + SFT": (WeightsConfig(acoustic_top=0.5), LayersConfig(match="hidden")),
}
"""The trained rows of the paper's table, and what they leave out."""

TRAINING = TrainConfig(
    epochs=2, learning_rate=2e-3, warmup_ratio=0.1, global_batch_tokens=600, micro_batch_tokens=300, device="cpu"
)


@dataclass
class Run:
    """A run folder with a configuration; stages are run in this process."""

    config: Config
    base: Path
    said: list[str] = field(default_factory=list)

    @property
    def ctx(self) -> Context:
        return Context(self.config, self.base, self.said.append)

    def plans(self) -> dict[str, StagePlan]:
        ctx, plans = self.ctx, {}
        for stage in (TEXTUALIZE, CACHE_TEACHERS, TRAIN):
            plans[stage.name] = compare(stage.name, stage.wanted(ctx, plans), ctx.ledger(stage.name))
        return plans

    def bring_up_to_date(self, *stages: Any) -> None:
        for stage in stages or (TEXTUALIZE, CACHE_TEACHERS, TRAIN):
            plan = self.plans()[stage.name]
            if plan.todo or plan.removed:
                stage.run(self.ctx, plan.todo)

    def train(self, **changes: Any) -> list[dict[str, Any]]:
        """Trains with changed settings and returns the metrics."""
        self.config = replace(self.config, train=replace(self.config.train, **changes))
        TRAIN.run(self.ctx, self.plans()[TRAIN.name].todo)
        return self.metrics

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return read_metrics(self.ctx.folder("train") / "metrics.jsonl")

    @property
    def student(self) -> Path:
        return self.ctx.folder("train") / "student"

    def elsewhere(self, folder: str, **changes: Any) -> Run:
        """A run on the same manifest and cache that trains in a folder of its own."""
        config = replace(self.config, run=replace(self.config.run, folder=folder, cache=self.config.run.folder))
        return Run(replace(config, train=replace(config.train, **changes)), self.base)


MakeRun = Callable[..., Run]


def story(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metrics without what clock and machine say."""
    clocked = {"seconds", "tokens_per_second", "data_wait", "peak_memory_gib"}
    return [{name: value for name, value in line.items() if name not in clocked} for line in metrics]


class Ready(Exception):
    """Training is about to begin."""


def ready(run: Run, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """What the training loop is given, by name, without training."""
    from kdpipe.stages.train import run as module

    given: dict[str, Any] = {}

    def keep(config, place, objective, weights, optimizer, stream, reader, total, *rest):
        given.update(config=config, objective=objective, weights=weights, stream=stream, reader=reader, total=total)
        raise Ready

    with monkeypatch.context() as patch:
        patch.setattr(module, "train", keep)
        with pytest.raises(Ready):
            run.train(**changes)
    return given


def write_world(folder: Path, samples: int) -> None:
    """Clips of tones with questions, descriptions and gold traces, so that no vLLM is needed."""
    import soundfile

    from kdpipe.stages.miniature import world

    rng = np.random.default_rng(0)
    lines = []
    (folder / "clips").mkdir(parents=True)
    for number in range(samples):
        scene, question = world.sample_question(rng, held_out=False)
        name = f"clips/{number:02d}.wav"
        soundfile.write(folder / name, world.render(scene, rng)[0], world.SAMPLE_RATE)
        lines.append(
            {
                "id": f"s{number:02d}",
                "audio": name,
                "question": question.text,
                "choices": list(question.choices),
                "answer": question.answer,
                "description": world.describe(scene),
                "trace": world.trace(scene, question),
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_config(
    family: Miniatures, weights: WeightsConfig, layers: LayersConfig, *, student: str, teachers: dict[str, Any]
) -> Config:
    return Config(
        data=DataConfig("manifest.jsonl"),
        student=StudentConfig(ModelConfig(str(getattr(family, student)), dtype="float32")),
        teachers=TeachersConfig(
            TextualTeacherConfig(ModelConfig(str(family.teacher), dtype="float32")),
            **{"part_samples": 3, "device": "cpu", "batch_tokens": 800, **teachers},
        ),
        textualize=TextualizeConfig(trace=TraceConfig(require_match=False)),
        layers=layers,
        train=replace(TRAINING, weights=weights),
    )


@pytest.fixture(scope="session")
def cached(family: Miniatures, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """`cached("all + SFT", student="qwen2_audio", samples=4, k=8)`: a run up to the teacher store; made once each."""
    made: dict[str, Run] = {}

    def make(setting: str, *, student: str = "qwen2_5_omni", samples: int = 8, **teachers: Any) -> Run:
        name = repr((setting, student, samples, sorted(teachers.items())))
        if name not in made:
            folder = tmp_path_factory.mktemp("run")
            write_world(folder, samples)
            config = make_config(family, *SETTINGS[setting], student=student, teachers=teachers)
            made[name] = Run(config, folder)
            made[name].bring_up_to_date(TEXTUALIZE, CACHE_TEACHERS)
        return made[name]

    return make


@pytest.fixture
def tasked(cached: MakeRun, tmp_path: Path) -> Callable[..., Run]:
    """`tasked(setting, tasks)`: a copy of a cached run whose samples have tasks, in turn; None for none."""

    def make(setting: str, tasks: Sequence[str | None] = ("ser", "aqa", None), *, samples: int = 8) -> Run:
        shared = cached(setting, samples=samples)
        folder = tmp_path / "tasked"
        shutil.copytree(shared.base, folder)
        lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
        for place, line in enumerate(lines):
            line["task"] = tasks[place % len(tasks)]
        (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return Run(shared.config, folder)

    return make


def last_checkpoint(run: Run) -> dict[str, Any]:
    """Tensors of the last checkpoint of a run of one process: `weights/<name>`, `optimizer/<name>/<moment>`."""
    from safetensors.torch import load_file

    latest = max((run.ctx.folder("train") / "checkpoints").iterdir())
    return {name: value for file in sorted(latest.glob("*.safetensors")) for name, value in load_file(file).items()}
