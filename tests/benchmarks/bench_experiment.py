"""Does distilling help, on which skills, and what is forgotten? The rows of the paper's table, on real speech.

Makes a world of clips composed of real recordings, a base student that hears but cannot reason and a textual teacher
that reasons but cannot hear, runs the seven rows with `kdpipe rows`, and draws a table and a plot of them.

    python tests/benchmarks/bench_experiment.py FOLDER --recordings ../shared/audio --seeds 0,1,2

What is there is not made again, so after a kill the same command goes on. docs/experiments.md has the outcome.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from experiment import outcome, world
from experiment.lessons import Effort, make_models
from experiment.settings import CONFIG

from kdpipe.data.errors import KdpipeError
from kdpipe.data.files import build_aside, move_into_place, write_atomically, write_json

SEED = 0
COUNTS = {"train": (40, 80), "val": (60, 100), "test": (60, 120)}
"""By split: questions of each hearing task and of each reasoning task."""


def counts_at(scale: float) -> dict[str, tuple[int, int]]:
    """Questions by split at a scale; at least one of each task."""
    return {
        split: (max(1, round(scale * hearing)), max(1, round(scale * reasoning)))
        for split, (hearing, reasoning) in COUNTS.items()
    }


def effort_at(scale: float) -> Effort:
    """How much the models are taught at a scale."""
    full = Effort()
    return Effort(
        clips=max(32, round(scale * full.clips)),
        frame_steps=max(1, round(scale * full.frame_steps)),
        describe_steps=max(1, round(scale * full.describe_steps)),
        text_steps=max(1, round(scale * full.text_steps)),
        teacher_steps=max(1, round(scale * full.teacher_steps)),
        exam=max(9, round(scale * full.exam)),
    )


def prepare(folder: Path, recordings: Path, scale: float) -> None:
    """Makes data, models and configuration in `folder`, as far as they are not there.

    Raises:
        KdpipeError: the recordings are not where they should be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tmp = folder / "tmp"
    if not (folder / "data").exists():
        print("Composing clips of the recordings", flush=True)
        with build_aside(tmp) as built:
            world.make_world(built, recordings, counts_at(scale), seed=SEED)
            move_into_place(built, folder / "data")
    if not (folder / "models").exists():
        print("Teaching the textual teacher to reason and the base student to hear", flush=True)
        with build_aside(tmp) as built:
            built.mkdir()
            scores = make_models(built, recordings, effort_at(scale), seed=SEED, report=_say)
            write_json(built / "scores.json", scores, tmp)
            move_into_place(built, folder / "models")
    if not (folder / "kdpipe.yaml").exists():
        write_atomically(folder / "kdpipe.yaml", lambda path: path.write_text(CONFIG, encoding="utf-8"), tmp)


def run_rows(folder: Path, seeds: str) -> None:
    """Runs the rows in a process of their own.

    Raises:
        KdpipeError: a row failed.
    """
    command = [sys.executable, "-P", "-c", "from kdpipe.pipeline.cli import main; main()", "rows"]
    command += ["-c", str(folder / "kdpipe.yaml"), "--seeds", seeds]
    for group, tasks in outcome.GROUPS.items():
        command += ["--group", f"{group}={','.join(tasks)}"]
    done = subprocess.run(command, env=dict(os.environ))
    if done.returncode:
        raise KdpipeError(f"{folder}: `kdpipe rows` failed; see above. The same command goes on where it stopped.")


def draw(folder: Path) -> None:
    """Writes `results.md` and `results.svg` from what the rows measured, and prints the table."""
    results = json.loads((folder / "rows" / "results.json").read_text(encoding="utf-8"))
    table = outcome.table(results)
    write_atomically(folder / "results.md", lambda path: path.write_text(table, encoding="utf-8"), folder / "tmp")
    write_atomically(folder / "results.svg", lambda path: outcome.plot(results, path), folder / "tmp")
    print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recordings", type=Path, default=Path("../shared/audio"), help="holds fsdd/ and esc10/")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--scale", type=float, default=1.0, help="share of clips and steps; below 1 only to try it out")
    parser.add_argument("--prepare", action="store_true", help="make data, models and configuration, and stop")
    given = parser.parse_args()
    began = time.monotonic()
    prepare(given.folder, given.recordings, given.scale)
    if not given.prepare:
        run_rows(given.folder, given.seeds)
        draw(given.folder)
        print(outcome.captions(given.folder))
    print(f"{(time.monotonic() - began) / 60:.1f} minutes")


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    try:
        main()
    except KdpipeError as error:
        sys.exit(f"Error: {error}")
