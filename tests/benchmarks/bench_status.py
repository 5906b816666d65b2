"""Time and memory of `kdpipe status` and of a `kdpipe run` that has nothing to do, by the number of samples.

\b
    python tests/benchmarks/bench_status.py --samples 10000 --samples 100000

A run whose samples bring descriptions and traces, one clip for ten samples, with untaught miniatures. The rows of all
stages are written as these would write them, with empty parts, since what is planned is read from the ledgers alone.
Each command is a process of its own, started as a user starts it, with the page cache warm; its times are medians of
the repeats, and its memory the largest resident set of it and its children. On a busy machine the seconds of the
processor say more. "whole": what the last look found is removed before each, so that every sample is looked at; "after
a change": a clip has another date, so that it is hashed again; "nothing moved": the same command once more.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import capture_world
import click
import numpy as np
import pyarrow as pa
import soundfile
import yaml

from kdpipe.data.ledger_files import write_head, write_rows
from kdpipe.data.ledger_rows import Rows
from kdpipe.pipeline.plan import STAGES, without_collecting
from kdpipe.stages.base import Context, StagePlan, Wanted, compare
from kdpipe.stages.config import WeightsConfig
from kdpipe.stages.environment import environment

PART_SAMPLES = 512
SAMPLES_A_CLIP = 10
CASES = [(word, kind) for word in ("status", "train") for kind in ("whole", "after a change", "nothing moved")]
_MEASURE = """
import json, os, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu, peak = used.ru_utime + used.ru_stime, used.ru_maxrss << 10
said = done.stdout + done.stderr
print(json.dumps({"seconds": seconds, "cpu": cpu, "peak": peak, "code": done.returncode, "said": said}))
"""


def make(folder: Path, samples: int) -> Path:
    """A run with so many samples, all fresh but the result files of evaluate; its configuration file."""
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
    plans: dict[str, StagePlan] = {}
    with without_collecting():
        for name, stage in STAGES.items():
            wanted = stage.wanted(ctx, plans)
            _pretend(ctx, name, wanted)
            plans[name] = compare(name, wanted, ctx.ledger(name), environment(ctx, name))
    ctx.prints.save()
    file = base / "kdpipe.yaml"
    file.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config)), sort_keys=False))
    return file


def _pretend(ctx: Context, stage: str, wanted: Sequence[Wanted]) -> None:
    """Commits all that is wanted of a stage, with empty parts; in columns, since a million samples are millions of
    rows."""
    by_source: dict[str, list[Wanted]] = {}
    for want in wanted:
        by_source.setdefault(want.source, []).append(want)
    cores, fields = [], []
    folder, made_with = ctx.folder(stage), environment(ctx, stage).text
    for source, wants in by_source.items():
        count, places = len(wants), np.arange(len(wants))
        parts = [f"{source}-{part:06}" for part in range(-(-count // PART_SAMPLES))]
        for part in parts:
            (folder / "parts" / part).mkdir(parents=True)
        keys = pa.array([want.key for want in wants])
        cover = json.dumps(dict(wants[0].cover), sort_keys=True)
        columns = {
            "id": pa.array([want.id for want in wants]),
            "source": _alike(source, count),
            "key": keys,
            "part": pa.DictionaryArray.from_arrays(pa.array(places // PART_SAMPLES, pa.int32()), parts),
            "row": pa.array(places % PART_SAMPLES),
            "tokens": pa.repeat(pa.scalar(30, pa.int64()), count),
            "length": pa.repeat(pa.scalar(80, pa.int64()), count),
            "content": keys,  # as different from each other as contents are
            "cover": _alike(cover, count),
            "held_as": pa.repeat("", count),
            "made_with": _alike(made_with, count),
        }
        cores.append(pa.table(columns))
        fields.append(pa.table({f"fields.{name}": [want.fields[name] for want in wants] for name in wants[0].fields}))
    made = pa.concat_tables(fields, promote_options="default")
    rows = Rows(pa.concat_tables(cores), lambda: made)
    manifest = folder / "manifests" / f"{rows.digest()}.parquet"
    write_rows(manifest, rows, ctx.tmp(stage))
    write_head(folder, manifest, ctx.tmp(stage))


def _alike(value: str, count: int) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), [value])


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
    """One command on a run: seconds, those of a processor, peak resident memory (bytes), and what it said.

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
    click.echo(
        "| samples | command | seconds | CPU seconds | peak MiB | bytes a further sample |\n|--:|---|--:|--:|--:|--:|"
    )
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
                seconds, cpu = (f"{median(run[what] for run in runs):.2f}" for what in ("seconds", "cpu"))
                cells = (f"{count:,}", f"{name}, {kind}", seconds, cpu, f"{peak / 2**20:,.0f}", grown)
                click.echo(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
