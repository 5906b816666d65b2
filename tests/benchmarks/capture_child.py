"""A process of bench_store.py's phase `capture`: one measurement, answered in a file of JSON.

python capture_child.py '{"what": "prepare"|"speed"|"memory", "folder": ..., "answer": FILE, ...}'
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import capture_world
import torch

from kdpipe.data.ledger import Ledger
from kdpipe.data.store.distributions import Layout
from kdpipe.data.store.writer import PartWriter
from kdpipe.stages.base import Context
from kdpipe.stages.cache_teachers import capture, run, teach
from kdpipe.stages.cache_teachers.capture import Scribe
from kdpipe.stages.cache_teachers.record import Recorder
from kdpipe.stages.cache_teachers.requirements import requirements
from kdpipe.stages.cache_teachers.served import serve
from kdpipe.stages.cache_teachers.stage import STAGE
from kdpipe.stages.config import WeightsConfig
from kdpipe.stages.models.inputs import Encoder
from kdpipe.stages.models.loaded import LoadedModel, load_model

CASES: dict[str, dict[str, Any]] = {
    "k 64": {},
    "k 64, 8 tail blocks, 3 lens layers": {"tail_blocks": 8, "layers": {1: 2, 2: 4, 3: 5}},
    "k 64, bfloat16": {"dtype": "bfloat16"},
}
"""Settings of `capture_world.configuration`."""


class Taken(NamedTuple):
    """Seconds of the wall clock, and of the processor in all threads."""

    wall: float
    cpu: float

    @staticmethod
    def by(work: Callable[[], Any]) -> Taken:
        gc.collect()
        _settle()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        _settle()
        return Taken(time.perf_counter() - wall, time.process_time() - cpu)


def _settle() -> None:
    """Waits for the GPU, where one is at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class Bench:
    """One case: a loaded teacher, and a run whose targets are made."""

    def __init__(self, folder: Path, case: dict[str, Any], batch_tokens: int, part_samples: int, device: str):
        sizes = {"batch_tokens": batch_tokens, "part_samples": part_samples, "device": device}
        self.config = capture_world.configuration(folder / "models", **case, **sizes)
        self.base = folder / "base"
        self.needs = requirements(Context(self.config, self.base))
        assert self.needs.textual is not None
        self.loaded = load_model(self.needs.textual, device=device)
        self.jobs: list[Any] = []
        self.batches: list[Any] = []
        self.tokens = 0

    def stage(self, clock: Clock | None = None, *, dry: bool = False) -> Taken:
        """The textual teacher, from samples to parts that are committed; dry, only its jobs are kept."""
        taken = Taken(0.0, 0.0)

        def write(teacher: teach.Teacher, task: teach.Task) -> None:
            nonlocal taken
            if dry:
                self.jobs = task.build(task.wants).jobs
                self.tokens = sum(job.example.length for job in self.jobs)
                return
            assert teacher.loaded is self.loaded
            if clock is not None:
                task = replace(task, build=clock.timed("build jobs", task.build))
            os.sync()
            taken = Taken.by(lambda: (original(teacher, task), work.ledger.flush()))

        original = teach.Teacher.write
        with tempfile.TemporaryDirectory(dir=self.base.parent) as made, ExitStack() as stack:
            base = Path(made) / "run"
            shutil.copytree(self.base, base)
            ctx = Context(self.config, base, lambda line: None)
            wants = [want for want in capture_world.to_make(ctx) if want.source == "textual"]
            work = run.Work.of(ctx)
            stack.enter_context(patch.object(teach, "open_teacher", lambda folder, config: nullcontext(self.loaded)))
            if clock is not None:
                stack.enter_context(clock.running())
            stack.enter_context(patch.object(teach.Teacher, "write", write))
            run._textual(work, wants)
        return taken

    def watch(self) -> None:
        """A pass of the stage, whose jobs and batches are kept."""
        call = Scribe.__call__

        def kept(scribe: Scribe, batch: Any) -> Any:
            self.batches.append(batch)
            return call(scribe, batch)

        self.stage(dry=True)
        with patch.object(Scribe, "__call__", kept):
            self.stage()
        self.batches = [batch.to(self.loaded.device) for batch in self.batches]

    def bare(self) -> Taken:
        """Forward passes with the output head at all positions."""

        @torch.inference_mode()
        def work() -> None:
            for batch in self.batches:
                self.loaded.model(**batch.forward, use_cache=False).logits  # noqa: B018

        return Taken.by(work)

    def limit(self) -> Taken:
        """Forward passes, and one plain product at response positions for each distribution."""
        lens, head, chunk = self.needs.lens, self.loaded.head_weight, self.config.teachers.head_chunk

        @torch.inference_mode()
        def work() -> None:
            out = torch.empty(chunk, len(head), dtype=head.dtype, device=head.device)
            for batch in self.batches:
                with self.loaded.capture(lens, batch.response_rows) as states:
                    last = self.loaded.hidden(batch).flatten(0, 1)[batch.response_rows]
                for hidden in (last, *(self.loaded.final_norm(states[layer]) for layer in lens)):
                    for rows in hidden.split(chunk):
                        torch.mm(rows, head.T, out=out[: len(rows)])

        return Taken.by(work)

    @property
    def padding(self) -> float:
        """Share of the batches' positions that hold nothing."""
        return 1 - self.tokens / sum(batch.input_ids.numel() for batch in self.batches)


