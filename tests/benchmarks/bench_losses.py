"""Time and peak memory of our losses beside cross-entropy alone and the losses of other projects.

\b
    python tests/benchmarks/bench_losses.py                   # CPU
    python tests/benchmarks/bench_losses.py --preset h200     # one H200

Every case has a process of its own, which stays alive; the processes are asked in turn, round after round, so that a
drift of the machine hits all of them alike. A time is forward and backward pass, gradients of hidden states and weight
included: the median over rounds. A ratio is the median of the ratios within each round. Peak memory is what one pass
needs beyond its inputs (gradients included): on CUDA what PyTorch's allocator counts, on a CPU the process's resident
memory (Linux). Peers: .dev/peers.txt.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from loss_cases import CASES, LIMIT, Case, Inputs, Settings, Step

MIB = 2**20
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"rows": 512, "width": 1024, "vocab": 32_000, "dtype": "float32", "device": "cpu", "repeats": 7},
    "h200": {"rows": 8192, "width": 3584, "vocab": 152_064, "dtype": "bfloat16", "device": "cuda", "repeats": 20},
}


@dataclass
class Result:
    """What was measured of a case: seconds of each round and peak memory in bytes, or why nothing was."""

    case: Case
    seconds: list[float] = field(default_factory=list)
    peak: int | None = None
    loss: float | None = None
    failure: str | None = None


def _status(name: str) -> int:
    """A value of /proc/self/status, in bytes."""
    match = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1]) * 1024


def peak_memory(step: Step, device: str) -> int | None:
    """Bytes that one pass needs beyond what was there before; None where that cannot be known."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # memory kept from the pass before would hide that this one needs it
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _timed(step: Step, device: str, clock: str) -> float:
    now = CLOCKS[clock]
    if device == "cuda":
        step()  # what the other processes left in the caches is not this case's
        torch.cuda.synchronize()
    began = now()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - began


def serve(connection: Connection, key: str, settings: Settings) -> None:
    """One case in its process: sends loss and peak memory, then the seconds of a pass whenever asked."""
    try:
        torch.set_num_threads(settings.threads)
        (case,) = (case for case in CASES if case.key == key)
        step = case.build(Inputs(settings))
        loss = step()
        answer = {"loss": loss, "peak": peak_memory(step, settings.device)}
        while True:
            if settings.device == "cuda":
                torch.cuda.empty_cache()  # the other processes need the memory
            connection.send(answer)
            connection.recv()
            answer = {"seconds": _timed(step, settings.device, settings.clock)}
    except EOFError:
        pass
    except Exception as error:  # the table says why a case has no numbers
        connection.send({"failure": f"{type(error).__name__}: {error}"})


class Worker:
    """The process of one case."""

    def __init__(self, case: Case, settings: Settings):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "kdpipe.stages.train.losses"])
        self.result = Result(case)
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, case.key, settings), daemon=True)
        self._process.start()
        theirs.close()
        answer = self._receive()
        self.result.loss, self.result.peak = answer.get("loss"), answer.get("peak")

    def _receive(self) -> dict[str, Any]:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            answer = {"failure": f"the process ended with code {self._process.exitcode}"}
        self.result.failure = answer.get("failure")
        return answer

    def measure(self) -> None:
        """One more pass."""
        self._connection.send(True)
        answer = self._receive()
        if "seconds" in answer:
            self.result.seconds.append(answer["seconds"])

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.join()


def run(settings: Settings, keys: tuple[str, ...] = ()) -> list[Result]:
    """The cases named, or all: each set up, warmed up and measured for memory by itself, then rounds of timing."""
    results, workers = [], []
    cases = [case for case in CASES if not keys or case.key in keys or case is LIMIT]
    try:
        for number, case in enumerate(cases, 1):
            click.echo(f"setting up {number}/{len(cases)}: {case.key}", err=True)
            if case.cuda and settings.device != "cuda":
                results.append(Result(case, failure="needs CUDA"))
                continue
            worker = Worker(case, settings)
            results.append(worker.result)
            workers.append(worker)
        for number in range(settings.repeats):
            click.echo(f"round {number + 1}/{settings.repeats}", err=True)
            for worker in workers:
                if worker.result.failure is None:
                    worker.measure()
    finally:
        for worker in workers:
            worker.end()
    return results


def _ratio(result: Result, base: Result | None) -> float | None:
    if base is None or result.failure or base.failure:
        return None
    return median(a / b for a, b in zip(result.seconds, base.seconds, strict=True))


