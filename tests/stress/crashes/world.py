"""A small run with something of everything, and the commands that are interrupted in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import soundfile

from .commands import Commands, Step, copy_of

if TYPE_CHECKING:
    from kdpipe.stages.miniature.models import Miniatures

TRACE = (
    "<THINK><PLANNING>Listen.</PLANNING><CAPTION>{n} tones.</CAPTION><REASONING>{n} tones</REASONING>"
    "<SUMMARY>{n}</SUMMARY></THINK><RESPONSE>{n}</RESPONSE>"
)
CONFIG = """\
data: {{manifest: data/manifest.jsonl, max_reject_fraction: 0.5}}
student: {{model: {{path: {student}, dtype: float32}}}}
textualize:
  trace: {{model: {{path: {teacher}, dtype: float32}}, require_match: false}}
  part_samples: 2
teachers:
  textual: {{model: {{path: {teacher}, dtype: float32}}}}
  k: 8
  states: low_rank
  rank: 4
  part_samples: 3
  batch_tokens: 1
  device: cpu
layers: {{mode: skip, every: 2}}
train:
  weights: {{top: 1, layer: 0.1, acoustic: 0.1, acoustic_top: 0.1, sft: 1}}
  epochs: 2
  learning_rate: 1e-3
  global_batch_tokens: 400
  micro_batch_tokens: 400
  validation_fraction: 0.25
  validate_steps: 2
  export: best
  checkpoint_steps: 1
  device: cpu
evaluate: {{part_samples: 2}}
"""
SAMPLES, EVALUATED, PART = 10, 5, 3
LITTER = "0123456789abcdef.zarr"
"""A part that no sample needs."""


def write_world(run: Path, family: Miniatures) -> None:
    """Configuration, clips and manifest: half of the samples bring their trace, two share a clip, one has none."""
    (run / "data").mkdir(parents=True)
    seconds = np.arange(12_000) / 16_000
    rows = []
    for number in range(SAMPLES + EVALUATED):
        clip = f"{number - (number == 4)}.wav"
        if number == 2:
            (run / "data" / clip).write_bytes(b"")
        else:
            soundfile.write(run / "data" / clip, 0.3 * np.sin(2 * np.pi * (220 + 40 * number) * seconds), 16_000)
        row = {"id": f"s{number:02d}", "audio": clip, "question": f"How many {number}?", "choices": ["2", "3"]}
        row |= {"answer": str(2 + number % 2)}
        if number % 2:
            row |= {"description": "tones", "trace": TRACE.format(n=2 + number % 2)}
        rows.append(row if number < SAMPLES else {**row, "split": "test"})
    (run / "data" / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "kdpipe.yaml").write_text(CONFIG.format(student=family.qwen2_5_omni, teacher=family.teacher))


@dataclass(frozen=True)
class Scenario:
    """A command that is interrupted.

    Attributes:
        name: for people.
        after: the scenario whose outcome it starts from; None: from a new folder.
        words: the command.
        change: changes the folder first.
        stages: that its outcome makes fresh, and that may not be called fresh before.
    """

    name: str
    after: str | None
    words: tuple[str, ...]
    change: Callable[[Path], None] = lambda run: None
    stages: tuple[str, ...] = ()


def _edit_inputs(run: Path) -> None:
    """More entries of each distribution, another sound for one sample, and a sample less."""
    config = run / "kdpipe.yaml"
    config.write_text(config.read_text().replace("  k: 8", "  k: 12"))
    soundfile.write(run / "data" / "1.wav", 0.2 * np.sin(np.arange(12_000) * 0.3), 16_000)
    manifest = run / "data" / "manifest.jsonl"
    manifest.write_text("".join(line for line in manifest.open() if '"s05"' not in line))


def _adapters(run: Path) -> None:
    config = run / "kdpipe.yaml"
    config.write_text(config.read_text().replace("  epochs: 2", "  epochs: 2\n  lora: {rank: 4}"))


def _damage(run: Path) -> None:
    """A flipped bit in one part, and a manifest that cannot be read."""
    store = run / "cache-teachers"
    shard = sorted(path for path in (store / "parts").rglob("c/*/*") if path.is_file())[0]
    for file, place in ((shard, 3), (next((store / "manifests").iterdir()), 100)):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)


def _litter(run: Path) -> None:
    store = run / "cache-teachers"
    copy_of(next((store / "parts").iterdir()), store / "parts" / LITTER)
    for path in (store / "damaged" / "x.zarr", store / "manifests" / f"{'0' * 32}.parquet", run / "tmp" / ("a" * 32)):
        path.parent.mkdir(exist_ok=True)
        path.write_text("0123456789")
    manifest = run / "data" / "manifest.jsonl"
    manifest.write_text("".join(line for line in manifest.open() if '"s07"' not in line))


SCENARIOS = [
    Scenario("textualize", None, ("textualize",), stages=("textualize",)),
    Scenario("cache-teachers", "textualize", ("cache-teachers",), stages=("cache-teachers",)),
    Scenario("recache", "cache-teachers", ("cache-teachers",), _edit_inputs, ("textualize", "cache-teachers")),
    Scenario("train", "cache-teachers", ("train",), stages=("train",)),
    Scenario("retrain", "train", ("train",), _adapters, ("train",)),
    Scenario("evaluate", "train", ("evaluate",), stages=("evaluate",)),
    Scenario("verify", "cache-teachers", ("cache", "verify"), _damage),
    Scenario("heal", "verify", ("cache-teachers",), stages=("cache-teachers",)),
    Scenario("gc", "cache-teachers", ("cache", "gc", "--unasked"), _litter),
]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def trace_records(run: Path) -> dict[str, dict[str, Any]]:
    """The trace of each sample that the ledger of textualize points to."""
    manifest = run / "textualize" / "manifests" / f"{(run / 'textualize' / 'HEAD').read_text().split()[0]}.parquet"
    parts = {path.name: pq.read_table(path).to_pylist() for path in (run / "textualize" / "parts").iterdir()}
    rows = pq.read_table(manifest, columns=["id", "part", "row"]).to_pylist()
    return {row["id"]: parts[row["part"]][row["row"]] for row in rows}


class World:
    """Run folders before and after each scenario, as it goes where nobody interrupts it; made when first asked for.

    Attributes:
        steps, work: of each that was made; see `Ended`.
    """

    def __init__(self, folder: Path, family: Miniatures, commands: Commands):
        self._folder, self._family, self._commands = folder, family, commands
        self.steps: dict[str, tuple[Step, ...]] = {}
        self.work: dict[str, tuple[str, ...]] = {}

    def before(self, scenario: Scenario) -> Path:
        """The folder that a scenario starts from."""
        place = self._folder / scenario.name / "before"
        if not place.exists():
            if scenario.after is None:
                write_world(place, self._family)
            else:
                copy_of(self.after(BY_NAME[scenario.after]), place)
            scenario.change(place)
        return place

    def fresh(self, scenario: Scenario, name: str = "run") -> Path:
        """A copy to work on, beside it: relative paths to the models, whose digests are remembered, stay the same."""
        return copy_of(self.before(scenario), self._folder / scenario.name / name)

    def after(self, scenario: Scenario) -> Path:
        """The folder after it."""
        place = self._folder / scenario.name / "after"
        if not place.exists():
            ended = self._commands(copy_of(self.before(scenario), place), *scenario.words)
            assert ended.code == (scenario.name == "verify"), ended.text
            self.steps[scenario.name], self.work[scenario.name] = ended.steps, ended.work
        return place