class Clock:
    """Seconds spent in functions of the stage, each in its thread; what one calls of the others counts for both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._lock = threading.Lock()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                with self._lock:
                    self.seconds[name] += time.perf_counter() - began

        return call

    @contextmanager
    def running(self) -> Iterator[None]:
        places: Sequence[tuple[str, Any, str]] = (
            ("collate", Encoder, "collate"),
            ("forward", LoadedModel, "hidden"),
            ("head", capture, "distribution"),
            ("wait for the writer, batches", Recorder, "_later"),
            ("wait for the writer, end", Recorder, "wait"),
            ("writer: encode", Layout, "encode"),
            ("writer: append", PartWriter, "append"),
            ("writer: close", PartWriter, "close"),
            ("writer: commit", Ledger, "commit"),
            ("flush the ledger", Ledger, "flush"),
        )
        with ExitStack() as stack:
            for label, owner, name in places:
                stack.enter_context(patch.object(owner, name, self.timed(label, getattr(owner, name))))
            yield


def speed(
    folder: str,
    case: str,
    samples: int,
    batch_tokens: int,
    part_samples: int,
    repeats: int,
    vllm: int,
    threads: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Rounds of the contenders; with `vllm`, also of vLLM on so many of the samples, beside the stage on all."""
    torch.set_num_threads(threads)
    bench = Bench(Path(folder), CASES[case], batch_tokens, part_samples, device)
    bench.watch()
    assert len(bench.jobs) == samples
    contenders = {"stage": bench.stage, "bare": bench.bare, "limit": bench.limit}
    taken: dict[str, list[Taken]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        keys = list(contenders)
        for key in keys[number % len(keys) :] + keys[: number % len(keys)]:
            one = contenders[key]()
            if number:
                taken[key].append(one)
    clock = Clock()
    whole = bench.stage(clock)
    rows = sum(len(batch.response_rows) for batch in bench.batches)
    made = {"case": case, "taken": taken, "tokens": bench.tokens, "responses": rows, "padding": bench.padding}
    made |= {"samples": samples, "batches": len(bench.batches), "whole": whole, "spent": dict(clock.seconds)}
    return made | ({"vllm": served(bench, vllm, repeats)} if vllm else {})


def served(bench: Bench, samples: int, repeats: int) -> dict[str, Any]:
    """Rounds of the stage and of vLLM, whose first pass is not counted."""
    step = len(bench.jobs) // samples
    examples = [job.example for job in bench.jobs[::step]]
    made: dict[str, Any] = {"tokens": sum(example.length for example in examples), "taken": [], "stage": []}
    assert bench.needs.textual is not None
    with serve(bench.needs.textual, bench.config.teachers, bench.needs.alignment, bench.needs.k) as engine:
        for number in range(repeats + 1):
            taken = Taken.by(lambda: deque(engine(examples), maxlen=0))
            if number:
                made["taken"].append(taken)
                made["stage"].append(bench.stage())
    return made


def prepare(folder: str, samples: int, sizes: dict[str, int], counts: Sequence[int]) -> dict[str, Any]:
    """In `speed/` models and a run whose targets are made; in `memory-N/` miniatures and a run with short traces."""
    path, chosen = Path(folder), capture_world.Sizes(**sizes)
    capture_world.make_models(path / "speed" / "models", chosen)
    ctx = _written(path / "speed", samples, chosen)
    STAGE.run(ctx, [want for want in capture_world.to_make(ctx) if want.source == "targets"])
    for count in counts:
        place = path / f"memory-{count}"
        capture_world.make_miniatures(place / "models")
        _written(place, count, capture_world.Sizes(description=8, response=16))
    return {}


def _written(folder: Path, samples: int, sizes: capture_world.Sizes) -> Context:
    """A run in `base/` with its traces."""
    capture_world.write_run(folder / "base", samples, sizes, seed=1)
    ctx = Context(capture_world.configuration(folder / "models"), folder / "base", lambda line: None)
    capture_world.textualize(ctx)
    return ctx


def memory(folder: str, threads: int) -> dict[str, Any]:
    """Peak resident memory and time of planning and running the whole stage with untaught miniatures."""
    torch.set_num_threads(threads)
    config = capture_world.configuration(
        Path(folder) / "models",
        weights=WeightsConfig(acoustic_top=0.1),
        layers={2: 3, 4: 6},
        batch_tokens=2048,
        head_chunk=512,
    )
    ctx = Context(config, Path(folder) / "base", lambda line: None)
    made = {"imported": _peak()}
    began = time.perf_counter()
    todo = capture_world.to_make(ctx)
    made |= {"planned": _peak(), "planning": time.perf_counter() - began}
    began = time.perf_counter()
    STAGE.run(ctx, todo)
    return made | {"peak": _peak(), "seconds": time.perf_counter() - began, "units": len(todo)}


def _peak() -> int:
    """Largest resident memory so far (bytes)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    function = {"prepare": prepare, "speed": speed, "memory": memory}[asked.pop("what")]
    answer = Path(asked.pop("answer"))
    answer.write_text(json.dumps(function(**asked)))
