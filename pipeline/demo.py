"""`kdpipe demo`: the main job, end to end, on a world and models it makes itself.

Two configurations share one cache: FOLDER/kdpipe.yaml distils from both teachers, FOLDER/sft/kdpipe.yaml only
fine-tunes on the same traces. The models are made by `python -m kdpipe.pipeline.demo FOLDER` in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click

from kdpipe.data.errors import KdpipeError
from kdpipe.data.files import build_aside, move_into_place
from kdpipe.pipeline.runner import Request, bring_up_to_date
from kdpipe.pipeline.unforeseen import unforeseen
from kdpipe.pipeline.worker import DEFAULTS
from kdpipe.stages.miniature import world

SEED = 0
TRAIN_SAMPLES, TEST_SAMPLES = 480, 200

_CONFIG = """\
# Written by `kdpipe demo`. {what}
data:
  manifest: {up}data/manifest.jsonl
  max_seconds: 3
  max_reject_fraction: 0.5      # the miniature teacher is young; what it gets wrong is rejected, with a reason

run:
  folder: .
  cache: {cache}

student:
  model: {{path: {up}models/student, dtype: float32}}
  prompt: {question}

textualize:
  describe: {{prompt: {describe}, max_tokens: 32}}
  trace:
    model: {{path: {up}models/teacher, dtype: float32}}
    prompt: {teacher}
    max_tokens: 160
    max_section_chars: 120
  engine: {engine}

teachers:
  textual:
    model: {{path: {up}models/teacher, dtype: float32}}
    prompt: {teacher}
  k: 16
  max_length: 512

layers: {{mode: all, match: lens}}

train:
  weights: {weights}
  epochs: 16
  learning_rate: 2e-3
  global_batch_tokens: 4096
  micro_batch_tokens: 4096

evaluate:
  base: {base}
  max_tokens: 160
  engine: {engine}
"""


def _config(*, distil: bool) -> str:
    weights = (
        "{top: 1.0, layer: 0.5, acoustic: 0.05, sft: 0.5}" if distil else "{top: 0, layer: 0, acoustic: 0, sft: 1.0}"
    )
    return _CONFIG.format(
        what="Distils from both teachers." if distil else "Fine-tunes on the same traces, without teachers.",
        up="" if distil else "../",
        cache="null" if distil else "..",
        base="true" if distil else "false",
        weights=weights,
        engine="{max_model_len: 512, enforce_eager: true, cpu_kv_cache_gib: 1}",
        question=json.dumps(world.QUESTION_PROMPT),
        describe=json.dumps(world.DESCRIBE_PROMPT),
        teacher=json.dumps(world.TEACHER_PROMPT),
    )


def run_demo(folder: Path) -> None:
    """Builds the demo in `folder`, or brings it up to date, and prints what came of it.

    Raises:
        KdpipeError: `folder` holds something else, or a step failed.
    """
    began = time.monotonic()
    marker = folder / "kdpipe.yaml"
    if folder.exists() and any(folder.iterdir()) and not (folder / "data").exists() and not marker.exists():
        raise KdpipeError(f"{folder}: is not empty and holds no demo. Choose another --folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "data").exists():
        click.echo(f"Making a world of tones: {TRAIN_SAMPLES} clips to learn from, {TEST_SAMPLES} held out.")
        with build_aside(folder / "tmp") as built:
            world.make_world(built, n_train=TRAIN_SAMPLES, n_test=TEST_SAMPLES, seed=SEED)
            move_into_place(built, folder / "data")
    if not (folder / "models").exists():
        click.echo("Teaching a miniature Qwen3 teacher to reason and a miniature Qwen2.5-Omni student to hear.")
        command = [sys.executable, "-P", "-m", "kdpipe.pipeline.demo", str(folder)]
        if subprocess.run(command, env=DEFAULTS | os.environ).returncode:
            raise KdpipeError("demo: the miniature models could not be made; see above. Run the command again.")
    requests = {}
    for name, distil in ((".", True), ("sft", False)):
        file = folder / name / "kdpipe.yaml"
        file.parent.mkdir(exist_ok=True)
        if not file.exists():
            file.write_text(_config(distil=distil), encoding="utf-8")
        requests[name] = Request(file)
    for request in requests.values():
        click.echo(f"\n== {request.config_file} ==")
        bring_up_to_date(request, "evaluate")
    scores = {name: _scores(folder / name) for name in requests}
    click.echo()
    click.echo(
        _table({"base": scores["."]["base"], "SFT only": scores["sft"]["student"], "distilled": scores["."]["student"]})
    )
    click.echo(
        f"One seed, {TEST_SAMPLES} questions, on which the settings were tried: some points either way are noise."
    )
    click.echo(f"\n{(time.monotonic() - began) / 60:.1f} minutes. Now try: kdpipe status -c {marker}")


def _scores(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluate" / "scores.json").read_text(encoding="utf-8"))


def _table(rows: dict[str, dict[str, Any]]) -> str:
    """Accuracy of each row by task, in percent of the held-out questions."""
    tasks = sorted({task for row in rows.values() for task in row["by_task"]})
    lines = [f"{'held-out accuracy':<20}" + "".join(f"{task:>10}" for task in (*tasks, "all"))]
    for name, row in rows.items():
        values = [row["by_task"].get(task, {}).get("accuracy") for task in tasks] + [row["accuracy"]]
        lines.append(f"{name:<20}" + "".join(f"{'-' if v is None else format(100 * v, '.1f'):>10}" for v in values))
    return "\n".join(lines)


def _make_models(folder: Path) -> None:
    from kdpipe.stages.miniature.teach import make_taught_models

    with build_aside(folder / "tmp") as built:
        built.mkdir()
        make_taught_models(built, seed=SEED, report=click.echo)
        move_into_place(built, folder / "models")


if __name__ == "__main__":
    try:
        _make_models(Path(sys.argv[1]))
    except Exception as error:
        sys.exit(f"Error: demo: {unforeseen(error)}")