def summary(results: list[Result], settings: Settings) -> list[dict[str, Any]]:
    """A row for each case; see the table's columns in `table`."""
    alone = {r.case.form: r for r in results if r.case.form and r.case.key.startswith("ce-") and not r.failure}
    fused = [*alone.values(), *(r for r in results if r.case.key == "liger-ce" and not r.failure)]
    fastest = min(fused, key=lambda r: median(r.seconds), default=None)
    (limit,) = (r for r in results if r.case is LIMIT)
    flops = 6 * settings.rows * settings.width * settings.vocab
    rows = []
    for result in results:
        seconds = result.seconds if result.failure is None else []
        rows.append(
            {
                "case": result.case.key,
                "title": result.case.title,
                "terms": result.case.terms,
                "failure": result.failure,
                "seconds": median(seconds) if seconds else None,
                "fastest_seconds": min(seconds, default=None),
                "slowest_seconds": max(seconds, default=None),
                "ratio_to_fastest": _ratio(result, fastest),
                "ratio_to_form": _ratio(result, alone.get(result.case.form)) if result.case.form else None,
                "peak_bytes": result.peak if result.case is not LIMIT else None,
                "share_of_limit": _ratio(limit, result),
                "teraflops": flops / median(seconds) / 1e12 if seconds else None,
                "loss": result.loss if result.case is not LIMIT else None,
            }
        )
    return rows


def machine(settings: Settings) -> dict[str, str]:
    """What was measured on, and which versions."""
    if settings.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
        name = f"{match[1] if match else platform.processor()}, {os.cpu_count()} cores"
    versions = {"torch": torch.__version__}
    for package in ("liger-kernel", "trl", "torchtune", "axolotl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {"device": name, **versions}


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def table(rows: list[dict[str, Any]], settings: Settings) -> str:
    """The rows as Markdown, and what they were measured on."""
    gradients = (settings.rows + settings.vocab) * settings.width * getattr(torch, settings.dtype).itemsize / MIB
    about = ", ".join(f"{key} {value}" for key, value in machine(settings).items() if key != "device")
    lines = [
        f"N {settings.rows:,}, H {settings.width:,}, V {settings.vocab:,}, {settings.dtype}, k {settings.k}; "
        f"{machine(settings)['device']}, {settings.threads} threads; {about}; {settings.repeats} rounds "
        f"by the {settings.clock} clock.",
        "",
        "| whose | terms | seconds (min .. max) | / fastest fused CE | / CE of the same form "
        f"| peak MiB beyond inputs (gradients: {gradients:,.0f}) | of the product limit | loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        if row["failure"]:
            why = " ".join(row["failure"].split()).replace("|", "\\|")[:200]
            lines.append(f"| {row['title']} | {row['terms']} | {why} | | | | | |")
            continue
        digits = 3 if row["seconds"] >= 0.1 else 5
        span = f"{row['fastest_seconds']:.{digits}f} .. {row['slowest_seconds']:.{digits}f}"
        cells = (
            row["title"],
            row["terms"],
            f"{row['seconds']:.{digits}f} ({span})",
            _number(row["ratio_to_fastest"], 2),
            _number(row["ratio_to_form"], 2),
            _number(row["peak_bytes"] and row["peak_bytes"] / MIB, 0),
            f"{row['share_of_limit']:.0%}" if row["share_of_limit"] else "",
            _number(row["loss"], 5),
        )
        lines.append(f"| {' | '.join(cells)} |")
    limit = next((row["teraflops"] for row in rows if row["case"] == LIMIT.key), None)
    if limit:
        lines += ["", f"Product limit: {limit:,.2f} TFLOP/s over 6 N H V operations."]
    return "\n".join(lines)


@click.command(help=__doc__)
@click.option("--preset", type=click.Choice(list(PRESETS)), default="cpu", show_default=True, help="Sizes and device.")
@click.option("--rows", type=click.IntRange(1), help="N, instead of the preset's.")
@click.option("--width", type=click.IntRange(1), help="H.")
@click.option("--vocab", type=click.IntRange(2), help="V.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]))
@click.option("--device", type=click.Choice(["cpu", "cuda"]))
@click.option(
    "--clock",
    type=click.Choice(list(CLOCKS)),
    default="wall",
    show_default=True,
    help="'processor': the time that a CPU has worked for the process, for machines which are shared.",
)
@click.option("--repeats", type=click.IntRange(1), help="Rounds of timing.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Threads of each process.")
@click.option("--k", type=click.IntRange(1), default=64, show_default=True, help="Kept entries of cached teachers.")
@click.option(
    "--case", "keys", type=click.Choice([case.key for case in CASES]), multiple=True, help="Only these, and the limit."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Also write all numbers here."
)
def main(
    preset: str, clock: str, threads: int, k: int, keys: tuple[str, ...], json_file: Path | None, **changes: Any
) -> None:
    chosen = {**PRESETS[preset], **{name: value for name, value in changes.items() if value is not None}}
    settings = Settings(**chosen, clock=clock, threads=threads, k=k)
    if k >= settings.vocab:
        raise click.UsageError("--k must be below --vocab.")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device is here; choose --device cpu.")
    if settings.device == "cuda" and clock != "wall":
        raise click.UsageError("a processor's clock does not see a GPU; choose --clock wall.")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    rows = summary(run(settings, keys), settings)
    click.echo(table(rows, settings))
    if json_file is not None:
        content = {"settings": asdict(settings), "machine": machine(settings), "rows": rows}
        json_file.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
