"""Speed of the teacher store beside a memory map, plain system calls and the stores of other projects.

\b
    python tests/benchmarks/bench_store.py                            # without what needs an environment of its own
    python tests/benchmarks/bench_store.py --peers /tmp/peers --json numbers.json

The same samples (hidden states in bfloat16, random bits, lengths that vary) are written in every format, and read by
everyone in the same orders. Each contender has a process of its own, which stays alive; they are asked in turn, round
after round, in an order that rotates, so that noise of the machine hits all alike. Before any time is taken each
contender's bytes are compared with the samples (column "same bytes").

\b
read   page cache warm, opened before the clock. A pass ends when every sample has lain in memory of the reader's own
       or the caller's; what is handed out as a map of the file is copied into a reused buffer. "CRC on" verifies each
       chunk: its reader is opened, and maps its files, anew before each pass, as "memmap, mapped anew" does; the
       baseline keeps its map, and so the page tables. zarr-python and tensorstore always verify; the others have no
       checksums. WebDataset shuffles by itself, through a buffer.
cold   the files are dropped from the page cache before each pass (what is below the system, a hypervisor's cache say,
       is not); beside it `preadv` of the same files in blocks of 8 MiB, or of each sample.
write  to an empty folder, with fsync of files and folders, of samples that lie in memory.
rows   distributions of 300 tokens, microseconds a sample, in shuffled order, checksums verified before.
capture   only where it is asked for: the textual teacher at work, from samples to committed parts, on the CPU, beside
       bare forward passes over the same batches with the output head at all positions ("bare"), and beside forward
       passes with one plain product at response positions for each distribution ("limit"); vLLM's `prompt_logprobs` on
       some of the samples; peak memory of the whole stage.

GB/s are bytes of samples / 1e9 / seconds of the wall clock: the median over rounds, and the best. Ratios are medians of
the ratios within each round, and the goals are on these.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import store_capture
import store_rows
from store_cases import ORDERS, SEQUENTIAL, SHUFFLED, Plan
from store_child import READERS
from store_table import Result, summary, table

from kdpipe.pipeline import wheels

CHILD = Path(__file__).with_name("store_child.py")
PEERS = ("torch==2.13.0", "torchvision==0.28.0", "mosaicml-streaming==0.13.*", "webdataset==1.0.2")
PHASES = ("read", "cold", "write", "rows", "capture")

WRITERS = {
    "plain": ("plain write to one file", False),
    "plain-shards": ("plain write, a file a shard", False),
    "store": ("kdpipe", False),
    "zarr": ("zarr-python, sharded alike, a shard at a time", False),
    "tensorstore": ("tensorstore, sharded alike", False),
    "safetensors": ("safetensors, a file a part", False),
    "tar": ("WebDataset", True),
    "mds": ("MosaicML Streaming", True),
}
"""Writers in the order they first run in: title, and whether it needs the environment of `--peers`."""

SETS = ("store", "safetensors", "tar", "mds")

READ_GOALS = {"kdpipe-crc-0": 0.5, "kdpipe-crc-1": 0.5, "kdpipe-crc-2": 0.5, "kdpipe-verified-0": 0.9}
"""Of memmap in the caller's thread."""

COLD_BASES = {
    SEQUENTIAL: {"kdpipe-crc-0": "files-0", "kdpipe-crc-2": "files-2"},
    SHUFFLED: {"kdpipe-crc-0": "preadv-0", "kdpipe-crc-2": "preadv-2"},
}
COLD_GOAL, WRITE_GOAL = 0.9, 0.6


