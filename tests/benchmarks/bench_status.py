"""Time and memory of `kdpipe status` and of a `kdpipe run` that has nothing to do, by the number of samples.

\b
    python tests/benchmarks/bench_status.py --samples 10000 --samples 100000

A run whose samples bring descriptions and traces, one clip for ten samples, with untaught miniatures. textualize is
committed by the real stage; the rows of cache-teachers and evaluate are written as these stages would write them, with
empty parts, since what is planned is read from the ledgers alone. Each command is a process of its own, started as a
user starts it, with the page cache warm; its time is the median of the repeats, and its memory the largest resident set
of it and its children. "whole": what the last look found is removed before each, so that every sample is looked at;
"after a change": a clip has another date, so that it is hashed again; "nothing moved": the same command once more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import capture_world
import click
import numpy as np
import soundfile
import yaml

from kdpipe.data.ledger_rows import Row
from kdpipe.pipeline.plan import make_plans
from kdpipe.stages.base import Context, StagePlan
from kdpipe.stages.config import WeightsConfig

PART_SAMPLES = 512
SAMPLES_A_CLIP = 10
CASES = [(word, kind) for word in ("status", "train") for kind in ("whole", "after a change", "nothing moved")]
_MEASURE = """
import json, os, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - began
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10
print(json.dumps({"seconds": seconds, "peak": peak, "code": done.returncode, "said": done.stdout + done.stderr}))
"""


def make(folder: Path, samples: int) -> Path:
    """A run with so many samples, everything up to the teachers fresh; its configuration file."""
    base = folder / "base"
    (base / "clips").mkdir(parents=True)
    capture_world.make_miniatures(folder / "models")
    rng = np.random.default_rng(0)
    for clip in range(-(-samples // SAMPLES_A_CLIP)):
        soundfile.write(base / "clips" / f"{clip}.wav", rng.normal(0, 0.05, 800), capture_world.RATE)
    inner = "".join(f"<{name}>one</{name}>" for name in capture_world.SECTIONS)
    with open(base / "manifest.jsonl", "w") as file:
        for place in range(samples):
            row = {
                "id": f"s{place:07}",
                "audio": f"clips/{place // SAMPLES_A_CLIP}.wav",
                "question": f"How many, {place}?",
            }
            row |= {"description": f"tones: {place}", "trace": f"<THINK>{inner}</THINK><RESPONSE>{place}</RESPONSE>"}
            file.write(json.dumps(row) + "\n")
    config = capture_world.configuration(
        Path("../models"), weights=WeightsConfig(acoustic_top=0.1), layers={2: 3, 4: 6}
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, eval_split="train"))
    ctx = Context(config, base, lambda line: None)
    capture_world.textualize(ctx)
    # What a stage is asked for is known once those before it are there.
    while any(want.pending is None for plan in make_plans(ctx).values() for want in plan.todo):
        for plan in make_plans(ctx).values():
            _pretend(plan)
    ctx.prints.save()
    file = base / "kdpipe.yaml"
    file.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))
    return file


def _pretend(plan: StagePlan) -> None:
    """Commits what is to do and can be done, with empty parts."""
    rows, places = [], Counter[str]()
    for want in plan.todo:
        if want.pending is None:
            part, place = f"{want.source}-{places[want.source] // PART_SAMPLES:06}", places[want.source] % PART_SAMPLES
            (plan.ledger.parts / part).mkdir(parents=True, exist_ok=True)
            rows.append(
                Row(want.id, want.source, want.key, want.fields, part, place, 30, 80, "0" * 32, dict(want.cover))
            )
            places[want.source] += 1
    plan.ledger.commit(rows)


def _plain(value: Any) -> Any:
    """A configuration as YAML takes it."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return (
        [_plain(inner) for inner in value]
        if isinstance(value, (list, tuple))
        else str(value)
        if isinstance(value, Path)
        else value
    )


def _prepare(file: Path, kind: str) -> None:
    if kind == "whole":
        (file.parent / "tmp" / "look.npz").unlink(missing_ok=True)
    elif kind == "after a change":
        os.utime(file.parent / "clips" / "0.wav", (1e9, 1e9 + time.time() % 1e6))  # it is hashed again, and the same


def measure(file: Path, words: list[str]) -> dict[str, Any]:
    """One command on a run: seconds, peak resident memory (bytes), and what it said.

    Raises:
        RuntimeError: it failed.
    """
    command = [sys.executable, "-c", _MEASURE, str(Path(sys.executable).with_name("kdpipe")), *words, "-c", str(file)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if found["code"] not in (0, 1):
        raise RuntimeError(f"{' '.join(words)}: ended with code {found['code']}\n{found['said'][-3000:]}")
    return found


@click.command(help=__doc__)
@click.option("--samples", type=click.IntRange(1), multiple=True, default=[1000, 10_000], show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--say", is_flag=True, help="Also print what the commands say.")
def main(samples: tuple[int, ...], repeats: int, say: bool) -> None:
    click.echo("| samples | command | seconds | peak MiB | bytes a further sample |\n|--:|---|--:|--:|--:|")
    before: dict[tuple[str, str], tuple[int, int]] = {}
    for count in samples:
        with tempfile.TemporaryDirectory(prefix="bench_status-") as made:
            began = time.perf_counter()
            file = make(Path(made), count)
            click.echo(f"made {count:,} samples in {time.perf_counter() - began:.0f} s", err=True)
            for name, kind in CASES:
                runs = []
                if kind == "nothing moved":
                    time.sleep(2.1)  # what was written a moment ago is not noted down
                    measure(file, [name])
                for _ in range(repeats):
                    _prepare(file, kind)
                    runs.append(measure(file, [name]))
                if say:
                    click.echo(runs[-1]["said"], err=True)
                peak = int(median(run["peak"] for run in runs))
                last = before.get((name, kind))
                grown = f"{(peak - last[1]) / (count - last[0]):,.0f}" if last is not None else ""
                before[name, kind] = count, peak
                seconds = median(run["seconds"] for run in runs)
                cells = (f"{count:,}", f"{name}, {kind}", f"{seconds:.2f}", f"{peak / 2**20:,.0f}", grown)
                click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
