"""The phase `capture` of bench_store.py: the stage cache-teachers beside the bare forward pass of its teacher.

Each measurement has a process of its own (`capture_child.py`), in which the contenders take turns on the batches that
the stage makes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from kdpipe.pipeline.worker import DEFAULTS

CHILD = Path(__file__).with_name("capture_child.py")
CASES = ("k 64", "k 64, 8 tail blocks, 3 lens layers", "k 64, bfloat16")
GOAL = 0.9
SMALL = {"ids": 1000, "rows": 1024, "hidden": 64, "layers": 6, "description": 8, "response": 16}
"""A teacher and samples on which only the structure is tried."""


def ask(what: str, folder: Path, **settings: Any) -> dict[str, Any]:
    """What a process of its own answers.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    answer = folder.with_name(f"{folder.name}.json")
    request = json.dumps({"what": what, "answer": str(answer), "folder": str(folder), **settings})
    environment = DEFAULTS | os.environ  # as the process of a stage has it
    done = subprocess.run([sys.executable, str(CHILD), request], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{request}: ended with code {done.returncode}\n{done.stderr[-4000:]}")
    content = json.loads(answer.read_text())
    answer.unlink()
    return content


def measure(
    folder: Path, *, samples: int, repeats: int, threads: int, counts: Sequence[int], quick: bool
) -> dict[str, Any]:
    """All measurements.

    Args:
        folder: where to work.
        samples: of the cases about speed.
        repeats: rounds.
        threads: of torch.
        counts: numbers of samples to measure peak memory at.
        quick: one case with a small teacher, and no vLLM.
    """
    _say("models and samples")
    ask("prepare", folder / "capture", samples=samples, sizes=SMALL if quick else {}, counts=counts)
    made: dict[str, Any] = {"speed": [], "memory": []}
    settings = {"samples": samples, "repeats": repeats, "threads": threads}
    settings |= {"batch_tokens": 512, "part_samples": 4} if quick else {"batch_tokens": 4096, "part_samples": 128}
    for case in CASES[1:2] if quick else CASES:
        _say(case)
        vllm = min(samples, 32) if case == CASES[0] else 0
        made["speed"].append(ask("speed", folder / "capture" / "speed", case=case, vllm=vllm, **settings))
    for count in counts:
        _say(f"peak memory of {count} samples")
        found = ask("memory", folder / "capture" / f"memory-{count}", threads=threads)
        made["memory"].append({"samples": count, **found})
    return made


def _say(what: str) -> None:
    print(f"capture: {what}", file=sys.stderr, flush=True)


def ratio(row: dict[str, Any], base: str, *, cpu: bool = False) -> float:
    """Median over rounds of the stage's speed by that of a base."""
    pairs = zip(row["taken"]["stage"], row["taken"][base], strict=True)
    return median(theirs[cpu] / ours[cpu] for ours, theirs in pairs)


def text(made: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = ["**capture**", ""]
    lines += ["| | tokens/s | bare | limit | / bare | by CPU time | / limit | by CPU time | goal, / bare |"]
    lines.append("|---|" + "--:|" * 7 + "---|")
    for row in made["speed"]:
        speeds = [row["tokens"] / median(wall for wall, _ in row["taken"][name]) for name in ("stage", "bare", "limit")]
        cells = [f"{value:,.0f}" for value in speeds]
        cells += [f"{ratio(row, base, cpu=cpu):.2f}" for base in ("bare", "limit") for cpu in (False, True)]
        verdict = "met" if ratio(row, "bare") >= GOAL else "short"
        lines.append(f"| {row['case']} | {' | '.join(cells)} | ≥ {GOAL}: {verdict} |")
    lines.append("")
    for row in made["speed"]:
        whole = row["whole"][0]
        spent = ", ".join(f"{name} {value / whole:.1%}" for name, value in row["spent"].items())
        share = row["responses"] / row["tokens"]
        lines.append(
            f"{row['case']}: {row['tokens'] / row['samples']:.0f} tokens a sample, {share:.0%} of them targets,"
        )
        lines += [f"{row['padding']:.1%} of positions padding. Of one pass: {spent}.", ""]
    for row in made["speed"]:
        if found := row.get("vllm"):
            speeds = [found["tokens"] / wall for wall, _ in found["taken"]]
            times = [row["tokens"] / s / speed for (s, _), speed in zip(found["stage"], speeds, strict=True)]
            lines += [
                f"vLLM, {row['case']}: {median(speeds):,.0f} tokens/s; the stage is {median(times):.1f} times as fast.",
                "",
            ]
    if made["memory"]:
        lines += ["| samples | peak MiB | of them imports | planning | bytes a further sample | s | ms a sample |"]
        lines.append("|--:|" + "--:|" * 6)
        for place, row in enumerate(made["memory"]):
            before = made["memory"][place - 1] if place else None
            grown = (row["peak"] - before["peak"]) / (row["samples"] - before["samples"]) if before else None
            cells = [f"{row['samples']:,}", f"{row['peak'] / 2**20:,.0f}", f"{row['imported'] / 2**20:,.0f}"]
            cells += [f"{(row['planned'] - row['imported']) / 2**20:,.0f}", "" if grown is None else f"{grown:,.0f}"]
            cells += [f"{row['seconds']:.1f}", f"{1000 * row['seconds'] / row['samples']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).rstrip()