class Child:
    """The process of one contender."""

    def __init__(self, plan: Plan, what: str, key: str, python: str):
        command = [python, str(CHILD), str(plan.folder), what, key]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, command: str, *arguments: str) -> dict[str, Any]:
        """What it answers; `failure` says why it could not."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([command, *arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        return json.loads(line) if line else {"failure": f"the process ended with code {self._process.wait()}"}

    def end(self) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(60)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()


def environment(venv: Path) -> str:
    """The interpreter of an environment with the peers that ours cannot hold; made where it is not there."""
    python = venv / "bin" / "python"
    if not (venv / "complete").exists():
        click.echo(f"making {venv}", err=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True, stdout=sys.stderr)
        subprocess.run([str(python), wheels.__file__], check=True, stdout=sys.stderr)
        (venv / "complete").touch()
    return str(python)


def files_of(path: Path) -> list[Path]:
    """A file, or all files of a folder."""
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def drop(path: Path) -> float:
    """Drops files from the page cache; returns the share of their pages that is still there."""
    libc, kept, pages = ctypes.CDLL(None, use_errno=True), 0, 0
    for file in files_of(path):
        with open(file, "r+b") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(handle.fileno()).st_size
            if not size:
                continue
            with mmap.mmap(handle.fileno(), size) as mapped:
                there = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
                first = ctypes.c_char.from_buffer(mapped)
                assert not libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), there)
                del first
            kept += int((np.frombuffer(there, np.uint8) & 1).sum())
            pages += len(there)
    return kept / max(1, pages)


def set_up(plan: Plan, peers: str | None) -> dict[str, str]:
    """Writes the samples in every format that is read; returns why a format is not there."""
    missing = {}
    for key in SETS:
        click.echo(f"writing {key}", err=True)
        if WRITERS[key][1] and peers is None:
            missing[key] = "needs --peers"
            continue
        child = Child(plan, "write", key, (peers if WRITERS[key][1] else None) or sys.executable)
        missing |= {key: why} if (why := child.ask("write", str(plan.folder / key)).get("failure")) else {}
        child.end()
    os.sync()
    return missing


def read(plan: Plan, repeats: int, peers: str | None, missing: dict[str, str], *, cold: bool) -> list[Result]:
    """Rounds of passes in both orders; cold, each contender opens, reads and closes before the next is asked."""
    phase = "cold" if cold else "read"
    results: dict[tuple[str, str], Result] = {}
    children: dict[str, Child] = {}
    for case in READERS[phase].values():
        click.echo(f"{phase}: checking {case.key}", err=True)
        why = missing.get(case.reads) or ("needs --peers" if case.peers and peers is None else None)
        if why is None:
            children[case.key] = Child(plan, phase, case.key, (peers if case.peers else None) or sys.executable)
            why = children[case.key].ask("open").get("failure")
        for order in ORDERS if case.alone is None else (case.alone,):
            result = Result(phase, order, case.key, case.title, "memmap-0", failure=why)
            if cold:
                result.base = COLD_BASES[order].get(case.key, "files-0" if order == SEQUENTIAL else "preadv-0")
                result.goal = COLD_GOAL if case.key in COLD_BASES[order] else None
            else:
                result.goal = READ_GOALS.get(case.key)
            results[case.key, order] = result
            if why is None:
                answer = children[case.key].ask("check", order)
                result.same, result.failure = answer.get("same"), answer.get("failure")
        if cold and why is None:
            children[case.key].ask("close")
    keys = list(children)
    try:
        for number in range(repeats):
            click.echo(f"{phase}: round {number + 1}/{repeats}", err=True)
            first = number * len(keys) // repeats
            for order in ORDERS:
                for key in keys[first:] + keys[:first]:
                    result = results.get((key, order))
                    if result is None or result.failure is not None:
                        continue
                    case, child = READERS[phase][key], children[key]
                    answer = child.ask("open") if cold or case.fresh else {}
                    if cold:
                        result.resident = max(result.resident, drop(plan.folder / case.reads))
                    answer = answer if "failure" in answer else child.ask("timed", order)
                    if cold:
                        child.ask("close")
                    result.failure = answer.get("failure")
                    if "seconds" in answer:
                        result.seconds.append(answer["seconds"])
    finally:
        for child in children.values():
            child.end()
    return sorted(results.values(), key=lambda result: ORDERS.index(result.order or SEQUENTIAL))


def write(plan: Plan, repeats: int, peers: str | None) -> list[Result]:
    """Rounds of writing; what was written is removed before the next writes."""
    results, children = {}, {}
    for key, (title, apart) in WRITERS.items():
        goal = WRITE_GOAL if key == "store" else None
        results[key] = Result("write", None, f"write-{key}", title, "write-plain", goal)
        if apart and peers is None:
            results[key].failure = "needs --peers"
        else:
            children[key] = Child(plan, "write", key, (peers if apart else None) or sys.executable)
    keys, folder = list(children), plan.folder / "written"
    try:
        for number in range(repeats):
            click.echo(f"write: round {number + 1}/{repeats}", err=True)
            first = number * len(keys) // repeats
            for key in keys[first:] + keys[:first]:
                if results[key].failure is None:
                    answer = children[key].ask("write", str(folder))
                    results[key].failure = answer.get("failure")
                    results[key].seconds += [answer["seconds"]] if "seconds" in answer else []
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for child in children.values():
            child.end()
    return list(results.values())


def machine(peers: str | None) -> dict[str, str]:
    """What was measured on, and which versions."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    about = {"processor": match[1] if match else platform.processor(), "cores": str(os.cpu_count())}
    about |= {name: version(name) for name in ("numpy", "torch", "zarr", "tensorstore", "safetensors")}
    if peers is not None:
        names = ["mosaicml-streaming", "webdataset"]
        code = f"from importlib.metadata import version; print(*map(version, {names}))"
        found = subprocess.run([peers, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        about |= dict(zip(names, found, strict=True))
    return about


@click.command(help=__doc__)
@click.option("--gib", type=float, default=1.0, show_default=True, help="Size of the samples.")
@click.option("--tokens", type=click.IntRange(1), default=250, show_default=True, help="Mean tokens of a sample.")
@click.option("--width", type=click.IntRange(1), default=3584, show_default=True, help="Numbers a token.")
@click.option("--parts", type=click.IntRange(1), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=7, show_default=True, help="Rounds.")
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch, in `capture`.")
@click.option("--phase", "phases", type=click.Choice(PHASES), multiple=True, help="Only this; may be repeated.")
@click.option(
    "--peers",
    type=click.Path(file_okay=False, path_type=Path),
    help="Environment for MosaicML Streaming and WebDataset, which ours cannot hold; made where it is not there.",
)
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where to write, e.g. another disk; about six times --gib.  [default: the system's temporary folder]",
)
@click.option("--quick", is_flag=True, help="A few MB and two rounds: whether it runs, not how fast.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write all numbers here."
)
def main(
    gib: float,
    tokens: int,
    width: int,
    parts: int,
    repeats: int,
    threads: int,
    phases: tuple[str, ...],
    peers: Path | None,
    folder: Path | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    size, shard_bytes, samples = round(gib * 2**30), 128 << 20, 256
    if quick:
        size, shard_bytes, samples, tokens, parts, repeats = 12 << 20, 3 << 20, 8, 60, 2, 2
    phases = phases or PHASES[:-1]
    python = None if peers is None else environment(peers)
    results: list[Result] = []
    small: list[dict[str, Any]] = []
    captured: dict[str, Any] = {"speed": [], "memory": []}
    with tempfile.TemporaryDirectory(prefix="bench_store-", dir=folder) as made:
        if set(phases) - {"rows", "capture"}:
            plan = Plan.make(
                Path(made), size=size, tokens=tokens, width=width, parts=parts, shard_bytes=shard_bytes, seed=0
            )
            size = plan.bytes
            missing = set_up(plan, python) if {"read", "cold"} & set(phases) else {}
            for phase in ("cold", "read"):
                if phase in phases:
                    results += read(plan, repeats, python, missing, cold=phase == "cold")
            results += write(plan, repeats, python) if "write" in phases else []
        if "rows" in phases:
            click.echo("rows", err=True)
            small = store_rows.measure(Path(made), samples=samples, tokens=300, repeats=max(2 * repeats, 5), seed=0)
        if "capture" in phases:
            captured = store_capture.measure(
                Path(made),
                samples=8 if quick else 128,
                repeats=min(repeats, 5),
                threads=threads,
                counts=(20, 40) if quick else (100, 1000, 10000),
                quick=quick,
            )
    rows = summary(results, size)
    about = machine(python)
    settings = {"bytes": size, "tokens": tokens, "width": width, "parts": parts, "repeats": repeats}
    click.echo(", ".join(f"{key} {value}" for key, value in (settings | about).items()) + "\n")
    click.echo(table(rows, small))
    if "capture" in phases:
        click.echo(store_capture.text(captured))
    if json_file is not None:
        content = {"settings": settings, "machine": about, "rows": rows, "small": small, "capture": captured}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
